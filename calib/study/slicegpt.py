"""SliceGPT (arXiv 2401.15024): project each block's input to its first principal components.

As published, each attention and each FFN reads the residual stream in a basis of its own, from
which the last columns are deleted, and matrices between the blocks change the basis. Here the same
model is computed in the basis of the original: before each block, the stream is projected to the
space that the kept columns span. The last FFN's output is whole, and so is the head.

A standard config.json has no place for the matrices between the blocks. So this is only tried.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.scoring.tasks import AskedTasks
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.study.trial import Trial, Variant
from calib.text.heldout import Encoded
from surgery.errors import FamilyError
from surgery.layout.layout import Layout

MULTIPLE = 8
"""The sliced size is a multiple of this, as in the published code."""

FIRST, SECOND = "input_layernorm", "post_attention_layernorm"
"""The norms before the attention and before the FFN."""

ROWS = 4096
"""Tokens whose products are added in float32 at a time."""


def sliced_size(layout: Layout, ratio: float) -> int:
    """Return the columns of the residual stream that remain: the ratio is taken from them."""
    size = int((1 - ratio) * hidden_size(layout))
    return max(1, size - size % MULTIPLE)


def hidden_size(layout: Layout) -> int:
    """Return the columns of the residual stream."""
    return layout.by_name[layout.family.embedding].shape[1]


def check_sliced(layout: Layout) -> None:
    """Refuse a model whose layers are not an RMS norm and an attention, then one and a dense FFN.

    Raises:
        FamilyError: it names the method.
    """
    size, norms = hidden_size(layout), set()
    for name, ref in layout.of_layer[0].items():
        if layout.roles[ref.name].slot.group == "norms" and ref.shape == (size,):
            norms.add(".".join(name.split(".")[-2:]))
    if norms != {f"{FIRST}.weight", f"{SECOND}.weight"} or layout.experts:
        raise FamilyError(
            layout.where,
            "is not made of RMS norms, each before an attention or a dense FFN",
            found=", ".join(sorted(norms)) or "no norm",
            fix="leave out the method slicegpt",
        )


def sliced_parameters(layout: Layout, size: int) -> int:
    """Return the parameters of the sliced model, its matrices between the blocks included.

    Norms are folded into the matrices after them. An embedding that was the head as well becomes
    two matrices, for the head is not sliced.
    """
    full, count = hidden_size(layout), layout.num_hidden_layers
    embedding = layout.vocab_size * size + layout.vocab_size * full
    inner = 0
    for index, layer in enumerate(layout.of_layer):
        for ref in layer.values():
            slot = layout.roles[ref.name].slot
            norm = slot.group == "norms" and ref.shape == (full,)
            whole = len(ref.shape) < 2 or (slot.ffn_output and index == count - 1)
            inner += 0 if norm else ref.parameters if whole else ref.parameters * size // full
    between = count * 2 * size**2 + size * (full - size)
    return embedding + inner + between


class SlicedTrial(Trial):
    """Runs held-out text through the sliced model, and calibration text, whose axes are taken."""

    def __init__(
        self,
        variant: Variant,
        heldout: Encoded,
        size: int,
        windows: Sequence[np.ndarray],
        asked: AskedTasks | None = None,
    ) -> None:
        """Prepare a trial that keeps ``size`` principal components of ``windows``."""
        super().__init__(variant, heldout, None, asked=asked)
        self._size = size
        self._text = Stream(windows)

    @property
    def streams(self) -> list[Stream]:
        """All streams that the trial runs itself."""
        return [*self.scored.values(), self._text]

    def run(self, decoder: StreamedDecoder, index: int) -> None:
        """Run all text through a layer whose two blocks read projected inputs."""
        layer = decoder.layer(index)
        norm = layer.get_submodule(SECOND)
        if index == 0:
            self._check_residual(decoder, norm)
        first = _Covariance()
        first.add(self._text.states.before)
        with _projected(layer, first.projection(self._size, decoder)):
            second = _Covariance()
            with _seen(norm, second.add):
                for _ in decoder.peek(index, self._text):
                    pass
            with _seen(norm, _in_place(second.projection(self._size, decoder))):
                self.run_scored(decoder, index, {})
                decoder.run(index, self._text)

    def _check_residual(self, decoder: StreamedDecoder, norm: nn.Module) -> None:
        """Refuse a layer that does not add to what its second norm reads.

        The projection of the norm's input is to be that of the residual stream, too. Without that
        input, all tokens must leave the layer alike.
        """
        with _seen(norm, torch.Tensor.zero_):
            after = next(iter(decoder.peek(0, self._text))).after
        if not torch.allclose(after, after[:1].expand_as(after)):
            raise FamilyError(
                decoder.layout.where,
                "has a residual stream that does not pass its second norm",
                fix="leave out the method slicegpt",
            )


class _Covariance:
    """Σ x xᵀ over hidden states x, in float64."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, states: torch.Tensor) -> None:
        """Add ``states`` ``(…, D)``."""
        for rows in states.flatten(0, -2).split(ROWS):
            product = (rows.float().T @ rows.float()).double().cpu()
            self._sum = product if self._sum is None else self._sum + product

    def projection(self, size: int, decoder: StreamedDecoder) -> torch.Tensor:
        """Return U Uᵀ ``[D, D]`` of the ``size`` first principal axes U, for the device."""
        assert self._sum is not None
        _, axes = torch.linalg.eigh(self._sum)
        kept = axes[:, -size:]
        return (kept @ kept.T).to(decoder.reader.device, decoder.reader.dtype)


@contextmanager
def _seen(module: nn.Module, see: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Call ``see`` with each input of a module until the block ends."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _in_place(projection: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """Return a function that projects hidden states, and so the residual stream, in place."""
    return lambda states: states.copy_(states @ projection)


@contextmanager
def _projected(layer: nn.Module, projection: torch.Tensor) -> Iterator[None]:
    """Project the hidden states that a layer gets until the block ends."""

    def project(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] @ projection, *inputs[1:])

    handle = layer.register_forward_pre_hook(project)
    try:
        yield
    finally:
        handle.remove()
