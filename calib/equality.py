"""verify --forward: a pruned model's logits against the dense model with the same cuts masked."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from calib.batches import Stream
from calib.collapsed import Collapsed
from calib.decoder import StreamedDecoder
from calib.down import Place, cut_weight, down_name, file_matrices, watched_tensors
from calib.weights import WeightReader
from surgery.edits import kept_channels, layer_groups
from surgery.family import renumbered
from surgery.layout import Layout
from surgery.plan import Plan

WINDOWS = 4
TOKENS = 64
TOLERANCE = 1e-4
"""Relative to the largest logit, in fp32."""


@dataclass(frozen=True)
class Equality:
    """How far two models are apart on the same tokens."""

    tokens: int
    largest: float
    """max |difference| / max |logit|."""

    @property
    def ok(self) -> bool:
        """Whether the difference is rounding."""
        return self.largest <= TOLERANCE


def compare_forward(plan: Plan, dense: Layout, pruned: Layout, device: torch.device) -> Equality:
    """Run seeded random kept tokens through both models in fp32 and compare their logits.

    The dense model has zeros in down_proj for the removed channels and is asked only for the
    logits of the kept tokens: what COMPACT's cut means (paper Algorithm 1). Where the plan
    replaces tensors or makes bf16 of FP8, so does the dense model. Layers that go are passed by;
    several that become one take three layers' memory.
    """
    ids = plan.ids()
    kept = ids.kept
    chosen = np.random.default_rng(0).integers(0, len(kept), (WINDOWS, TOKENS))
    fp8 = torch.bfloat16 if plan.dequantize else None
    cuts = _Cuts(plan, dense)
    with WeightReader(dense.checkpoint, device, torch.float32, dequantize=fp8) as reader:
        expected = _logits(StreamedDecoder(dense, reader), kept[chosen], kept, cuts.run)
    with WeightReader(pruned.checkpoint, device, torch.float32) as reader:
        found = _logits(StreamedDecoder(pruned, reader), chosen, np.arange(len(kept)))
    difference = (expected - found).abs().max() / expected.abs().max()
    return Equality(chosen.size, float(difference))


class _Cuts:
    """The dense model's layers as the plan leaves them: zero columns for channels that go."""

    def __init__(self, plan: Plan, dense: Layout) -> None:
        self._layout = dense
        self._groups = layer_groups(plan, dense)
        self._kept = kept_channels(plan, dense)
        self._refs = plan.replaced.refs() if plan.replaced else {}
        self._collapsed: Collapsed | None = None

    def run(self, decoder: StreamedDecoder, index: int, stream: Stream) -> None:
        """Carry ``stream`` through a layer; past it, if it goes, or becomes one with another."""
        number = next((n for n, group in enumerate(self._groups) if index in group), None)
        if number is None:
            return
        first, last = self._groups[number][0], self._groups[number][-1]
        layer = decoder.layer(index)
        if first != last:
            if index == first:
                self._collapsed = Collapsed(layer, decoder.dtypes(index))
            assert self._collapsed is not None
            layer = self._collapsed.layer
            if index != first:
                self._collapsed.add(decoder.layer(index))
            if index == last:
                self._collapsed.round()
                self._collapsed = None
        if index == last:
            weights = self._weights(decoder, first, number, layer)
            decoder.run(first, stream, weights=weights, layer=layer)

    def _weights(
        self, decoder: StreamedDecoder, index: int, number: int, layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """The parameters of ``layer``, the output's ``number``, that channels are cut from."""
        replaced: dict[Place, torch.Tensor] = {}
        for name in watched_tensors(self._layout, index):
            ref = self._refs.get(renumbered(name, number))
            if ref is not None:
                with safe_open(ref.path, framework="pt") as file:
                    replaced |= file_matrices(self._layout, name, file.get_tensor(ref.name))
        kept = self._kept[number]
        return {
            down_name(unit): cut_weight(layer, unit, kept[unit.axis], replaced)
            for unit in decoder.units(index)
            if unit.axis in kept
        }


def _logits(
    decoder: StreamedDecoder,
    windows: np.ndarray,
    rows: np.ndarray,
    run: Callable[[StreamedDecoder, int, Stream], object] = StreamedDecoder.run,
) -> torch.Tensor:
    """Logits ``(windows, tokens, len(rows))`` in fp32, on the CPU."""
    stream = Stream(list(windows))
    decoder.embed([stream])
    for index in decoder.layers():
        run(decoder, index, stream)
    hidden = stream.batches[0].hidden
    blocks = [block.cpu() for _, _, block in decoder.logits([(hidden, rows)])]
    return torch.cat(blocks, dim=-1)
