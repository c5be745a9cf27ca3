"""Methods side by side at the same targets: the same text, the same windows, the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.laco import collapse_layers
from calib.search import Progress
from calib.study import Recipe, Study
from surgery.budget import Sizes, whole
from surgery.candidates import coarse
from surgery.comparison import FFN_CRITERIA, LAYER_METHODS, Row
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
    tokenizer; ``search`` is this tool's: text as the pruned tokenizer cuts it, down_proj refitted.

    Returns:
        Ratio → rows, one for each method, in their order.
    """
    found = {}
    for target in targets:
        first = [recipe for method in methods for recipe in _recipes(method, target)]
        best = _try(study, first, progress)
        fewer = [_fewer_layers(study, m, target) for m in methods if m in LAYER_METHODS]
        best |= _try(study, fewer, progress) if fewer else {}
        found[target.ratio] = [best[method] for method in methods]
    return found


def _try(study: Study, recipes: Sequence[Recipe], progress: Progress) -> dict[str, Row]:
    """The row with the best score of each name."""
    found: dict[str, Row] = {}
    with progress(study.windows(len(recipes))) as advance:
        for row in study.rows(recipes, advance):
            found[row.name] = min(found.get(row.name, row), row, key=lambda each: each.score)
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
        return [Recipe(method, sizes, repair=True) for sizes in pairs]
    return [Recipe("act2", pairs[-1], "act2", retokenize=False)]  # block influence comes with it


def _fewer_layers(study: Study, method: str, target: Target) -> Recipe:
    """What a method makes of the layers, once the first pass has shown their influence."""
    layout, depth = study.material.layout, _depth(study, target)
    if method == "shortgpt":
        assert study.block_influence is not None
        groups = layers_by_influence(study.block_influence, depth)
    else:
        reading = study.material.reading(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in reading.streams[0].windows]
        groups = collapse_layers(layout, windows, depth, device=study.device, dtype=study.dtype)
    return Recipe(method, replace(whole(layout), layers=groups))


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
