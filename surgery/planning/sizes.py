"""The sizes (V', E', I') that meet a ratio, in steps that engines can split."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import floor, lcm
from numbers import Integral, Real

from surgery.errors import BudgetError
from surgery.families.schema import EXPERTS, VOCAB
from surgery.layout.layout import Layout

VOCAB_PADDING = 64
"""vLLM and SGLang pad the vocabulary to a multiple of this before they split it.

vllm-project/vllm ``vllm/model_executor/layers/vocab_parallel_embedding.py``,
sgl-project/sglang ``python/sglang/srt/layers/vocab_parallel_embedding.py``.
"""

TARGET_KEYS = ("tp", "group")


@dataclass(frozen=True)
class Steps:
    """What the two sizes must be multiples of."""

    vocab: int
    """Step of V'."""
    width: int
    """Step of I' and of every other FFN width."""


def steps(multiple_of: int, *, tp: int = 1, group: int = 1) -> Steps:
    """Return steps whose every multiple serves ``tp`` ranks and groups of ``group``.

    - Width: gate_proj and up_proj are split over the ranks by output, down_proj by input, and
      groups run along the input. A rank's part of down_proj has to hold whole groups, so I' is a
      multiple of ``tp · group`` (``verify_group_size_divides_partition`` in vllm-project/vllm
      ``vllm/distributed/utils.py``; ``validate_fp8_block_shape`` in
      ``vllm/model_executor/layers/quantization/utils/fp8_utils.py`` and in sgl-project/sglang
      ``python/sglang/srt/layers/quantization/fp8_utils.py``). A part in multiples of 128 is also
      whole tiles of Marlin (``marlin_utils.py`` beside it: 64 outputs by 128 inputs).
    - Vocabulary: embeddings and lm_head are split by rows. Groups run along the hidden size, so
      ``group`` asks nothing of V'. vLLM pads V' to a multiple of 64, which ``tp`` then has to
      divide. For a ``tp`` that does not divide 64, V' is a multiple of 64 too, so that the padding
      adds nothing.

    Raises:
        BudgetError: ``multiple_of`` is below 1.
    """
    if not isinstance(multiple_of, Integral) or multiple_of < 1:
        raise BudgetError(
            "`multiple_of`",
            "is no valid step",
            expected="1 or more",
            found=multiple_of,
            fix="give a whole number, such as 128",
        )
    padding = VOCAB_PADDING if VOCAB_PADDING % tp else 1
    return Steps(vocab=lcm(multiple_of, tp, padding), width=lcm(multiple_of, tp * group))


def parse_target(text: str, multiple_of: int) -> Steps:
    """Return the steps that ``target``, such as ``"tp=4,group=128"``, asks for.

    Raises:
        BudgetError: a key is unknown or repeated, or a value is no number from 1 to 999999.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in TARGET_KEYS:
            raise _target_error("has no such key", " or ".join(TARGET_KEYS), key)
        if key in given:
            raise _target_error("names a key twice", f"{key} once", text)
        if not re.fullmatch("[0-9]{1,6}", value) or int(value) == 0:
            raise _target_error(f"has no size for {key}", "a whole number from 1 to 999999", value)
        given[key] = int(value)
    return steps(multiple_of, tp=given.get("tp", 1), group=given.get("group", 1))


def _target_error(problem: str, expected: str, found: str) -> BudgetError:
    fix = "write it as tp=4,group=128"
    return BudgetError("`target`", problem, expected=expected, found=repr(found[:40]), fix=fix)


MULTIPLE_OF = 128
"""Engines want sizes that divide evenly over tiles and devices."""

STEPS = Steps(MULTIPLE_OF, MULTIPLE_OF)

TOLERANCE = 0.005
"""How far, in parts of all parameters, the reached ratio may lie from the target."""

CANDIDATE_RATIOS = (0.1, 0.2, 0.35, 0.5)
"""Ratios for which a calibration is exact when it is given no sizes."""

EXCESS_WEIGHT = 2
"""How much more it counts to remove more rows than the rule asks for than to remove fewer.

In coarse steps of I', the nearest pair removed 95 % of SmolLM2-135M's vocabulary at a ratio of 0.2,
and its text took 47 % more tokens.
"""

VOCAB_CAP = 2 / 3
CAP_PER_SHARE = 3.75
ROWS_AT_RATIO_ZERO = 40 << 10
"""The constants of the rule in ``vocabulary_first``. They are fitted to the best pairs of the
sweeps in the paper's Table 8 and to searches of our own."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that can be chosen."""

    vocab_size: int
    """V': rows of the embedding."""
    widths: Mapping[str, int]
    """Key of config.json → I': channels of every FFN, or expert, of this kind."""
    dequantize: bool = False
    """Whether FP8 weights become bf16, with twice the bytes and no blocks to keep whole."""
    layers: Sequence[Sequence[int]] = ()
    """As in a plan; empty keeps all layers."""
    experts: int = 0
    """E': routed experts of each layer to keep; 0 keeps all."""


@dataclass(frozen=True)
class FixedSizes:
    """Sizes that are given; a ratio chooses the others."""

    vocab_size: int | None = None
    """V'; None leaves it open."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Key of config.json → I'; a width without an entry is open."""


NOTHING_FIXED = FixedSizes()


def whole(layout: Layout) -> Sizes:
    """Return the sizes of the source."""
    return Sizes(layout.vocab_size, layout.widths)


def check_sizes(layout: Layout, sizes: Sizes) -> None:
    """Refuse a width that the model cannot have; the vocabulary's code checks V'.

    Raises:
        BudgetError: I' is above I or below 1.
    """
    for key, size in sizes.widths.items():
        if not 1 <= size <= layout.widths.get(key, 0):
            raise BudgetError(
                f"`widths` {key}" if len(layout.widths) > 1 else "`intermediate_size`",
                "is out of reach",
                expected=f"1 to {layout.widths.get(key, 0)} (the source's channels)",
                found=size,
                fix="choose a size in this range",
            )


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is no share.

    Raises:
        BudgetError: it is not between 0 and 1.
    """
    if not isinstance(ratio, Real) or not 0 < ratio < 1:
        fix = "choose one, such as 0.2"
        if isinstance(ratio, Real) and 1 < ratio < 100:
            share = float(ratio)
            fix = f"{share:g} means {100 * share:g} %; did you mean {share / 100:g}?"
        raise BudgetError(
            "`ratio`",
            "is no share of the parameters",
            expected="above 0, below 1",
            found=ratio,
            fix=fix,
        )


def vocabulary_first(layout: Layout, removed: float) -> float:
    """Return how many of ``removed`` parameters to take from the vocabulary.

    Table 8's sweeps prune the vocabulary first, up to a share of it. That share grows with the
    vocabulary's share of the parameters: about two thirds where it holds a fifth or more of them
    (0.5B and 1B), 47 % at 13 % (8B), 13 % at 3 % (70B). So the cap is
    ``min(2/3, 3.75 · vocabulary's share)`` of the vocabulary; the rest comes from the channels.
    No sweep went below 33,792 rows. Of five pairs of SmolLM2-135M (V 49,152), ``search`` finds
    36,992 rows best at a ratio of 0.2 and 24,960 at 0.35; with ``repair``, 49,152 and 36,480. So
    ``40,960 · (1 − ratio)`` rows are kept, which is nearest to the first two. In
    searches of Gemma 3 270M (V 262,144) it was best to remove rows alone; these minimized two parts
    of the loss and one part of that on the words which both vocabularies tokenize alike.
    """
    total = layout.parameters(layout.vocab_size, layout.widths)
    vocabulary = layout.vocab_size * layout.axis_cost(VOCAB)
    cap = min(VOCAB_CAP, CAP_PER_SHARE * vocabulary / total) * vocabulary
    rows = ROWS_AT_RATIO_ZERO * (1 - removed / total)
    spare = max(0.0, layout.vocab_size - rows) * layout.axis_cost(VOCAB)
    return min(removed, cap, spare)


def split(
    layout: Layout,
    ratio: float,
    smallest_vocab: int,
    steps: Steps = STEPS,
    fixed: FixedSizes = NOTHING_FIXED,
) -> Sizes:
    """Choose the sizes that remove ``ratio`` of all parameters, close to the rule's split.

    Every I' of the costliest width (a multiple of its step, or I itself) is paired with the V'
    that meets the target; other widths shrink by the same share. Of the pairs within
    ``TOLERANCE`` the one nearest to ``vocabulary_first`` wins. There may be none where a step of I'
    is a large part of the model, as in mixtures of experts. Then the pair nearest to the target is
    taken if it lies within half a step.

    Args:
        layout: The source.
        ratio: Removed parameters over all parameters, tied embeddings counted once.
        smallest_vocab: Fewest rows to keep.
        steps: What the chosen sizes must be multiples of.
        fixed: Sizes that are not chosen.

    Raises:
        BudgetError: no pair of allowed sizes meets the target.
    """
    total = layout.parameters(layout.vocab_size, layout.widths)
    row = layout.axis_cost(VOCAB)
    target = vocabulary_first(layout, ratio * total)
    found: list[tuple[float, float, Sizes]] = []
    for error, sizes in _pairs(layout, ratio, smallest_vocab, steps, fixed):
        found.append((error, _off_rule(layout, sizes, target), sizes))
    exact = [(distance, error, sizes) for error, distance, sizes in found if error <= TOLERANCE]
    if exact:
        return min(exact, key=lambda pair: pair[:2])[2]
    error, _, sizes = min(found, key=lambda pair: pair[:2])
    shares = [_removed(layout, each) / total for each in width_choices(layout, steps, fixed)]
    given = (layout.vocab_size - (fixed.vocab_size or layout.vocab_size)) * row / total + min(
        shares
    )
    half_step = max((a - b for a, b in pairwise(shares)), default=0) / 2
    if error > TOLERANCE + half_step or given > ratio + TOLERANCE:
        raise _unreachable(layout, ratio, smallest_vocab, steps, fixed)
    return sizes


def sizes_at(
    layout: Layout,
    ratio: float,
    smallest_vocab: int,
    steps: Steps = STEPS,
    fixed: FixedSizes = NOTHING_FIXED,
    experts: Iterable[int] = (0,),
) -> list[Sizes]:
    """Return all sizes within ``TOLERANCE`` of the target, by E', then by V'.

    For each E' of ``experts``, as in ``Sizes``, every I' is paired with the V' that removes what
    the experts leave of the ratio. A vocabulary that need not shrink is kept whole.

    Where a step is so large that there are no such sizes, there is one choice: as many experts as
    come nearest if that is within half a step of them, else that of ``split``.

    Raises:
        BudgetError: as ``split``.
    """
    full = layout.parameters(layout.vocab_size, layout.widths)
    found: list[Sizes] = []
    alone: list[tuple[float, Sizes]] = []
    for count in sorted(experts, key=lambda count: count or layout.experts):
        left, only = layout.with_experts(count), replace(whole(layout), experts=count)
        rest = left.parameters(layout.vocab_size, layout.widths) / full
        share = 1 - (1 - ratio) / rest if count else ratio
        if share > 0:
            pairs = _exact_pairs(left, share, smallest_vocab, steps, fixed)
            found += [replace(sizes, experts=count) for sizes in pairs]
        elif -share <= TOLERANCE:
            found.append(only)
        if count:
            alone.append((abs(1 - rest - ratio), only))
    if found or not alone:
        return found or [split(layout, ratio, smallest_vocab, steps, fixed)]
    error, nearest = min(alone, key=lambda pair: pair[0])
    step = layout.axis_cost(EXPERTS) * (layout.experts - alone[-1][1].experts) / full
    if error <= step / 2:
        return [nearest]
    fewest = layout.with_experts(alone[0][1].experts)
    rows = smallest_vocab if fixed.vocab_size is None else fixed.vocab_size
    least = fewest.parameters(rows, width_choices(layout, steps, fixed)[0])
    raise BudgetError(
        "`ratio`",
        "cannot be met by whole experts and the sizes beside them",
        expected=f"at most {1 - least / full:.4f}",
        found=ratio,
        fix="choose another ratio, or smaller steps with `multiple_of`",
    )


def _exact_pairs(
    layout: Layout, ratio: float, smallest_vocab: int, steps: Steps, fixed: FixedSizes
) -> list[Sizes]:
    """Return every pair within ``TOLERANCE``, in order of V', which is V where it need not shrink.

    Raises:
        BudgetError: the ratio is no share.
    """
    total = layout.parameters(layout.vocab_size, layout.widths)
    found = [
        replace(sizes, vocab_size=layout.vocab_size)
        if abs(_removed(layout, sizes.widths) / total - ratio) <= TOLERANCE
        else sizes
        for error, sizes in _pairs(layout, ratio, smallest_vocab, steps, fixed)
        if error <= TOLERANCE
    ]
    return sorted(found, key=lambda sizes: sizes.vocab_size)


def nearest_to_rule(layout: Layout, ratio: float, pairs: Sequence[Sizes]) -> Sizes:
    """Return the one of ``pairs``, all with the same experts, that ``split`` would choose."""
    left = layout.with_experts(pairs[0].experts)
    full, rest = (each.parameters(layout.vocab_size, layout.widths) for each in (layout, left))
    target = vocabulary_first(left, max(0.0, rest - (1 - ratio) * full))
    return min(pairs, key=lambda sizes: _off_rule(left, sizes, target))


def _off_rule(layout: Layout, sizes: Sizes, target: float) -> float:
    """Return how far the removed rows are from ``target`` parameters; too many count more."""
    removed = (layout.vocab_size - sizes.vocab_size) * layout.axis_cost(VOCAB)
    return max(target - removed, (removed - target) * EXCESS_WEIGHT)


def _pairs(
    layout: Layout,
    ratio: float,
    smallest_vocab: int,
    steps: Steps,
    fixed: FixedSizes = NOTHING_FIXED,
) -> list[tuple[float, Sizes]]:
    """Return for each I' the error, in parts of all parameters, and the sizes with the best V'.

    Raises:
        BudgetError: the ratio is no share.
    """
    total = layout.parameters(layout.vocab_size, layout.widths)
    check_ratio(ratio)
    row = layout.axis_cost(VOCAB)
    found = []
    for widths in width_choices(layout, steps, fixed):
        rest = ratio * total - _removed(layout, widths)
        wanted = layout.vocab_size - rest / row
        vocab_size = fixed.vocab_size
        if vocab_size is None:
            vocab_size = _nearest(wanted, smallest_vocab, layout.vocab_size, steps.vocab)
        removed = (layout.vocab_size - vocab_size) * row
        found.append((abs(removed - rest) / total, Sizes(vocab_size, widths)))
    return found


def candidate_vocab_sizes(layout: Layout, smallest_vocab: int) -> list[int]:
    """Return V' of the usual ratios, and V, ascending: the default bucket edges of statistics."""
    sizes = {layout.vocab_size}
    for ratio in CANDIDATE_RATIOS:
        try:
            sizes.add(split(layout, ratio, smallest_vocab).vocab_size)
        except BudgetError:
            continue
    return sorted(sizes)


def width_choices(layout: Layout, steps: Steps, fixed: FixedSizes) -> list[dict[str, int]]:
    """Return every I' of the costliest open width, with the other open ones at the same share."""
    first = next((key for key in layout.widths if key not in fixed.widths), None)
    if first is None:
        return [dict(fixed.widths)]
    full, step = layout.widths[first], steps.width
    return [
        {key: _nearest(size / full * width, 1, width, step) for key, width in layout.widths.items()}
        | {first: size}
        | dict(fixed.widths)
        for size in _allowed(1, full, step)
    ]


def _removed(layout: Layout, widths: Mapping[str, int]) -> int:
    """Return the parameters of the channels beyond ``widths``."""
    return sum((layout.widths[key] - size) * layout.axis_cost(key) for key, size in widths.items())


def _allowed(low: int, high: int, step: int) -> list[int]:
    """Return all multiples of ``step`` from ``low`` to ``high``, and ``high``."""
    first = -(-low // step) * step
    return sorted({*range(first, high + 1, step), high})


def _around(wanted: float, low: int, high: int, step: int) -> list[int]:
    """Return those of ``_allowed`` that may be nearest to ``wanted``, ascending."""
    first, last = -(-low // step) * step, high // step * step
    if first > last:
        return [high]
    below = floor(wanted / step) * step
    near = (below + shift * step for shift in (-1, 0, 1, 2))
    return sorted({high, *(min(max(size, first), last) for size in near)})


def _nearest(wanted: float, low: int, high: int, step: int) -> int:
    """Return the size of ``_allowed`` nearest to ``wanted``; of two, the smaller one."""
    return min(_around(wanted, low, high, step), key=lambda size: abs(size - wanted))


def _unreachable(
    layout: Layout, ratio: float, smallest_vocab: int, steps: Steps, fixed: FixedSizes
) -> BudgetError:
    total = layout.parameters(layout.vocab_size, layout.widths)
    row, full = layout.axis_cost(VOCAB), layout.vocab_size
    channels = [_removed(layout, widths) for widths in width_choices(layout, steps, fixed)]

    def rows(wanted: float) -> list[int]:
        if fixed.vocab_size is not None:
            return [fixed.vocab_size]
        return _around(wanted, smallest_vocab, full, steps.vocab)

    found = [
        (abs(share - ratio), size, share)
        for removed in channels
        for size in rows(full - (ratio * total - removed) / row)
        for share in [((full - size) * row + removed) / total]
    ]
    nearest = min(found, key=lambda pair: pair[:2])[2]
    most = ((full - rows(smallest_vocab)[0]) * row + max(channels)) / total
    least = ((full - rows(full)[-1]) * row + min(channels)) / total
    bounds = f"at least {least:.4f}, at most {most:.4f}" if least > 0 else f"at most {most:.4f}"
    return BudgetError(
        "`ratio`",
        f"cannot be met by sizes in steps of {steps.vocab} and {steps.width}",
        expected=f"{bounds}; nearest is {nearest:.4f}",
        found=ratio,
        fix="choose another ratio or other sizes, or smaller steps with `multiple_of`",
    )
