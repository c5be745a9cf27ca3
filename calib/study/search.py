"""Find the best split of a ratio between vocabulary and FFN by trying pairs, coarse to fine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calib.study.study import Candidate, Study
from calib.study.table import Row, legend, plot_pairs, table
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.planning.request import CutRequest, SizeChoice, allowed_steps, main_width
from surgery.planning.sizes import Sizes, check_sizes, pairs_at
from surgery.process import Progress, stage

MOST = 8
"""Pairs that are tried in one pass; each costs a forward pass."""


def coarse(pairs: Sequence[Sizes], also: Sizes, most: int = MOST) -> list[Sizes]:
    """Return ``most`` of ``pairs`` at equal distances, with both ends, and ``also``."""
    indices = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)
    chosen = {int(index) for index in indices}
    if also in pairs:
        chosen.add(pairs.index(also))
    return [pairs[index] for index in sorted(chosen)]


def fine(
    pairs: Sequence[Sizes], tried: Sequence[Sizes], best: Sizes, most: int = MOST
) -> list[Sizes]:
    """Return up to ``most`` untried pairs between the neighbours of ``best``."""
    index = tried.index(best)
    low = pairs.index(tried[index - 1]) if index else 0
    high = pairs.index(tried[index + 1]) if index + 1 < len(tried) else len(pairs) - 1
    between = [pair for pair in pairs[low : high + 1] if pair not in tried]
    return coarse(between, best, most) if between else []


def parse_candidates(text: str, layout: Layout, main_width: str) -> list[Sizes]:
    """Return the pairs in "V:I,V:I,…". I is the size of ``main_width``; other widths shrink alike.

    Raises:
        BudgetError: they are no pairs of sizes, or not within the model's sizes.
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


@dataclass(frozen=True)
class SearchResult:
    """The pairs that a search tried."""

    dense: Row
    """The model itself."""
    rows: Sequence[Row]
    """One for each pair, in order of V'."""
    best: Sizes
    """The pair with the best score."""

    def table(self) -> str:
        """Return the rows as text for people, with a legend; the best score is marked."""
        return f"{table([self.dense, *self.rows])}\n\n{legend(self.dense)}"

    def plot(self, path: Path) -> None:
        """Draw the loss of each pair over its V'."""
        plot_pairs(self.rows, path)


def candidates_request(request: CutRequest, candidates: str | None, layout: Layout) -> CutRequest:
    """Return the request with the sizes of the smallest of ``candidates``, if there are any.

    Raises:
        BudgetError: there are both a ratio and candidates, or neither; or these are not within the
            model's sizes.
    """
    sizes = request.sizes
    if (sizes.ratio is None) == (candidates is None):
        raise BudgetError(
            "`ratio`",
            "and `candidates` exclude each other" if candidates else "is not given",
            fix="give one of them" if candidates else "give one, such as 0.2, or `candidates`",
        )
    if candidates is None:
        return request
    first = parse_candidates(candidates, layout, main_width(layout))[0]
    sizes = replace(sizes, vocab_size=first.vocab_size, widths=first.widths)
    return replace(request, sizes=sizes)


def search_pairs(
    study: Study,
    choice: SizeChoice,
    candidates: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Try the pairs that meet the requested ratio, or ``candidates`` such as "32768:864,…".

    Raises:
        BudgetError: the ratio is out of reach, or the candidates are not within the model's sizes.
    """
    layout, asked = study.text.layout, choice.request
    if candidates is None:
        steps = allowed_steps(layout, asked.sizes)
        pairs = pairs_at(layout, asked.sizes.ratio or 0.0, choice.rarity.must_keep, steps)
    else:
        pairs = parse_candidates(candidates, layout, main_width(layout))
    repair = asked.channels.repair != "none"
    like = Candidate("", choice.sizes, asked.channels.criterion, repair=repair)
    found = try_pairs(study, pairs, like, MOST if candidates is None else len(pairs), progress)
    return replace(found, best=replace(found.best, dequantize=asked.sizes.dequantize))


def try_pairs(
    study: Study,
    pairs: Sequence[Sizes],
    like: Candidate,
    most: int = MOST,
    progress: Progress | None = None,
) -> SearchResult:
    """Try ``pairs`` coarse to fine, in two passes at most.

    Args:
        study: The text, and compute settings.
        pairs: All pairs that meet the target, in order of V'.
        like: How the channels are chosen. Its own sizes are tried too if they are among the pairs.
        most: Pairs in a pass.
        progress: Called with "search", finished windows × layers of a pass, and their total.
    """

    def attempt(chosen: Sequence[Sizes]) -> list[tuple[Row, Sizes]]:
        candidates = [replace(like, name=_name(sizes), sizes=sizes) for sizes in chosen]
        advance = stage(progress, "search", study.windows(len(candidates)))
        return list(zip(study.rows(candidates, advance), chosen, strict=True))

    first = coarse(pairs, like.sizes, most)
    tried = attempt(first)
    if second := fine(pairs, first, _best(tried), most):
        tried += attempt(second)
    rows = sorted((row for row, _ in tried), key=lambda row: row.vocab_size)
    return SearchResult(study.dense, rows, _best(tried))


def _best(tried: Sequence[tuple[Row, Sizes]]) -> Sizes:
    return min(tried, key=lambda pair: pair[0].score)[1]


def _name(sizes: Sizes) -> str:
    return ":".join(map(str, (sizes.vocab_size, *sizes.widths.values())))
