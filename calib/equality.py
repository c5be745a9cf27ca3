"""verify --forward: a pruned model's logits against the dense model with the same cuts masked."""

from dataclasses import dataclass

import numpy as np
import torch

from calib.decoder import StreamedDecoder, Watch
from calib.weights import WeightReader
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

    The dense model has the removed channels set to zero before down_proj and is asked only for
    the logits of the kept tokens: what COMPACT's cut means (paper Algorithm 1).
    """
    ids = plan.ids()
    kept = ids.kept
    chosen = np.random.default_rng(0).integers(0, len(kept), (WINDOWS, TOKENS))
    masks = []
    for layer in range(dense.num_hidden_layers):
        mask = torch.zeros(dense.intermediate_size, device=device)
        mask[torch.from_numpy(plan.channels(layer)).to(device)] = 1
        masks.append(mask)

    def mask_channels(layer: int, _: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
        return act * masks[layer]

    expected = _logits(dense, list(kept[chosen]), kept, mask_channels, device)
    found = _logits(pruned, list(chosen), np.arange(len(kept)), lambda *_: None, device)
    difference = (expected - found).abs().max() / expected.abs().max()
    return Equality(chosen.size, float(difference))


def _logits(
    layout: Layout, windows: list[np.ndarray], rows: np.ndarray, watch: Watch, device: torch.device
) -> torch.Tensor:
    """Logits ``(windows, tokens, len(rows))`` in fp32, on the CPU."""
    with WeightReader(layout.checkpoint, device, torch.float32) as reader:
        decoder = StreamedDecoder(layout, reader)
        batches = decoder.embed(windows)
        decoder.run_layers(batches, watch)
        blocks = [block.cpu() for _, _, block in decoder.logits([batches[0].hidden], rows)]
    return torch.cat(blocks, dim=-1)
