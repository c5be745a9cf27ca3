"""Pairs (V', I') that meet one target: what a search tries, coarse to fine."""

from collections.abc import Sequence

import numpy as np

from surgery.budget import Sizes, check_sizes
from surgery.errors import BudgetError
from surgery.layout import Layout

MOST = 8
"""Pairs tried at a time; each costs a forward."""


def coarse(pairs: Sequence[Sizes], also: Sizes, most: int = MOST) -> list[Sizes]:
    """Return ``most`` of ``pairs`` at equal distances, both ends and ``also`` among them."""
    places = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)
    chosen = {int(place) for place in places}
    if also in pairs:
        chosen.add(pairs.index(also))
    return [pairs[place] for place in sorted(chosen)]


def fine(
    pairs: Sequence[Sizes], tried: Sequence[Sizes], best: Sizes, most: int = MOST
) -> list[Sizes]:
    """Return up to ``most`` pairs that were not tried, between the neighbours of ``best``."""
    place = tried.index(best)
    low = pairs.index(tried[place - 1]) if place else 0
    high = pairs.index(tried[place + 1]) if place + 1 < len(tried) else len(pairs) - 1
    between = [pair for pair in pairs[low : high + 1] if pair not in tried]
    return coarse(between, best, most) if between else []


def parse_candidates(text: str, layout: Layout, main_width: str) -> list[Sizes]:
    """Return the pairs in "V:I,V:I,…"; I' is that of ``main_width``, others shrink alike.

    Raises:
        BudgetError: not pairs of sizes that the model has.
    """
    found: list[Sizes] = []
    full = layout.widths[main_width]
    for part in text.split(","):
        vocab, _, width = part.partition(":")
        if not (vocab.isdecimal() and width.isdecimal() and len(part) < 20):
            raise BudgetError(
                "`candidates`",
                "are no pairs of sizes",
                expected="V:I,V:I,… such as 32768:864,24576:928",
                found=part[:40],
                fix="correct them",
            )
        share = int(width) / full
        widths = {key: max(1, round(share * size)) for key, size in layout.widths.items()}
        sizes = Sizes(int(vocab), widths | {main_width: int(width)})
        check_sizes(layout, sizes)
        if sizes not in found:
            found.append(sizes)
    return sorted(found, key=lambda sizes: sizes.vocab_size)
