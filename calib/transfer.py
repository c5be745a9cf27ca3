"""The next layer's weights on their way to a device while the current one computes."""

from typing import Any

import torch


class Transfer:
    """Copies from pinned memory on a stream of its own; on the CPU nothing is to be done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``stored`` on the device; it is emptied. Called on the background thread.

        The copies are complete when this returns. Their memory is used by the stream that
        computes, so this one must not hand it out again before that has done with it.
        """
        if self._stream is None:
            return stored
        with torch.cuda.stream(self._stream):
            moved = {n: t.to(self._device, non_blocking=True) for n, t in stored.items()}
        self._stream.synchronize()
        stored.clear()
        computing = torch.cuda.default_stream(self._device)
        for tensor in moved.values():
            tensor.record_stream(computing)
        return moved
