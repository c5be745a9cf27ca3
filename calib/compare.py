"""Methods side by side at the same targets: the same text, the same windows, the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.laco import collapse_layers
from calib.reading import ALONG_PREFIX, LAYERWISE
from calib.search import FINALISTS, Progress
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
    tokenizer; ``search`` is this tool's: text as the pruned tokenizer cuts it, of the pairs that
    are best when each layer is refitted by itself the best refitted along the pruned prefix.

    Returns:
        Ratio → rows, one for each method, in their order.
    """
    found = {}
    for target in targets:
        first = [recipe for method in methods for recipe in _recipes(method, target)]
        tried = _by_name(study, first, progress)
        second = [recipe for method in methods for recipe in _again(study, method, target, tried)]
        tried |= _by_name(study, second, progress) if second else {}
        found[target.ratio] = [tried[method][0][1] for method in methods]
    return found


Tried = dict[str, list[tuple[Recipe, Row]]]
"""Method → what was tried of it, the best score first."""


def _by_name(study: Study, recipes: Sequence[Recipe], progress: Progress) -> Tried:
    found: Tried = {}
    with progress(study.windows(len(recipes))) as advance:
        for recipe, row in zip(recipes, study.rows(recipes, advance), strict=True):
            found.setdefault(row.name, []).append((recipe, row))
    return {name: sorted(pairs, key=lambda pair: pair[1].score) for name, pairs in found.items()}


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


def _again(study: Study, method: str, target: Target, tried: Tried) -> list[Recipe]:
    """What of a method is tried in the second pass, with what the first has shown."""
    if method == "search":
        best = tried[method][:FINALISTS]
        return [replace(recipe, repair=ALONG_PREFIX) for recipe, _ in best]
    layout = study.material.layout
    if method == "shortgpt":
        assert study.block_influence is not None
        groups = layers_by_influence(study.block_influence, _depth(study, target))
    elif method == "laco":
        reading = study.material.reading(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in reading.streams[0].windows]
        groups = collapse_layers(
            layout, windows, _depth(study, target), device=study.device, dtype=study.dtype
        )
    else:
        return []
    return [Recipe(method, replace(whole(layout), layers=groups))]


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
