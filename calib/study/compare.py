"""Compare methods at the same ratios, on the same text and windows, in the same passes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from calib.scoring.score import check_predicts
from calib.study.laco import collapse_layers
from calib.study.residual import ResidualStream, StreamCut, check_hidden, check_rotate
from calib.study.search import coarse, expert_counts
from calib.study.slicegpt import check_sliced, sliced_size
from calib.study.study import Candidate, Study
from calib.study.table import (
    EXPERT_METHODS,
    FFN_CRITERIA,
    HIDDEN,
    LAYER_METHODS,
    METHODS,
    ROTATE,
    STREAM_METHODS,
    Row,
)
from calib.study.two_stage import (
    TwoStage,
    attentions_by_perplexity,
    check_two_stage,
    two_stage_sizes,
)
from surgery.errors import BudgetError, DataError, SurgeryError
from surgery.layout.layout import Layout
from surgery.planning.layers import check_layers, layers_by_influence
from surgery.planning.request import SizeRequest, experts_at
from surgery.planning.shapes import expert_choices
from surgery.planning.sizes import Sizes, Steps, check_ratio, sizes_at, split, whole
from surgery.process import Progress, stage

LOG = logging.getLogger(__name__)

LACO_WINDOWS, LACO_TOKENS = 8, 64
"""Calibration text by which LaCo judges a collapse; the paper takes ten sentences."""


@dataclass(frozen=True)
class RatioTarget:
    """A ratio, and the sizes that meet it."""

    ratio: float
    pairs: Sequence[Sizes]
    """In order of V'. The last has the largest V', which is V if the ratio allows that."""
    searched: Sequence[Sizes]
    """Those that a search would try first; of a mixture they have several E'."""
    usual: Sizes
    """Those of the rule of thumb."""
    fewer_experts: Sizes
    """Whole but for the experts; nearest to the ratio."""
    two_stage: TwoStage | None = None
    """Those of 2SSP, where that is tried."""
    slice_to: int = 0
    """Columns that SliceGPT keeps, where that is tried."""
    streams: Mapping[str, StreamCut] = field(default_factory=dict)
    """Method → what it keeps of the residual stream, of those that are tried."""


def usable_methods(layout: Layout) -> list[str]:
    """Return the methods that this model allows; log which are left out, and why."""
    found = list(METHODS)
    for names, check in CHECKS.items():
        try:
            check(layout)
        except SurgeryError as error:
            LOG.info("note: without %s: %s", " and ".join(names), error)
            found = [method for method in found if method not in names]
    return found


def check_methods(layout: Layout, methods: Sequence[str]) -> None:
    """Refuse unknown methods, and methods that this model does not allow.

    Raises:
        DataError: a method is unknown.
        BudgetError, FamilyError: layers of this model cannot be removed, or it is not scored.
    """
    check_predicts(layout)
    known = [*METHODS, *EXPERT_METHODS, *STREAM_METHODS]
    for method in methods:
        if method not in known:
            raise DataError(
                "`methods`",
                f"no method {method}",
                expected=f"some of {', '.join(known)}",
                fix="correct it",
            )
    if not methods:
        raise DataError(
            "`methods`", "are none", expected=f"some of {', '.join(METHODS)}", fix="name one"
        )
    if {*methods} & {*EXPERT_METHODS}:
        expert_choices(layout)
    for names, check in CHECKS.items():
        if {*methods} & {*names}:
            check(layout)


def _check_fewer_layers(layout: Layout) -> None:
    """Refuse a model whose layers cannot be removed."""
    if layout.num_hidden_layers == 1:
        raise BudgetError(
            layout.where,
            "has one layer, which cannot be removed",
            fix="leave out the `methods` that remove layers",
        )
    check_layers(layout, [[layer] for layer in range(1, layout.num_hidden_layers)])


CHECKS: Mapping[tuple[str, ...], Callable[[Layout], object]] = {
    LAYER_METHODS: _check_fewer_layers,
    ("slicegpt",): check_sliced,
    ("2ssp",): check_two_stage,
    (ROTATE,): check_rotate,
    (HIDDEN,): check_hidden,
}
"""Methods → what refuses a model that does not allow them."""


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse to compare at no ratio, or at one that is no share.

    Raises:
        BudgetError: it names the option.
    """
    if not len(ratios):
        raise BudgetError("`ratio`", "is an empty list", expected="at least one", fix="name one")
    for ratio in ratios:
        check_ratio(ratio)


def compare_methods(
    study: Study,
    steps: Steps,
    ratios: Sequence[float],
    methods: Sequence[str],
    progress: Progress | None = None,
) -> dict[float, list[Row]]:
    """Try ``methods`` at each ratio, in two passes each; LaCo takes one more for each collapse.

    The second pass has the methods that follow from the first one. If the study has tasks, it has
    all methods, each at its best sizes, and they answer.

    Methods of experts remove whole experts alone, as near to the ratio as these come. ``compact``
    is the paper's method at the best of the pairs: the source's own tokenizer tokenizes the text.
    ``prune`` is what the command makes by default: the rule of thumb's pair, the pruned tokenizer
    tokenizes the text. ``search`` is this tool's best: of several pairs, or triples of a mixture,
    with down_proj refitted.

    Returns:
        Ratio → the dense model's row, then one row for each method, in their order.
    """
    found = {}
    layout, smallest = study.text.layout, study.text.rarity.must_keep
    for ratio in ratios:
        others = {*methods} - {*EXPERT_METHODS, *STREAM_METHODS}
        pairs = sizes_at(layout, ratio, smallest, steps) if others else []
        usual = split(layout, ratio, smallest, steps) if others else whole(layout)
        searched = list(pairs)
        if "search" in methods and layout.experts:
            counts = expert_counts(layout, SizeRequest())
            searched = sizes_at(layout, ratio, smallest, steps, experts=counts)
        experts = experts_at(layout, layout, ratio) if {*methods} & {*EXPERT_METHODS} else 0
        fewer_experts = replace(whole(layout), experts=experts)
        two_stage = two_stage_sizes(layout, ratio) if "2ssp" in methods else None
        slice_to = sliced_size(layout, ratio) if "slicegpt" in methods else 0
        cut = {*methods} & {*STREAM_METHODS}
        stream = ResidualStream.of(layout) if cut else None
        streams = {method: stream.cut(ratio, method) for method in cut} if stream else {}
        target = RatioTarget(
            ratio, pairs, coarse(searched), usual, fewer_experts, two_stage, slice_to, streams
        )
        first = [candidate for method in methods for candidate in _candidates(method, target)]
        best = _try(study, first, progress)
        last = [_fewer_layers(study, m, target) for m in methods if m in LAYER_METHODS]
        if two_stage is not None and two_stage.attentions:
            best["2ssp"] = _fewer_attentions(study, *best["2ssp"], two_stage.attentions)
            last += [] if study.tasks else [best["2ssp"][0]]
        if study.tasks:
            last = [*(best[m][0] for m in methods if m not in LAYER_METHODS), *last]
        best |= _try(study, last, progress, answers=bool(study.tasks)) if last else {}
        found[ratio] = [study.dense, *(best[method][1] for method in methods)]
    return found


def compare_samples(
    study: Study,
    steps: Steps,
    ratio: float,
    counts: Sequence[int],
    progress: Progress | None = None,
) -> list[Row]:
    """Try the paper's method at the rule of thumb's pair, for each number of windows (figure 3).

    Returns:
        The dense model's row, then one row for each number, which is its name.
    """
    layout, smallest = study.text.layout, study.text.rarity.must_keep
    candidate = Candidate("compact", split(layout, ratio, smallest, steps), retokenize=False)
    candidates = [replace(candidate, name=str(count), samples=count) for count in counts]
    advance = stage(progress, "compare", study.windows(len(candidates)))
    rows = study.rows(candidates, advance)
    return [study.dense, *rows]


def _try(
    study: Study,
    candidates: Sequence[Candidate],
    progress: Progress | None,
    *,
    answers: bool = False,
) -> dict[str, tuple[Candidate, Row]]:
    """Return the candidate with the best score for each name, and its row."""
    found: dict[str, tuple[Candidate, Row]] = {}
    advance = stage(progress, "compare", study.windows(len(candidates), answers=answers))
    rows = study.rows(candidates, advance, answers=answers)
    for pair in zip(candidates, rows, strict=True):
        name = pair[0].name
        found[name] = min(found.get(name, pair), pair, key=lambda each: each[1].score)
    return found


def _candidates(method: str, target: RatioTarget) -> list[Candidate]:
    """Return the first pass's candidates of a method; of several, the best one counts."""
    if method in EXPERT_METHODS:
        criterion = EXPERT_METHODS[method]
        sizes = target.fewer_experts
        return [Candidate(method, sizes, retokenize=False, expert_criterion=criterion)]
    pairs = coarse(target.pairs)
    if method in FFN_CRITERIA:
        return [Candidate(method, pairs[-1], method, retokenize=False)]
    if method == "vocabulary":
        return [Candidate(method, pairs[0])]
    if method == "2ssp" and target.two_stage is not None:
        return [Candidate(method, target.two_stage.sizes, "l2", retokenize=False)]
    if method == "slicegpt":
        return [
            Candidate(method, replace(target.fewer_experts, experts=0), slice_to=target.slice_to)
        ]
    if method in target.streams:
        return [
            Candidate(
                method, replace(target.fewer_experts, experts=0), stream=target.streams[method]
            )
        ]
    if method == "prune":
        return [Candidate(method, target.usual)]
    if method == "compact":
        return [Candidate(method, sizes, retokenize=False) for sizes in pairs]
    if method == "search":
        return [Candidate(method, sizes, repair=True) for sizes in target.searched]
    return [Candidate("act2", pairs[-1], "act2", retokenize=False, influence=True)]


def _fewer_attentions(
    study: Study, candidate: Candidate, row: Row, count: int
) -> tuple[Candidate, Row]:
    """Return 2SSP's candidate with both stages; ``row`` is that of the first one."""
    windows, kept = study.calibration_windows()[:1], study.kept[candidate.name]
    layers = attentions_by_perplexity(study.text.layout, windows, kept, count, study.settings)
    return replace(candidate, without_attention=frozenset(layers)), row


def _fewer_layers(study: Study, method: str, target: RatioTarget) -> Candidate:
    """Return a layer method's candidate; the first pass has measured the layers' influence."""
    layout, depth = study.text.layout, _depth(study, target)
    if method == "shortgpt":
        assert study.block_influence is not None
        groups = layers_by_influence(study.block_influence, depth)
    else:
        calibration_pass = study.text.calibration_pass(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in calibration_pass.streams[0].windows]
        groups = collapse_layers(layout, windows, depth, study.settings)
    return Candidate(method, replace(whole(layout), layers=groups))


def _depth(study: Study, target: RatioTarget) -> int:
    """Return the number of whole layers to keep, so that the ratio is met as nearly as possible."""
    layout = study.text.layout
    count = layout.num_hidden_layers
    full, one = (
        each.parameters(layout.vocab_size, layout.widths)
        for each in (layout, layout.with_layers([[0]]))
    )
    return max(1, count - round(target.ratio * full / ((full - one) / (count - 1))))
