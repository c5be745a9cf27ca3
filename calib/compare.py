"""Methods side by side at the same targets: the same text, the same windows, the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.laco import collapse_layers
from calib.reading import ALONG_PREFIX, LAYERWISE
from calib.search import Progress
from calib.study import Recipe, Study
from surgery.budget import Sizes, whole
from surgery.candidates import coarse
from surgery.comparison import FFN_CRITERIA, Row
from surgery.depth import layers_by_influence

LACO_WINDOWS, LACO_TOKENS = 8, 64
"""Of calibration text, by which LaCo judges a collapse; the paper takes ten sentences."""


@dataclass(frozen=True)
class Target:
    """One ratio and the sizes that meet it."""

    ratio: float
    pairs: Sequence[Sizes]
    """By V'; the last has the largest vocabulary, whole where that is within reach."""


def compare(
    study: Study, targets: Sequence[Target], methods: Sequence[str], progress: Progress
) -> dict[float, list[Row]]:
    """Try ``methods`` at each target, in two passes each; LaCo takes as many as it collapses.

    ``compact`` is the paper's method at the best of the pairs, its text cut by the source's own
    tokenizer; ``search`` is this tool's: text as the pruned tokenizer cuts it, the pair that is
    best when each layer is refitted by itself, then refitted along the pruned prefix.

    Returns:
        Ratio → rows, one for each method, in their order.
    """
    found = {}
    for target in targets:
        first = [recipe for method in methods for recipe in _recipes(method, target)]
        best = _best(study, first, progress)
        second = [_again(study, method, target, best) for method in methods]
        rows = {name: row for name, (_, row) in best.items()}
        later = [recipe for recipe in second if recipe is not None]
        if later:
            with progress(study.windows(len(later))) as advance:
                rows |= {row.name: row for row in study.rows(later, advance)}
        found[target.ratio] = [rows[method] for method in methods]
    return found


def _best(
    study: Study, recipes: Sequence[Recipe], progress: Progress
) -> dict[str, tuple[Recipe, Row]]:
    """Try recipes; of those of one name keep the best."""
    found: dict[str, tuple[Recipe, Row]] = {}
    with progress(study.windows(len(recipes))) as advance:
        for recipe, row in zip(recipes, study.rows(recipes, advance), strict=True):
            if row.name not in found or row.score < found[row.name][1].score:
                found[row.name] = recipe, row
    return found


def _recipes(method: str, target: Target) -> list[Recipe]:
    """What of a method is tried in the first pass: several of one name, of which one counts."""
    pairs = coarse(target.pairs, target.pairs[0])
    if method in FFN_CRITERIA:
        return [Recipe(method, pairs[-1], method, retokenize=False)]
    if method == "vocabulary":
        return [Recipe(method, pairs[0])]
    if method == "compact":
        return [Recipe(method, sizes, retokenize=False) for sizes in pairs]
    if method == "search":
        return [Recipe(method, sizes, repair=LAYERWISE) for sizes in pairs]
    return [Recipe("act2", pairs[-1], "act2", retokenize=False)]  # block influence comes with it


def _again(
    study: Study, method: str, target: Target, best: dict[str, tuple[Recipe, Row]]
) -> Recipe | None:
    """What of a method is tried in the second pass, with what the first has shown."""
    if method == "search":
        return replace(best[method][0], repair=ALONG_PREFIX)
    layout = study.material.layout
    if method == "shortgpt":
        assert study.block_influence is not None
        groups = layers_by_influence(study.block_influence, _depth(study, target))
        return Recipe(method, replace(whole(layout), layers=groups))
    if method == "laco":
        reading = study.material.reading(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in reading.streams[0].windows]
        groups = collapse_layers(
            layout, windows, _depth(study, target), device=study.device, dtype=study.dtype
        )
        return Recipe(method, replace(whole(layout), layers=groups))
    return None


def _depth(study: Study, target: Target) -> int:
    """Layers that are left when whole ones are to meet the ratio, as nearly as they can."""
    layout = study.material.layout
    count = layout.num_hidden_layers
    full, one = (
        each.parameters(layout.vocab_size, layout.widths)
        for each in (layout, layout.with_layers([[0]]))
    )
    return max(1, count - round(target.ratio * full / ((full - one) / (count - 1))))


def by_samples(
    study: Study, recipe: Recipe, counts: Sequence[int], progress: Progress
) -> dict[int, Row]:
    """Try one recipe with so many windows of calibration text each (paper figure 3)."""
    recipes = [replace(recipe, name=str(count), samples=count) for count in counts]
    with progress(study.windows(len(recipes))) as advance:
        return dict(zip(counts, study.rows(recipes, advance), strict=True))
