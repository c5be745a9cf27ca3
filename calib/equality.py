"""verify --forward: a pruned model's logits against the dense model with the same cuts masked."""

from dataclasses import dataclass

import numpy as np
import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder, Watch
from calib.tokens import Tokens
from calib.weights import WeightReader
from surgery.edits import kept_channels
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
    the logits of the kept tokens: what COMPACT's cut means (paper Algorithm 1). Where the plan
    makes bf16 of FP8, so does the dense model.
    """
    ids = plan.ids()
    kept = ids.kept
    chosen = np.random.default_rng(0).integers(0, len(kept), (WINDOWS, TOKENS))
    channels = kept_channels(plan, dense)

    def mask_channels(
        layer: int, axis: str, expert: int, _: Tokens, act: torch.Tensor
    ) -> torch.Tensor:
        stays = torch.from_numpy(channels[layer][axis][expert]).to(act.device)
        masked = torch.zeros_like(act)
        masked[:, stays] = act[:, stays]
        return masked

    def logits(layout: Layout, ids: np.ndarray, rows: np.ndarray, watch: Watch) -> torch.Tensor:
        fp8 = torch.bfloat16 if plan.dequantize else None
        with WeightReader(layout.checkpoint, device, torch.float32, dequantize=fp8) as reader:
            return _logits(StreamedDecoder(layout, reader), list(ids), rows, watch)

    expected = logits(dense, kept[chosen], kept, mask_channels)
    found = logits(pruned, chosen, np.arange(len(kept)), lambda *_: None)
    difference = (expected - found).abs().max() / expected.abs().max()
    return Equality(chosen.size, float(difference))


def _logits(
    decoder: StreamedDecoder, windows: list[np.ndarray], rows: np.ndarray, watch: Watch
) -> torch.Tensor:
    """Logits ``(windows, tokens, len(rows))`` in fp32, on the CPU."""
    stream = Stream(windows)
    decoder.embed([stream])
    decoder.run_layers([stream], watch)
    hidden = stream.batches[0].hidden
    blocks = [block.cpu() for _, _, block in decoder.logits([(hidden, rows)])]
    return torch.cat(blocks, dim=-1)
