"""What if: sizes that a page's sliders choose among, what follows from them, and commands."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.families.schema import EXPERT, WIDTHS
from surgery.layout.layout import Layout
from surgery.planning.layers import (
    check_layers,
    format_layers,
    layers_by_influence,
    needed_layers,
    ranked,
)
from surgery.planning.plan import Plan
from surgery.planning.request import SizeRequest, allowed_steps, main_width
from surgery.planning.selection import kept_experts
from surgery.planning.shapes import (
    axis_lengths,
    blocks,
    check_blocks,
    expert_choices,
    shape_of,
)
from surgery.planning.sizes import (
    CANDIDATE_RATIOS,
    FixedSizes,
    Sizes,
    Steps,
    split,
    whole,
    width_choices,
)
from surgery.report.spelling import packed_numbers
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    CRITERIA,
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    best_sums,
    bucket_weights,
)
from surgery.vocabulary.order import Rarity

MOST_STOPS = {"vocab": 32, "widths": 24, "experts": 9}
"""Stops of a slider, beside those that are marked."""

MOST_STOPS_OF_MIXTURES = {"vocab": 12, "widths": 10, "experts": 9}

LEAST_POWER, MOST_POWER = 10, 20
"""Powers of two between these are stops of V', where it has room for them."""


@dataclass(frozen=True)
class Mark:
    """Sizes that a page names."""

    name: str
    vocab_size: int
    widths: dict[str, int]
    experts: int = 0
    """0 is all of them."""


@dataclass(frozen=True)
class Choices:
    """Sizes to choose among, and what the page needs to say what follows from them."""

    facts: dict[str, Any]
    """Stops of each slider, parameters and bytes by kind of layer, marks and start; for JSON."""
    tables: dict[str, str]
    """Name → packed table: the order of rarity, and the shares of act²."""


def choices_of(
    layout: Layout, plan: Plan, stats: ChannelStats, rarity: Rarity, best: Sequence[Mark] = ()
) -> Choices:
    """Return what the sliders of a page choose among.

    Args:
        layout: The source.
        plan: Where the sliders start.
        stats: The statistics that choose the channels.
        rarity: The order in which tokens are removed.
        best: Sizes to mark beside the rule of thumb's.
    """
    steps = allowed_steps(layout, SizeRequest())
    fixed = _fixed(layout, rarity, steps)
    marks = [*_rule_of_thumb(layout, rarity, steps, fixed), *best]
    most = MOST_STOPS_OF_MIXTURES if layout.experts else MOST_STOPS
    after = plan.after
    start = Mark("start", after.vocab_size, dict(after.widths), after.experts)
    marked = [mark for mark in (*marks, start) if _fits(layout, rarity, mark)]
    vocab = _vocab_stops(layout, rarity, steps, fixed, most["vocab"], marked)
    widths = _width_stops(layout, steps, fixed, most["widths"], marked)
    counts = {mark.experts or layout.experts for mark in marked}
    experts = _expert_stops(layout, stats, most["experts"], counts)
    layers, influence = _layer_stops(layout, stats), stats.block_influence
    sizes = _sizes_by_kind(layout, widths, experts)
    rows = [(n, axis) for n, axes in enumerate(stats.layers) for axis in WIDTHS if axis in axes]
    shares = _shares(layout, stats, rarity, (vocab, experts, widths), rows)
    facts = {
        "vocab": vocab,
        "widths": widths,
        "experts": experts,
        "layers": layers,
        "influence": ranked(influence, needed_layers(layout, influence)),
        "must_keep": rarity.must_keep,
        "rows": [[layer, axis] for layer, axis in rows],
        "main_width": _main_width(layout),
        "marks": [
            {
                "name": m.name,
                "vocab": m.vocab_size,
                "widths": m.widths,
                "experts": m.experts or layout.experts,
            }
            for m in marks
            if m.vocab_size in vocab
            and m.widths in widths
            and (m.experts or layout.experts) in experts
        ],
        "start": {
            "vocab": vocab.index(after.vocab_size),
            "widths": widths.index(dict(after.widths)),
            "experts": experts.index(after.experts),
            "layers": after.num_hidden_layers,
        },
        **sizes,
    }
    return Choices(
        facts, {"order": packed_numbers(rarity.order), "shares": packed_numbers(shares, "<f4")}
    )


PLAN_FILE = "cut.plan.json"
"""File that a page's commands write a plan to."""


def commands_for_sizes(
    layout: Layout, plan: Plan, model: str, stats: str, output: str
) -> list[str]:
    """Return the commands that choose by statistics what a plan of the same sizes keeps.

    Args:
        layout: The source.
        plan: Its sizes and criteria; tokens are removed in the order of merges.
        model: The source, as a command names it.
        stats: The file of the statistics.
        output: The directory to write.
    """
    before, after, made, options = plan.before, plan.after, plan.provenance, list[str]()
    if after.vocab_size != before.vocab_size:
        options += ["--vocab-size", str(after.vocab_size)]
    for key, size in after.widths.items():
        if size == before.widths[key]:
            continue
        main = key == _main_width(layout)
        options += ["--intermediate-size", str(size)] if main else ["--width", f"{key}={size}"]
    if after.experts != before.experts:
        options += ["--num-experts", str(after.experts)]
    if plan.layers:
        options += ["--layers", format_layers(plan.layers)]
    if made.criterion != DEFAULT_CRITERION:
        options += ["--criterion", made.criterion]
    if made.expert_criterion not in (None, DEFAULT_EXPERT_CRITERION):
        options += ["--expert-criterion", str(made.expert_criterion)]
    if not options:
        return []
    if plan.family is not None:
        options = ["--family", plan.family, *options]
    return [
        shlex.join(["compact-surgery", "plan", model, "--stats", stats, *options, "-o", PLAN_FILE]),
        shlex.join(["compact-surgery", "apply", PLAN_FILE, "-o", output]),
    ]


def _main_width(layout: Layout) -> str | None:
    """Return the key that ``intermediate_size`` stands for, if there is one."""
    try:
        return main_width(layout)
    except SurgeryError:
        return None


def _fits(layout: Layout, rarity: Rarity, mark: Mark) -> bool:
    """Whether a mark's sizes are sizes of this model."""
    rows = rarity.must_keep <= mark.vocab_size <= layout.vocab_size
    same = mark.widths.keys() == layout.widths.keys() and mark.experts <= layout.experts
    return rows and same and all(1 <= n <= layout.widths[key] for key, n in mark.widths.items())


def _fixed(layout: Layout, rarity: Rarity, steps: Steps) -> FixedSizes:
    """Return the sizes that cannot change: rows or channels of weights that are moved whole."""
    vocab_size, widths = None, {}
    if rarity.must_keep == layout.vocab_size or _refused(
        layout, replace(whole(layout), vocab_size=layout.vocab_size - 1)
    ):
        vocab_size = layout.vocab_size
    smallest = width_choices(layout, steps, FixedSizes())[0] if layout.widths else {}
    for key, full in layout.widths.items():
        if _refused(layout, replace(whole(layout), widths={**layout.widths, key: smallest[key]})):
            widths[key] = full
    return FixedSizes(vocab_size, widths)


def _refused(layout: Layout, sizes: Sizes) -> bool:
    try:
        check_blocks(layout, sizes)
    except SurgeryError:
        return True
    return False


def _rule_of_thumb(layout: Layout, rarity: Rarity, steps: Steps, fixed: FixedSizes) -> list[Mark]:
    """Return the rule's sizes at the usual ratios, where they can be met."""
    found = []
    for ratio in CANDIDATE_RATIOS:
        try:
            sizes = split(layout, ratio, rarity.must_keep, steps, fixed)
        except SurgeryError:
            continue
        found.append(Mark(f"rule of thumb, {ratio:.0%}", sizes.vocab_size, dict(sizes.widths)))
    return found


def _thinned(values: list[Any], most: int) -> list[Any]:
    """Return at most ``most`` of ``values``, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[n] for n in np.linspace(0, len(values) - 1, most).round().astype(int)]


def _vocab_stops(
    layout: Layout,
    rarity: Rarity,
    steps: Steps,
    fixed: FixedSizes,
    most: int,
    marks: Sequence[Mark],
) -> list[int]:
    """Return the stops of V', ascending."""
    full = layout.vocab_size
    if fixed.vocab_size is not None:
        return sorted({full, *(mark.vocab_size for mark in marks)})
    first = -(-rarity.must_keep // steps.vocab) * steps.vocab
    powers = {1 << n for n in range(LEAST_POWER, MOST_POWER) if rarity.must_keep <= 1 << n < full}
    even = _thinned(list(range(first, full, steps.vocab)), most)
    return sorted({*even, *powers, full, *(mark.vocab_size for mark in marks)})


def _width_stops(
    layout: Layout, steps: Steps, fixed: FixedSizes, most: int, marks: Sequence[Mark]
) -> list[dict[str, int]]:
    """Return the stops of I', ascending: of several widths, all shrink together."""
    found = _thinned(width_choices(layout, steps, fixed), most) if layout.widths else [{}]
    found = [*found, *(mark.widths for mark in marks)]
    unique = {tuple(each[key] for key in layout.widths): each for each in found}
    return sorted(unique.values(), key=lambda each: [each[key] for key in layout.widths])


def _expert_stops(layout: Layout, stats: ChannelStats, most: int, marked: set[int]) -> list[int]:
    """Return the stops of E', ascending; only the source's where experts cannot be chosen."""
    full = layout.experts
    routed = all(axes[EXPERT].routed is not None for axes in stats.layers if EXPERT in axes)
    if not full or not routed:
        return [full]
    try:
        return sorted({*_thinned(list(expert_choices(layout)), most), full, *marked})
    except SurgeryError:
        return [full]


def _layer_stops(layout: Layout, stats: ChannelStats) -> list[int]:
    """Return how many layers can be kept, by influence; ascending."""
    found, influence = [layout.num_hidden_layers], stats.block_influence
    needed = needed_layers(layout, influence)
    for count in range(1, layout.num_hidden_layers):
        try:
            check_layers(layout, layers_by_influence(influence, count, needed))
        except SurgeryError:
            continue
        found.append(count)
    return sorted(found)


def _sizes_by_kind(
    layout: Layout, widths: Sequence[dict[str, int]], experts: Sequence[int]
) -> dict[str, Any]:
    """Return parameters and bytes outside of layers, of a row, and of each kind of layer.

    Layers are of one kind where their tensors have the same shapes. With P(k) the size of a model
    that has one layer of kind k alone, n(k) how many there are, L their sum and P that of the whole
    model, what is outside of layers has (Σ n(k) P(k) − P) / (L − 1).
    """
    kind_of, firsts = _kinds(layout)
    full, rows = dict(layout.widths), layout.vocab_size
    whole_model = shape_of(layout, whole(layout))
    totals = {"parameters": whole_model.parameters, "nbytes": whole_model.nbytes}
    tables: dict[str, Any] = {"kind_of": kind_of, "whole": totals}
    less = shape_of(layout, replace(whole(layout), vocab_size=rows - 1))
    for name in ("parameters", "nbytes"):
        alone = [
            [
                [
                    getattr(shape_of(layout, Sizes(rows, each, False, [[first]], count)), name)
                    for each in widths
                ]
                for count in experts
            ]
            for first in firsts
        ]
        every, total, depth = Counter(kind_of), getattr(whole_model, name), len(kind_of)
        with_full = [
            getattr(shape_of(layout, Sizes(rows, full, False, [[first]])), name) for first in firsts
        ]
        rest = 0
        if depth > 1:
            rest = (sum(n * with_full[kind] for kind, n in every.items()) - total) // (depth - 1)
        tables[name] = {
            "rest": rest,
            "row": total - getattr(less, name),
            "kinds": [[[n - rest for n in row] for row in table] for table in alone],
        }
    return tables


def _kinds(layout: Layout) -> tuple[list[int], list[int]]:
    """Return the kind of each layer, and the first layer of each kind."""
    shapes: list[Counter[object]] = [Counter() for _ in range(layout.num_hidden_layers)]
    for tensor in layout.checkpoint.tensors.values():
        role = layout.roles[tensor.name]
        if role.layer is not None and not role.dropped:
            shapes[role.layer][role.slot.name, role.scales, tensor.shape, tensor.dtype] += 1
    found: dict[frozenset[object], int] = {}
    kind_of = [found.setdefault(frozenset(each.items()), len(found)) for each in shapes]
    return kind_of, [kind_of.index(kind) for kind in range(len(found))]


def _shares(
    layout: Layout,
    stats: ChannelStats,
    rarity: Rarity,
    stops: tuple[Sequence[int], Sequence[int], Sequence[dict[str, int]]],
    rows: Sequence[tuple[int, str]],
) -> np.ndarray:
    """float64 ``[V', E', I', rows]``: the share of Σ act² over the kept tokens that stays."""
    vocab, experts, widths = stops
    by_key, full = blocks(layout), axis_lengths(layout, layout.widths)
    block = {axis: by_key.get(width.key, 1) for axis, width in layout.family.widths.items()}
    lengths = [axis_lengths(layout, each) for each in widths]
    found = np.ones((len(vocab), len(experts), len(widths), len(rows)))
    for v, size in enumerate(vocab):
        ids = rarity.id_map(size)
        weights = bucket_weights(stats, ids)
        chosen = [_experts_at(layout, stats, count, ids) for count in experts]
        for n, (layer, axis) in enumerate(rows):
            importance = CRITERIA[DEFAULT_CRITERION](stats.layers[layer][axis], weights, [])
            if axis not in full or not (total := float(importance.sum())):
                continue
            counts = [each[axis] for each in lengths]
            sums = best_sums(importance, counts, block.get(axis, 1))
            for e, kept in enumerate(chosen):
                left = sums[kept[layer]] if axis == EXPERT and layer in kept else sums
                found[v, e, :, n] = left.sum(axis=0) / total
    return found.round(6)


def _experts_at(layout: Layout, stats: ChannelStats, count: int, ids: Any) -> dict[int, np.ndarray]:
    """Return layer → kept experts; empty where all are kept."""
    if count == layout.experts:
        return {}
    sizes = Sizes(ids.new_size, layout.widths, experts=count)
    return kept_experts(layout, sizes, DEFAULT_EXPERT_CRITERION, stats, ids)
