"""The best split of a target between vocabulary and FFN, by trying it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.study import Recipe, Study
from surgery.budget import Sizes, pairs_at
from surgery.candidates import MOST, coarse, fine, parse_candidates
from surgery.choices import SizeChoice, allowed_steps, main_width
from surgery.comparison import Row, plot_pairs, table
from surgery.progress import Progress, stage


@dataclass(frozen=True)
class SearchResult:
    """The pairs that a search has tried."""

    rows: Sequence[Row]
    """One for each pair, by V'."""
    best: Sizes
    """Of the best score."""

    def table(self) -> str:
        """The rows as text for people; the best score is marked."""
        return table(self.rows)

    def plot(self, path: Path) -> None:
        """Draw the loss of each pair over its V'."""
        plot_pairs(self.rows, path)


def search_pairs(
    study: Study,
    choice: SizeChoice,
    candidates: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Try the pairs that meet the ratio asked for, or ``candidates`` such as "32768:864,…".

    Raises:
        BudgetError: the ratio is out of reach, or the candidates are no sizes of the model.
    """
    layout, asked = study.material.layout, choice.request
    if candidates is None:
        steps = allowed_steps(layout, asked.sizes)
        pairs = pairs_at(layout, asked.sizes.ratio or 0.0, choice.rarity.must_keep, steps)
    else:
        pairs = parse_candidates(candidates, layout, main_width(layout))
    repair = asked.channels.repair != "none"
    like = Recipe("", choice.sizes, asked.channels.criterion, repair=repair)
    found = try_pairs(study, pairs, like, MOST if candidates is None else len(pairs), progress)
    return replace(found, best=replace(found.best, dequantize=asked.sizes.dequantize))


def try_pairs(
    study: Study,
    pairs: Sequence[Sizes],
    like: Recipe,
    most: int = MOST,
    progress: Progress | None = None,
) -> SearchResult:
    """Try ``pairs`` coarse to fine, in two passes at most.

    Args:
        study: The text, and what was tried on it.
        pairs: All that meet the target, by V'.
        like: How each is made; its own sizes are tried in any case if they are among the pairs.
        most: Pairs in a pass.
        progress: Called with "search", windows × layers of a pass, and all of it.
    """

    def attempt(chosen: Sequence[Sizes]) -> list[tuple[Row, Sizes]]:
        recipes = [replace(like, name=_name(sizes), sizes=sizes) for sizes in chosen]
        advance = stage(progress, "search", study.windows(len(recipes)))
        return list(zip(study.rows(recipes, advance), chosen, strict=True))

    first = coarse(pairs, like.sizes, most)
    tried = attempt(first)
    if second := fine(pairs, first, _best(tried), most):
        tried += attempt(second)
    rows = sorted((row for row, _ in tried), key=lambda row: row.vocab_size)
    return SearchResult(rows, _best(tried))


def _best(tried: Sequence[tuple[Row, Sizes]]) -> Sizes:
    return min(tried, key=lambda pair: pair[0].score)[1]


def _name(sizes: Sizes) -> str:
    return ":".join(map(str, (sizes.vocab_size, *sizes.widths.values())))
