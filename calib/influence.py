"""How much a layer turns the residual stream: ShortGPT's block influence (arXiv 2403.03853)."""

import torch

from calib.sums import CHUNK_VALUES

CACHED_VALUES = 1 << 16
"""Of states in float64 at a time on a CPU: in the cache, half the time of a whole micro-batch."""


def cosine_sum(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return Σ cos(x_in, x_out) over the tokens of states ``(windows, tokens, D)``.

    Each cosine is computed in float64 where the device has it, some tokens at a time; a state that
    is zero has no direction and counts 0.
    """
    wide = torch.float32 if before.device.type == "mps" else torch.float64
    values = CACHED_VALUES if before.device.type == "cpu" else CHUNK_VALUES
    rows = max(1, values // before.shape[-1])
    total = 0.0
    for one, other in zip(
        before.flatten(0, -2).split(rows), after.flatten(0, -2).split(rows), strict=True
    ):
        one, other = one.to(wide), other.to(wide)
        lengths = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
        dots = torch.linalg.vecdot(one, other)
        cosines = torch.where(lengths > 0, dots / lengths, 0.0)
        total += float(cosines.cpu().double().sum())
    return total
