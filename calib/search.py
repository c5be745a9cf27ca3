"""The best split of a target between vocabulary and FFN, by trying it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from calib.reading import LAYERWISE
from calib.study import Recipe, Study
from surgery.budget import Sizes
from surgery.candidates import coarse, fine
from surgery.comparison import Row

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Given the windows × layers of a pass, a bar that is advanced by them."""


def search(
    study: Study,
    pairs: Sequence[Sizes],
    also: Sizes,
    *,
    most: int,
    criterion: str,
    repair: bool,
    progress: Progress,
) -> tuple[list[Row], Sizes]:
    """Try ``pairs`` coarse to fine, in two passes at most, one where few pairs are all there are.

    Args:
        study: The text, and what was tried on it.
        pairs: All that meet the target, by V'.
        also: A pair that is tried in any case, if it is one of them: the rule of thumb's.
        most: Pairs in a pass.
        criterion: By which channels are chosen.
        repair: Whether down_proj is refitted in each.
        progress: Makes a bar for each pass.

    Returns:
        The rows of all pairs tried, by V', and the pair with the best score.
    """
    tried: list[Sizes] = []
    rows: list[Row] = []
    for chosen in _passes(pairs, also, most, tried, rows):
        recipes = [
            Recipe(_name(sizes), sizes, criterion, repair=LAYERWISE if repair else "")
            for sizes in chosen
        ]
        with progress(study.windows(len(recipes))) as advance:
            rows += study.rows(recipes, advance)
        tried += chosen
    order = sorted(range(len(rows)), key=lambda place: rows[place].vocab_size)
    return [rows[place] for place in order], _best(tried, rows)


def _passes(
    pairs: Sequence[Sizes],
    also: Sizes,
    most: int,
    tried: Sequence[Sizes],
    rows: Sequence[Row],
) -> Iterator[list[Sizes]]:
    first = coarse(pairs, also, most)
    yield first
    second = fine(pairs, first, _best(tried, rows), most)
    if second:
        yield second


def _best(tried: Sequence[Sizes], rows: Sequence[Row]) -> Sizes:
    return tried[min(range(len(rows)), key=lambda place: rows[place].score)]


def _name(sizes: Sizes) -> str:
    return ":".join(map(str, (sizes.vocab_size, *sizes.widths.values())))
