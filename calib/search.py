"""The best split of a target between vocabulary and FFN, by trying it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

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
        The rows of all pairs tried, by V', and the pair with the best score.
    """

    def attempt(chosen: Sequence[Sizes]) -> list[tuple[Row, Sizes]]:
        recipes = [Recipe(_name(sizes), sizes, criterion, repair=repair) for sizes in chosen]
        with progress(study.windows(len(recipes))) as advance:
            return list(zip(study.rows(recipes, advance), chosen, strict=True))

    first = coarse(pairs, also, most)
    tried = attempt(first)
    if second := fine(pairs, first, _best(tried), most):
        tried += attempt(second)
    return sorted((row for row, _ in tried), key=lambda row: row.vocab_size), _best(tried)


def _best(tried: Sequence[tuple[Row, Sizes]]) -> Sizes:
    return min(tried, key=lambda pair: pair[0].score)[1]


def _name(sizes: Sizes) -> str:
    return ":".join(map(str, (sizes.vocab_size, *sizes.widths.values())))
