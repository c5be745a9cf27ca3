"""Plans that remove or merge layers, and what merging comes to."""

from collections.abc import Sequence
from pathlib import Path

import torch

from surgery.planning.plan import Plan
from surgery.planning.sizes import Sizes
from tests.support.plans import layout_of, plan_to, random_stats


def plan_of(
    source: Path, layers: Sequence[Sequence[int]], vocab_size: int = 512, share: float = 0.6
) -> Plan:
    layout = layout_of(source)
    widths = {key: max(1, round(share * size)) for key, size in layout.widths.items()}
    sizes = Sizes(vocab_size, widths, layers=layers)
    stats = random_stats(layout)
    return plan_to(layout, sizes, stats)


def merged_layers(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """W + Σ (W_k − W) in float32 by numpy, rounded once by torch."""
    first, *others = (part.float().numpy() for part in parts)
    total = first.copy()
    for other in others:
        total += other - first
    return torch.from_numpy(total).to(parts[0].dtype)
