"""The best split of a target between vocabulary and FFN, by trying it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from calib.reading import ALONG_PREFIX, LAYERWISE
from calib.study import Recipe, Study
from surgery.budget import Sizes
from surgery.candidates import coarse, fine
from surgery.comparison import Row

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Given the windows × layers of a pass, a bar that is advanced by them."""

FINALISTS = 2
"""Pairs that are refitted along the pruned prefix, after all have been layer by layer.

That takes three times as much, and helps pairs with fewer channels more.
"""


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
    """Try ``pairs`` coarse to fine, in two passes at most.

    Args:
        study: The text, and what was tried on it.
        pairs: All that meet the target, by V'.
        also: A pair that is tried in any case, if it is one of them: the rule of thumb's.
        most: Pairs in a pass.
        criterion: By which channels are chosen.
        repair: Whether down_proj is refitted in each.
        progress: Makes a bar for each pass.

    Returns:
        The rows of all pairs tried, by V', those of the second pass named; and the best pair: with
        the best score, among those that were tried in the second pass where that refits otherwise.
    """
    first = coarse(pairs, also, most)
    tried = [(_recipe(sizes, criterion, LAYERWISE if repair else ""), sizes) for sizes in first]
    rows = _try(study, tried, progress)
    order = sorted(range(len(rows)), key=lambda place: rows[place].score)
    second = fine(pairs, first, first[order[0]], most)
    if repair:
        second = [*second, *(first[place] for place in order[:FINALISTS])]
    if not second:
        return rows, first[order[0]]
    final = [(_recipe(sizes, criterion, ALONG_PREFIX if repair else ""), sizes) for sizes in second]
    rows_again = _try(study, final, progress)
    judged = list(zip(rows_again, second, strict=True))
    if not repair:
        judged += zip(rows, first, strict=True)
    best = min(judged, key=lambda pair: pair[0].score)[1]
    return sorted([*rows, *rows_again], key=lambda row: row.vocab_size), best


def _try(study: Study, recipes: Sequence[tuple[Recipe, Sizes]], progress: Progress) -> list[Row]:
    with progress(study.windows(len(recipes))) as advance:
        return study.rows([recipe for recipe, _ in recipes], advance)


def _recipe(sizes: Sizes, criterion: str, repair: str) -> Recipe:
    name = ":".join(map(str, (sizes.vocab_size, *sizes.widths.values())))
    kind = {"": "", LAYERWISE: ", refitted", ALONG_PREFIX: ", refitted in turn"}[repair]
    return Recipe(name + kind, sizes, criterion, retokenize=True, repair=repair)
