"""Compare methods at the same ratios, on the same text and windows, in the same passes."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from calib.scoring.score import check_predicts
from calib.study.kept_rows import KeptRows
from calib.study.laco import collapse_layers
from calib.study.residual import ResidualStream, StreamCut, check_hidden, check_rotate
from calib.study.search import MOST, coarse, expert_counts
from calib.study.slicegpt import check_sliced, sliced_size
from calib.study.study import Candidate, Study
from calib.study.table import (
    DENSE,
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
from surgery.planning.choice import experts_at
from surgery.planning.layers import (
    check_mergeable,
    check_removable,
    layers_by_influence,
    needed_layers,
)
from surgery.planning.request import SizeRequest
from surgery.planning.shapes import expert_choices
from surgery.planning.sizes import Sizes, Steps, check_ratio, sizes_at, split, whole
from surgery.process import Progress, Stopwatch, stage

LOG = logging.getLogger(__name__)

LACO_WINDOWS, LACO_TOKENS = 8, 64
"""Calibration text by which LaCo judges a collapse; the paper takes ten sentences."""


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    ratios: Sequence[float]
    """Shares of all parameters to remove."""
    methods: Sequence[str]
    """Their names."""
    tries: int = MOST
    """Most pairs that ``compact`` and ``search`` try at a ratio; 1 is the rule of thumb's."""
    keep: Path | None = None
    """A file for the rows, as they are made. Those that it has are not made again."""


@dataclass(frozen=True)
class RatioTarget:
    """A ratio, and the sizes that meet it."""

    ratio: float
    pairs: Sequence[Sizes]
    """Those that ``compact`` tries, in order of V'."""
    searched: Sequence[Sizes]
    """Those that ``search`` tries; of a mixture they have several E'."""
    vocabulary: Sizes
    """With the smallest V'."""
    channels: Sizes
    """With the largest V', which is V if the ratio allows that."""
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
    check_removable(layout)


CHECKS: Mapping[tuple[str, ...], Callable[[Layout], object]] = {
    LAYER_METHODS: _check_fewer_layers,
    ("laco",): check_mergeable,
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
    asked: Comparison,
    progress: Progress | None = None,
) -> dict[float, list[Row]]:
    """Try all methods at each ratio, in two passes each; LaCo takes one more for each collapse.

    The second pass has the methods that follow from the first one and, where the study has tasks,
    the best of those that try several sizes, which answer.

    Methods of experts remove whole experts alone, as near to the ratio as these come. ``compact``
    is the paper's method at the best of the pairs: the source's own tokenizer tokenizes the text.
    ``prune`` is what the command makes by default: the rule of thumb's pair, the pruned tokenizer
    tokenizes the text. ``search`` is this tool's best: of several pairs, or triples of a mixture,
    with down_proj refitted.

    Args:
        study: The text, the tasks, and compute settings.
        steps: Of which sizes are multiples.
        asked: The ratios and methods.
        progress: Called with "compare", finished windows × layers, and the total of a pass.

    Returns:
        Ratio → the dense model's row, then one row for each method, in their order.

    Raises:
        DataError: ``asked.keep`` is no file of such rows.
        OutputError: it could not be written, or another run writes it.
    """
    found = {}
    with KeptRows(asked.keep, study, steps, asked.tries) as kept:
        for ratio in asked.ratios:
            left = [method for method in asked.methods if method not in kept.at(ratio)]
            if left:
                target = _target(study, steps, ratio, left, asked.tries)
                for rows in _rows_at(study, target, left, progress):
                    kept.add(ratio, {**rows, DENSE: study.dense})
            every = kept.at(ratio)
            found[ratio] = [every[name] for name in (DENSE, *asked.methods)]
    return found


def _target(
    study: Study, steps: Steps, ratio: float, methods: Sequence[str], tries: int
) -> RatioTarget:
    """Return the sizes that ``methods`` have at a ratio."""
    layout, smallest = study.text.layout, study.text.rarity.must_keep
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
    tried = coarse(pairs, most=tries) if tries > 1 else [usual]
    searched = coarse(searched, most=tries) if tries > 1 else [usual]
    first, last = (pairs[0], pairs[-1]) if pairs else (usual, usual)
    cut = {*methods} & {*STREAM_METHODS}
    stream = ResidualStream.of(layout) if cut else None
    streams = {method: stream.cut(ratio, method) for method in cut} if stream else {}
    sizes = (tried, searched, first, last, usual, fewer_experts)
    return RatioTarget(ratio, *sizes, two_stage, slice_to, streams)


def _rows_at(
    study: Study, target: RatioTarget, methods: Sequence[str], progress: Progress | None
) -> Iterator[dict[str, Row]]:
    """Yield rows by method, once after each of two passes."""
    first: list[Candidate] = []
    for method in methods:
        if method != "laco":  # it measures nothing here
            first += [each for each in _candidates(method, target) if each not in first]
    names = [candidate.name for candidate in first]
    attentions = target.two_stage.attentions if target.two_stage is not None else 0
    final = {m for m in methods if m not in LAYER_METHODS and names.count(m) == 1}
    final -= {"2ssp"} if attentions else set()
    best = _try(study, first, progress, answers=final if study.tasks else ()) if first else {}
    if final:
        yield {method: best[method][1] for method in methods if method in final}

    last, seconds = list[Candidate](), dict[str, float]()
    for method in methods:
        watch, before = Stopwatch(), 0.0
        if method in LAYER_METHODS:
            last.append(_fewer_layers(study, method, target, watch))
            before = study.influence_seconds if method == "shortgpt" else 0.0
        elif method == "2ssp" and attentions:
            last.append(_fewer_attentions(study, best[method][0], attentions, watch))
            before = best[method][1].seconds
        elif method not in final:
            before = best[method][1].seconds
            last += [best[method][0]] * bool(study.tasks)
        seconds[method] = before + sum(watch.seconds.values())
    asked = [candidate.name for candidate in last] if study.tasks else []
    best |= _try(study, last, progress, answers=asked) if last else {}
    yield {
        method: replace(best[method][1], seconds=seconds[method])
        for method in methods
        if method not in final
    }


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
    answers: Collection[str] = (),
) -> dict[str, tuple[Candidate, Row]]:
    """Return the candidate that loses least for each name, and its row.

    The seconds of the row are those of all candidates of its name, alone: a calibration pass that
    several methods share counts for each. Several candidates are tried, one is not.
    """
    advance = stage(progress, "compare", study.windows(len(candidates), answers=bool(answers)))
    rows = study.rows(candidates, advance, answers=answers)
    found: dict[str, tuple[Candidate, Row]] = {}
    for name in dict.fromkeys(candidate.name for candidate in candidates):
        own = [number for number, each in enumerate(candidates) if each.name == name]
        took = [study.took[number] for number in own]
        passes = {each.text: each.calibrate for each in took}
        tried = sum(each.heldout for each in took) if len(own) > 1 else 0.0
        seconds = sum(passes.values()) + sum(each.own for each in took) + tried
        best = min(own, key=lambda number: rows[number].loss)
        found[name] = candidates[best], replace(rows[best], seconds=seconds)
    return found


def _candidates(method: str, target: RatioTarget) -> list[Candidate]:
    """Return the first pass's candidates of a method; of several, the best one counts.

    Methods that remove layers by influence need what ``act2`` measures, too.
    """
    if method in EXPERT_METHODS:
        criterion = EXPERT_METHODS[method]
        sizes = target.fewer_experts
        return [Candidate(method, sizes, retokenize=False, expert_criterion=criterion)]
    if method in FFN_CRITERIA:
        influence = method == "act2"  # as below, so that it is tried once
        channels = target.channels
        return [Candidate(method, channels, method, retokenize=False, influence=influence)]
    if method == "vocabulary":
        return [Candidate(method, target.vocabulary)]
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
        return [Candidate(method, sizes, retokenize=False) for sizes in target.pairs]
    if method == "search":
        return [Candidate(method, sizes, repair=True) for sizes in target.searched]
    return [Candidate("act2", target.channels, "act2", retokenize=False, influence=True)]


def _fewer_attentions(
    study: Study, candidate: Candidate, count: int, watch: Stopwatch
) -> Candidate:
    """Return 2SSP's candidate with both stages."""
    layout, windows = study.text.layout, study.calibration_windows()[:1]
    kept = study.kept[candidate.name]
    layers = attentions_by_perplexity(layout, windows, kept, count, study.settings, watch)
    return replace(candidate, without_attention=frozenset(layers))


def _fewer_layers(study: Study, method: str, target: RatioTarget, watch: Stopwatch) -> Candidate:
    """Return a layer method's candidate; the first pass has measured the layers' influence."""
    layout, depth = study.text.layout, _depth(study, target)
    if method == "shortgpt":
        assert study.block_influence is not None
        needed = needed_layers(layout, study.block_influence)
        groups = layers_by_influence(study.block_influence, max(depth, len(needed)), needed)
    else:
        calibration_pass = study.text.calibration_pass(layout.vocab_size, LACO_WINDOWS)
        windows = [window[:LACO_TOKENS] for window in calibration_pass.streams[0].windows]
        groups = collapse_layers(layout, windows, depth, study.settings, watch)
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
