"""From a target ratio to the two sizes (V', I')."""

from dataclasses import dataclass

import numpy as np

from surgery.errors import BudgetError
from surgery.families import FFN, VOCAB
from surgery.layout import Layout

MULTIPLE_OF = 128
"""Engines want sizes that divide evenly over tiles and devices."""

TOLERANCE = 0.005
"""How far, in parts of all parameters, the reached ratio may lie from the target."""

CANDIDATE_RATIOS = (0.1, 0.2, 0.35, 0.5)
"""Targets for which a calibration that was told no sizes is exact."""

VOCAB_CAP = 2 / 3
CAP_PER_SHARE = 3.75
"""The rule, fitted to the sweep-found pairs of the paper's Table 8 (see ``vocabulary_first``)."""


@dataclass(frozen=True)
class Sizes:
    """The two knobs."""

    vocab_size: int
    """V': rows of the embedding."""
    intermediate_size: int
    """I': channels per layer."""


def check_sizes(layout: Layout, sizes: Sizes) -> None:
    """Refuse an intermediate size that the model does not have; V' is the vocabulary's to check.

    Raises:
        BudgetError: I' above I or below 1.
    """
    if not 1 <= sizes.intermediate_size <= layout.intermediate_size:
        raise BudgetError(
            "--intermediate-size",
            "is out of reach",
            expected=f"1 to {layout.intermediate_size} (the source's channels)",
            found=sizes.intermediate_size,
            fix="choose a size in this range",
        )


def vocabulary_first(layout: Layout, removed: float) -> float:
    """How many of ``removed`` parameters to take from the vocabulary.

    Table 8's sweeps cut the vocabulary first, up to a share of it that grows with what the
    vocabulary weighs in the model: about two thirds where it holds a fifth or more of the
    parameters (0.5B and 1B), 47 % at 13 % (8B), 13 % at 3 % (70B). So the cap is
    ``min(2/3, 3.75 · vocabulary's share)`` of the vocabulary; the rest comes from the channels.
    """
    total = layout.parameters(layout.vocab_size, layout.intermediate_size)
    vocabulary = layout.vocab_size * layout.axis_cost(VOCAB)
    return min(removed, min(VOCAB_CAP, CAP_PER_SHARE * vocabulary / total) * vocabulary)


def split(layout: Layout, ratio: float, smallest_vocab: int) -> Sizes:
    """Choose (V', I') that remove ``ratio`` of all parameters, close to the rule's split.

    Every I' (a multiple of 128, or I itself) is paired with the V' that meets the target; of the
    pairs within ``TOLERANCE`` the one nearest to ``vocabulary_first`` wins.

    Args:
        layout: The source.
        ratio: Removed parameters over all parameters, tied embeddings counted once.
        smallest_vocab: Rows that have to stay.

    Raises:
        BudgetError: no pair of allowed sizes meets the target.
    """
    full = Sizes(layout.vocab_size, layout.intermediate_size)
    total = layout.parameters(full.vocab_size, full.intermediate_size)
    if not 0 < ratio < 1:
        raise BudgetError(
            "--ratio",
            "is no share of the parameters",
            expected="above 0, below 1",
            found=ratio,
            fix="choose one",
        )
    row, channel = layout.axis_cost(VOCAB), layout.axis_cost(FFN)
    target = vocabulary_first(layout, ratio * total)
    best: tuple[float, Sizes] | None = None
    for intermediate_size in _steps(1, full.intermediate_size):
        rest = ratio * total - (full.intermediate_size - intermediate_size) * channel
        vocab_size = _nearest(full.vocab_size - rest / row, smallest_vocab, full.vocab_size)
        removed = (full.vocab_size - vocab_size) * row
        distance = abs(removed - target)
        if abs(removed - rest) <= TOLERANCE * total and (best is None or distance < best[0]):
            best = (distance, Sizes(vocab_size, intermediate_size))
    if best is None:
        raise _unreachable(layout, ratio, smallest_vocab)
    return best[1]


def candidate_vocab_sizes(layout: Layout, smallest_vocab: int) -> list[int]:
    """V' of the usual ratios, ascending, V included: the statistics' default bucket edges."""
    sizes = {layout.vocab_size}
    for ratio in CANDIDATE_RATIOS:
        try:
            sizes.add(split(layout, ratio, smallest_vocab).vocab_size)
        except BudgetError:
            continue
    return sorted(sizes)


def _steps(low: int, high: int) -> list[int]:
    first = -(-low // MULTIPLE_OF) * MULTIPLE_OF
    return sorted({*range(first, high + 1, MULTIPLE_OF), high})


def _nearest(wanted: float, low: int, high: int) -> int:
    return min(_steps(low, high), key=lambda size: abs(size - wanted))


def _unreachable(layout: Layout, ratio: float, smallest_vocab: int) -> BudgetError:
    total = layout.parameters(layout.vocab_size, layout.intermediate_size)
    rows = layout.vocab_size - np.array(_steps(smallest_vocab, layout.vocab_size))
    channels = layout.intermediate_size - np.array(_steps(1, layout.intermediate_size))
    removed = np.add.outer(rows * layout.axis_cost(VOCAB), channels * layout.axis_cost(FFN)) / total
    nearest = removed.flat[np.argmin(np.abs(removed - ratio))]
    return BudgetError(
        "--ratio",
        f"no sizes in steps of {MULTIPLE_OF} meet it",
        expected=f"at most {removed.max():.4f}; nearest is {nearest:.4f}",
        found=ratio,
        fix="choose another ratio, or give --vocab-size and --intermediate-size",
    )
