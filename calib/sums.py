"""Sums of activations and of their squares, by bucket of token rarity."""

import torch

from calib.weights import pages
from surgery.stats import AxisSums

CHUNK_VALUES = 1 << 20
"""Activations in float64 at a time: 8 MiB."""

FEW_TOKENS = 64
"""Tokens whose activations are summed in float32 where there is no float64."""


class ChannelSums:
    """Sums over one channel axis of one layer, by bucket and expert.

    They are float64, but on a device without it (MPS): there the sum over at most ``FEW_TOKENS``
    is float32, and such sums are added with Kahan's compensation. All terms are positive, so the
    relative error is below ``(FEW_TOKENS + 4) * 2**-24``, 4.1e-6, however many tokens there are.
    """

    def __init__(
        self,
        buckets: int,
        experts: int,
        channels: int,
        device: torch.device,
        *,
        compensated: bool | None = None,
    ) -> None:
        """Begin with zeros; ``compensated`` None is where the device has no float64."""
        shape = (buckets, experts, channels)
        self._compensated = device.type == "mps" if compensated is None else compensated
        self._dtype = torch.float32 if self._compensated else torch.float64
        self.sum_sq = zeros(shape, self._dtype, device)
        self.sum_abs = zeros(shape, self._dtype, device)
        self._lost = [torch.zeros_like(s) for s in self._sums] if self._compensated else []
        self.tokens = torch.zeros((buckets, experts), dtype=torch.int64)

    @property
    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sum_abs, self.sum_sq

    def add(self, expert: int, buckets: torch.Tensor, act: torch.Tensor) -> None:
        """Add the activations of some tokens.

        Args:
            expert: Who saw them; 0 in a dense FFN.
            buckets: int64 ``(tokens,)``: the bucket of each token, on the CPU.
            act: ``(tokens, I)``, the input of down_proj.
        """
        count = len(self.tokens)
        self.tokens[:, expert] += torch.bincount(buckets, minlength=count)
        member = membership(buckets, count).to(self._dtype).to(act.device)
        step = max(1, CHUNK_VALUES // act.shape[1])
        step = min(step, FEW_TOKENS) if self._compensated else step
        for start in range(0, len(act), step):
            part = slice(start, start + step)
            wide = act[part].to(self._dtype).abs_()
            self._add(0, expert, member[:, part] @ wide)
            self._add(1, expert, member[:, part] @ wide.square_())

    def _add(self, which: int, expert: int, part: torch.Tensor) -> None:
        """Add ``part`` ``(buckets, I)`` to one of the sums."""
        total = self._sums[which][:, expert]
        if not self._compensated:
            total += part
            return
        lost = self._lost[which][:, expert]
        part = part - lost
        larger = total + part
        lost.copy_((larger - total) - part)
        total.copy_(larger)

    def numbers(self) -> AxisSums:
        """The sums as arrays."""
        sums = [each.cpu().double().numpy() for each in self._sums]
        return AxisSums(sums[1], sums[0], self.tokens.numpy())


def membership(buckets: torch.Tensor, count: int) -> torch.Tensor:
    """Return float64 ``(count, tokens)``: 1 where ``buckets[token]`` is the row."""
    return torch.nn.functional.one_hot(buckets, count).T.double()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros that, on the CPU, do not split the heap's free space."""
    if device.type == "cpu" and 0 not in shape:
        return pages(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
