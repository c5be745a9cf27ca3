"""Methods side by side at the same targets: the same text, the same windows, the same passes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calib.study.laco import collapse_layers
from calib.study.search import coarse
from calib.study.study import Recipe, Study
from calib.study.table import FFN_CRITERIA, LAYER_METHODS, METHODS, Row
from surgery.errors import DataError, SurgeryError
from surgery.layout.layout import Layout
from surgery.planning.layers import check_layers, layers_by_influence
from surgery.planning.sizes import Sizes, Steps, pairs_at, split, whole
from surgery.process import Progress, stage

LOG = logging.getLogger(__name__)

LACO_WINDOWS, LACO_TOKENS = 8, 64
"""Of calibration text, by which LaCo judges a collapse; the paper takes ten sentences."""


@dataclass(frozen=True)
class RatioTarget:
    """One ratio and the sizes that meet it."""

    ratio: float
    pairs: Sequence[Sizes]
    """By V'; the last has the largest vocabulary, whole where that is within reach."""


def usable_methods(layout: Layout) -> list[str]:
    """All methods that there are for this model; the log says which are left out, and why."""
    try:
        check_layers(layout, [[layer] for layer in range(1, layout.num_hidden_layers)])
    except SurgeryError as error:
        LOG.info("note: without %s: %s", " and ".join(LAYER_METHODS), error)
        return [method for method in METHODS if method not in LAYER_METHODS]
    return list(METHODS)


def check_methods(layout: Layout, methods: Sequence[str]) -> None:
    """Refuse methods that are not known, or that this model does not allow.

    Raises:
        DataError: naming the first unknown one.
        BudgetError, FamilyError: its layers cannot go.
    """
    for method in methods:
        if method not in METHODS:
            raise DataError(
                "`methods`",
                f"no method {method}",
                expected=f"some of {', '.join(METHODS)}",
                fix="correct it",
            )
    if {*methods} & {*LAYER_METHODS}:
        check_layers(layout, [[layer] for layer in range(1, layout.num_hidden_layers)])


def compare_methods(
    study: Study,
    steps: Steps,
    ratios: Sequence[float],
    methods: Sequence[str],
    progress: Progress | None = None,
) -> dict[float, list[Row]]:
    """Try ``methods`` at each ratio, in two passes each; LaCo takes as many as it collapses.

    ``compact`` is the paper's method at the best of the pairs, its text tokenized by the source's
    own tokenizer; ``search`` is this tool's: text as the pruned tokenizer tokenizes it, down_proj
    refitted.

    Returns:
        Ratio → rows, one for each method, in their order.
    """
    found = {}
    layout, smallest = study.text.layout, study.text.rarity.must_keep
    for ratio in ratios:
        target = RatioTarget(ratio, pairs_at(layout, ratio, smallest, steps))
        first = [recipe for method in methods for recipe in _recipes(method, target)]
        best = _try(study, first, progress)
        fewer = [_fewer_layers(study, m, target) for m in methods if m in LAYER_METHODS]
        best |= _try(study, fewer, progress) if fewer else {}
        found[ratio] = [best[method] for method in methods]
    return found


def compare_samples(
    study: Study,
    steps: Steps,
    ratio: float,
    counts: Sequence[int],
    progress: Progress | None = None,
) -> dict[int, Row]:
    """Try the paper's method at the rule of thumb's pair, on so many windows each (figure 3)."""
    layout, smallest = study.text.layout, study.text.rarity.must_keep
    recipe = Recipe("compact", split(layout, ratio, smallest, steps), retokenize=False)
    recipes = [replace(recipe, name=str(count), samples=count) for count in counts]
    advance = stage(progress, "compare", study.windows(len(recipes)))
    return dict(zip(counts, study.rows(recipes, advance), strict=True))


def _try(study: Study, recipes: Sequence[Recipe], progress: Progress | None) -> dict[str, Row]:
    """The row with the best score of each name."""
    found: dict[str, Row] = {}
    advance = stage(progress, "compare", study.windows(len(recipes)))
    for row in study.rows(recipes, advance):
        found[row.name] = min(found.get(row.name, row), row, key=lambda each: each.score)
    return found


def _recipes(method: str, target: RatioTarget) -> list[Recipe]:
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


def _fewer_layers(study: Study, method: str, target: RatioTarget) -> Recipe:
    """What a method makes of the layers, once the first pass has shown their influence."""
    layout, depth = study.text.layout, _depth(study, target)
    if method == "shortgpt":
        assert study.block_influence is not None
        groups = layers_by_influence(study.block_influence, depth)
    else:
        reading = study.text.reading(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in reading.streams[0].windows]
        groups = collapse_layers(layout, windows, depth, study.settings)
    return Recipe(method, replace(whole(layout), layers=groups))


def _depth(study: Study, target: RatioTarget) -> int:
    """Layers that are left when whole ones are to meet the ratio, as nearly as they can."""
    layout = study.text.layout
    count = layout.num_hidden_layers
    full, one = (
        each.parameters(layout.vocab_size, layout.widths)
        for each in (layout, layout.with_layers([[0]]))
    )
    return max(1, count - round(target.ratio * full / ((full - one) / (count - 1))))
