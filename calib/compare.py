"""Methods side by side at the same targets: the same text, the same windows, the same pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.search import Progress
from calib.study import Recipe, Study
from surgery.budget import Sizes
from surgery.candidates import coarse
from surgery.comparison import FFN_CRITERIA, Row


@dataclass(frozen=True)
class Target:
    """One ratio and the sizes that meet it."""

    ratio: float
    pairs: Sequence[Sizes]
    """By V'; the last has the largest vocabulary, whole where that is within reach."""


def compare(
    study: Study, targets: Sequence[Target], methods: Sequence[str], progress: Progress
) -> dict[float, list[Row]]:
    """Try ``methods`` at each target, a pass for each.

    ``compact`` is the paper's method at the best of the pairs, its text cut by the source's own
    tokenizer; ``search`` is this tool's: text as the pruned tokenizer cuts it, down_proj refitted,
    and the best pair.

    Returns:
        Ratio → rows, one for each method.
    """
    found = {}
    for target in targets:
        recipes = [recipe for method in methods for recipe in _recipes(method, target)]
        with progress(study.windows(len(recipes))) as advance:
            rows = study.rows(recipes, advance)
        found[target.ratio] = [
            min((row for row in rows if row.name == method), key=lambda row: row.score)
            for method in methods
            if any(row.name == method for row in rows)
        ]
    return found


def _recipes(method: str, target: Target) -> list[Recipe]:
    """What stands for a method: several of one name, of which the best counts."""
    pairs = coarse(target.pairs, target.pairs[0])
    if method in FFN_CRITERIA:
        return [Recipe(method, pairs[-1], method, retokenize=False)]
    if method == "vocabulary":
        return [Recipe(method, pairs[0])]
    if method == "compact":
        return [Recipe(method, sizes, retokenize=False) for sizes in pairs]
    return [Recipe(method, sizes, repair=True) for sizes in pairs]


def by_samples(
    study: Study, recipe: Recipe, counts: Sequence[int], progress: Progress
) -> dict[int, Row]:
    """Try one recipe with so many windows of calibration text each (paper figure 3)."""
    recipes = [replace(recipe, name=str(count), samples=count) for count in counts]
    with progress(study.windows(len(recipes))) as advance:
        return dict(zip(counts, study.rows(recipes, advance), strict=True))
