"""What the user asks for, and the sizes and order of rarity that follow from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm

import numpy as np

from surgery.errors import BudgetError, DataError, OptionError, TokenizerError, check_choice
from surgery.layout.layout import Layout
from surgery.planning.aims import AIMS, QUALITY, aim_note, served_bytes, split_for
from surgery.planning.layers import check_layers, layers_by_influence, parse_layers
from surgery.planning.plan import HUB_NAME
from surgery.planning.shapes import blocks, check_experts, expert_choices
from surgery.planning.sizes import (
    MULTIPLE_OF,
    TOLERANCE,
    FixedSizes,
    Sizes,
    Steps,
    check_ratio,
    check_sizes,
    parse_target,
    sizes_at,
    split,
    steps,
    vocabulary_first,
    whole,
)
from surgery.stats.channels import RANDOM, ChannelOptions, needs_stats
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.order import (
    Rarity,
    VocabularyChoice,
    VocabularyOptions,
    count_tokens,
    identity_rarity,
    kept_tokens,
    open_vocabulary,
    rarity_of,
)
from surgery.vocabulary.scripts import check_script

VOCABULARY, CHANNELS, EXPERTS, LAYERS = PARTS = ("vocabulary", "channels", "experts", "layers")
"""What a ratio can be taken from."""


@dataclass(frozen=True)
class SizeRequest:
    """How much to remove: a share of the parameters, or the sizes to keep."""

    ratio: float | None = None
    """Share of all parameters to remove."""
    vocab_size: int | None = None
    """V': rows of the embedding to keep."""
    intermediate_size: int | None = None
    """I': channels of each FFN to keep, where the model has one width."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Key of config.json → channels to keep, for models with several widths."""
    multiple_of: int | None = None
    """What V' and I' must be multiples of. None is the usual step; sizes that the user gives need
    not be multiples of it."""
    target: str | None = None
    """What an engine divides the sizes by, such as "tp=4,group=128"."""
    dequantize: bool = False
    """Whether weights in FP8 become bf16."""
    layers: str | None = None
    """Layers to keep or to merge, such as "0-20,21+22+23,24-29"."""
    num_hidden_layers: int | None = None
    """How many layers to keep, those of the largest block influence."""
    num_experts: int | None = None
    """E': routed experts of each layer to keep."""
    only: str | Sequence[str] = ()
    """What the ratio is taken from, of ``PARTS``; empty is the vocabulary and the channels."""
    aim: str = QUALITY
    """What the split between vocabulary and channels serves, of ``AIMS``."""

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.multiple_of is not None:
            steps(self.multiple_of)
        check_choice("aim", self.aim, AIMS)
        if self.parts:
            _check_parts(self)

    @property
    def parts(self) -> tuple[str, ...]:
        """``only`` as names."""
        if isinstance(self.only, str):
            return tuple(self.only.split(",")) if self.only else ()
        return tuple(self.only)

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return replace(self, only=self.parts) == SizeRequest()

    @property
    def ranks_layers(self) -> bool:
        """Whether the layers to keep follow from their block influence."""
        return self.num_hidden_layers is not None or LAYERS in self.parts

    @property
    def removes_experts(self) -> bool:
        """Whether whole experts are removed."""
        return self.num_experts is not None or EXPERTS in self.parts

    @property
    def by_rule(self) -> bool:
        """Whether the rule of thumb splits the ratio between the vocabulary and the channels."""
        splits = not self.parts or {VOCABULARY, CHANNELS} <= set(self.parts)
        return self.ratio is not None and splits and not self.names_sizes

    @property
    def names_sizes(self) -> bool:
        """Whether the vocabulary's size or a width is given."""
        widths = self.intermediate_size is not None or bool(self.widths)
        return self.vocab_size is not None or widths


def _check_parts(request: SizeRequest) -> None:
    """Refuse ``only`` where it names nothing that exists, or nothing that is open.

    Raises:
        OptionError: a part is unknown.
        BudgetError: there is no ratio, or other options choose the same.
    """
    for part in request.parts:
        check_choice("only", part, PARTS)
    if len({*request.parts}) < len(request.parts):
        raise BudgetError("`only`", "names a part twice", fix="name each part once")
    others = set(request.parts) - {LAYERS}
    by_layers = request.layers is not None or request.num_hidden_layers is not None
    for wrong, problem, fix in (
        (
            EXPERTS in request.parts and request.num_experts is not None,
            f"{EXPERTS} and a number of experts exclude each other",
            "give `num_experts`, and name the other parts",
        ),
        (request.ratio is None, "has no effect without `ratio`", "give `ratio`, or leave it out"),
        (request.names_sizes, "and sizes exclude each other", "give one or the other"),
        (
            len(others) < len(request.parts) and bool(others or by_layers),
            f"{LAYERS} goes with no other part, and with no number of layers",
            f"name {LAYERS} alone, or the layers by `layers` or `num_hidden_layers`",
        ),
    ):
        if wrong:
            raise BudgetError("`only`", problem, fix=fix)


@dataclass(frozen=True)
class CutRequest:
    """All that the user asks for: sizes, vocabulary and channels, and how to call the result."""

    sizes: SizeRequest = field(default_factory=SizeRequest)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    channels: ChannelOptions = field(default_factory=ChannelOptions)
    base_model: str | None = None
    """Hub id ``org/name`` of the model, for the model card; None is what the source tells."""

    def __post_init__(self) -> None:
        if self.base_model is not None and not HUB_NAME.fullmatch(self.base_model):
            raise OptionError(
                "`base_model`",
                "is no model's name on the hub",
                expected="ORG/NAME",
                found=repr(self.base_model),
                fix="correct it, or leave it out",
            )


@dataclass(frozen=True, eq=False)
class SizeChoice:
    """The chosen sizes, and the order in which tokens are removed."""

    rarity: Rarity
    sizes: Sizes
    tokenizer: TokenizerFile | None = None
    """None where the whole vocabulary is kept; then the tokenizer may be of any kind."""
    request: CutRequest = field(default_factory=CutRequest)
    """The request that led to them."""
    notes: Sequence[str] = ()
    """What the user should know of the choice."""

    def needs_statistics(self, layout: Layout) -> bool:
        """Whether channels, experts or layers of ``layout`` are chosen by what a text shows."""
        channels = self.request.channels
        by_text = channels.criterion != RANDOM and dict(self.sizes.widths) != dict(layout.widths)
        experts_by_text = bool(self.sizes.experts) and needs_stats(channels.expert_criterion)
        return self.request.sizes.ranks_layers or by_text or experts_by_text


def choose_sizes(
    layout: Layout,
    request: CutRequest,
    documents: Iterable[str] | None = None,
    influence: np.ndarray | None = None,
) -> SizeChoice:
    """Return the order of rarity and the sizes, as given or as the ratio demands.

    Args:
        layout: The model.
        request: How much to remove, and which tokens to keep.
        documents: Text to count tokens in, where the order is by frequency.
        influence: Block influence of each layer, float64 ``[L]``, to choose layers by.

    Raises:
        BudgetError: neither a ratio nor sizes are given, or a ratio beside all sizes; or sizes do
            not divide as asked.
        DataError: the order is by frequency and there is no text.
        TokenizerError: the vocabulary cannot be pruned, or lacks a token to keep.
    """
    target = request.sizes
    fixed = fixed_sizes(request, layout)
    check_sizes(layout, Sizes(layout.vocab_size, fixed.widths))
    layers = _chosen_layers(target, layout, influence)
    choice = choose_vocabulary(layout, request, fixed.vocab_size, documents)
    rarity = choice.rarity
    if fixed.vocab_size is None and target.ratio is None:
        if not rarity.dropped:
            raise BudgetError(
                "`drop_scripts` and `drop_reserved`",
                "name no token that can be removed",
                fix="leave them out, or name another script",
            )
        fixed = replace(fixed, vocab_size=rarity.tokens - rarity.dropped)
    experts = _chosen_experts(target, layout, layout.with_layers(layers))
    others = Sizes(0, {}, target.dequantize, layers, experts)
    split_by = partial(_split, layout, fixed=fixed, smallest=rarity.must_keep, others=others)
    if target.aim == QUALITY:
        return replace(choice, sizes=split_by(target))
    if not target.by_rule:
        raise BudgetError(
            f"`aim` {target.aim}",
            "has nothing to choose: no ratio is split between vocabulary and channels",
            fix="give `ratio` without these sizes, or leave it out",
        )
    sizes, usual = split_by(target), split_by(replace(target, aim=QUALITY))
    return replace(choice, sizes=sizes, notes=[aim_note(layout, target.aim, sizes, usual)])


def choose_vocabulary(
    layout: Layout,
    request: CutRequest,
    vocab_size: int | None = None,
    documents: Iterable[str] | None = None,
) -> SizeChoice:
    """Return the order of rarity, and no size but the source's.

    Args:
        layout: The model.
        request: Which tokens to keep.
        vocab_size: V'; None leaves it open.
        documents: As for ``choose_sizes``.

    Raises:
        BudgetError: the whole vocabulary is kept, and options say how to prune it.
        DataError, TokenizerError: as ``choose_sizes``.
    """
    if vocab_size == layout.vocab_size:
        if idle := request.vocabulary.given():
            raise BudgetError(
                ", ".join(f"`{name}`" for name in idle),
                "has no effect where the whole vocabulary is kept",
                fix="leave it out, or let `ratio` or `vocab_size` remove rows",
            )
        return SizeChoice(identity_rarity(layout.vocab_size), whole(layout), None, request)
    tokenizer = open_vocabulary(layout)
    choice = _vocabulary_choice(layout, tokenizer, request.vocabulary, documents)
    rarity = rarity_of(layout, choice, tokenizer)
    rarity.check(vocab_size)
    return SizeChoice(rarity, whole(layout), tokenizer, request)


def _chosen_layers(
    target: SizeRequest, layout: Layout, influence: np.ndarray | None
) -> list[list[int]]:
    """Return the layers that are asked for, as in a plan; empty where all are kept."""
    if target.layers is not None and target.num_hidden_layers is not None:
        raise BudgetError(
            "`layers`", "and `num_hidden_layers` exclude each other", fix="give one of them"
        )
    if target.layers is not None:
        groups = parse_layers(target.layers)
    elif not target.ranks_layers:
        return []
    elif influence is None:
        raise BudgetError(
            f"`only` {LAYERS}" if target.parts else "`num_hidden_layers`",
            "needs statistics to rank the layers by",
            fix="calibrate, then plan with `stats`; or name the layers with `layers`",
        )
    elif target.num_hidden_layers is not None:
        groups = layers_by_influence(influence, target.num_hidden_layers)
    else:
        groups = layers_at(layout, target.ratio or 0.0, influence)
    check_layers(layout, groups)
    return [] if groups == [[layer] for layer in range(layout.num_hidden_layers)] else groups


def layers_at(layout: Layout, ratio: float, influence: np.ndarray) -> list[list[int]]:
    """Return the layers to keep, by influence, that remove as near to the ratio as whole ones can.

    Raises:
        BudgetError: the layers do not hold so much, or less than half of one layer is to go.
    """
    full = layout.parameters(layout.vocab_size, layout.widths)
    cuts: list[tuple[float, list[list[int]]]] = []
    for count in range(layout.num_hidden_layers - 1, 0, -1):
        groups = layers_by_influence(influence, count)
        left = layout.with_layers(groups).parameters(layout.vocab_size, layout.widths)
        cuts.append((1 - left / full, groups))
    one, most = (cuts[0][0], cuts[-1][0]) if cuts else (0.0, 0.0)
    if not (cuts and one / 2 <= ratio <= most + one / 2):
        raise BudgetError(
            "`ratio`",
            "cannot be met by whole layers",
            expected=f"{one:.4f} to {most:.4f}",
            found=ratio,
            fix="choose another ratio, or another part with `only`",
        )
    return min(cuts, key=lambda cut: abs(cut[0] - ratio))[1]


def _split(
    layout: Layout, target: SizeRequest, fixed: FixedSizes, smallest: int, others: Sizes
) -> Sizes:
    """Return ``others`` with V' and I'; a ratio counts what is removed, and chooses what is open.

    ``others`` names the layers and experts that are kept.
    """
    left = layout.with_layers(others.layers).with_experts(others.experts)
    steps, ratio = allowed_steps(layout, target), target.ratio
    if fixed.vocab_size is not None and len(fixed.widths) == len(layout.widths):
        widths = {key: fixed.widths[key] for key in layout.widths}
        return replace(others, vocab_size=fixed.vocab_size, widths=widths)
    assert ratio is not None  # else all sizes are fixed
    if left is not layout:
        full, rest = (each.parameters(layout.vocab_size, layout.widths) for each in (layout, left))
        if abs(rest / full - (1 - ratio)) <= TOLERANCE and not target.names_sizes:
            return replace(others, vocab_size=layout.vocab_size, widths=layout.widths)
        if rest < (1 - ratio) * full:
            removed = ["layers"] * (left.layers is not None) + ["experts"] * bool(left.experts_left)
            raise BudgetError(
                "`ratio`",
                f"is less than the removed {' and '.join(removed)} take alone",
                expected=f"at least {1 - rest / full:.4f}",
                found=ratio,
                fix="keep more of them, or choose a higher ratio",
            )
        ratio = 1 - (1 - ratio) * full / rest
    try:
        found = split(left, ratio, smallest, steps, fixed)
        if target.aim != QUALITY:
            pairs = [found, *sizes_at(left, ratio, smallest, steps, fixed)]
            full_pairs = (replace(others, vocab_size=p.vocab_size, widths=p.widths) for p in pairs)
            served = [served_bytes(layout, pair, target.aim) for pair in full_pairs]
            found = split_for(ratio, pairs, left, served)
        return replace(others, vocab_size=found.vocab_size, widths=found.widths)
    except BudgetError as error:
        if left is layout:
            raise
        problem = f"{error.problem}, beside the layers or experts that are removed"
        raise BudgetError(
            error.where, problem, found=target.ratio, fix="choose another ratio, or other sizes"
        ) from error


def _chosen_experts(target: SizeRequest, layout: Layout, left: Layout) -> int:
    """Return the experts of a layer to keep, as in ``Sizes``; ``left`` has the kept layers.

    Raises:
        BudgetError: the routers cannot choose among so many, or the ratio cannot be met by experts.
    """
    count = target.num_experts
    if count is not None:
        if count < 1:
            raise BudgetError(
                "`num_experts`", "is below 1", expected="at least 1", found=count, fix="keep some"
            )
        check_experts(layout, count)
    elif {EXPERTS, CHANNELS} <= {*target.parts}:
        raise BudgetError(
            "`only`",
            f"names {EXPERTS} and {CHANNELS}, and no rule splits the ratio between them",
            fix="name one of them, give `num_experts`, or search for the best split",
        )
    elif EXPERTS in target.parts:
        count = experts_at(layout, left, target.ratio or 0.0, VOCABULARY in target.parts)
    return 0 if count == layout.experts else count or 0


def experts_at(layout: Layout, left: Layout, ratio: float, shares: bool = False) -> int:
    """Return how many experts to keep, so that the ratio is met as nearly as whole ones can.

    Args:
        layout: The source.
        left: The source without removed layers.
        ratio: Share of all parameters to remove.
        shares: Whether the vocabulary takes its share of it, by ``vocabulary_first``.

    Raises:
        BudgetError: experts do not hold so much, or less than half of one is to go.
    """
    full, now = (each.parameters(layout.vocab_size, layout.widths) for each in (layout, left))
    limit = wanted = now - (1 - ratio) * full
    choices, cost = expert_choices(layout), left.axis_cost(EXPERTS)
    most, step = (layout.experts - choices[0]) * cost, choices.step * cost
    if shares:
        wanted -= vocabulary_first(left, wanted)
        choices = choices[-int(limit // step) - 1 :]  # the rest comes from the vocabulary
    elif not step / 2 <= wanted <= most + step / 2:
        share = (full - now) / full
        raise BudgetError(
            "`ratio`",
            "cannot be met by whole experts",
            expected=f"{share + step / full:.4f} to {share + most / full:.4f}",
            found=ratio,
            fix="choose another ratio, or other parts with `only`",
        )
    return min(choices, key=lambda count: abs((layout.experts - count) * cost - wanted))


def allowed_steps(layout: Layout, target: SizeRequest) -> Steps:
    """Return what the sizes must be multiples of, FP8 blocks included."""
    wanted = _steps(target)
    if target.dequantize:
        return wanted
    by_key = blocks(layout)
    width = lcm(wanted.width, *(by_key.get(key, 1) for key in layout.widths))
    return replace(wanted, width=width)


def rarity_or_whole(
    layout: Layout, vocabulary: VocabularyOptions, documents: Iterable[str]
) -> Rarity:
    """Return the order of rarity; a vocabulary that cannot be pruned is kept whole."""
    try:
        tokenizer = open_vocabulary(layout)
    except TokenizerError:
        return identity_rarity(layout.vocab_size)
    choice = _vocabulary_choice(layout, tokenizer, vocabulary, documents)
    return rarity_of(layout, choice, tokenizer)


def parse_vocab_sizes(sizes: str | Sequence[int], layout: Layout) -> list[int]:
    """Return the sizes in "V,V,…", or in a sequence.

    Raises:
        BudgetError: a size is no number between 1 and V.
    """
    try:
        found = [int(part) for part in (sizes.split(",") if isinstance(sizes, str) else sizes)]
    except ValueError:
        found = [0]
    if not 1 <= min(found) <= max(found) <= layout.vocab_size:
        raise BudgetError(
            "`vocab_sizes`",
            "are not sizes of this vocabulary",
            expected=f"numbers from 1 to {layout.vocab_size}, with commas",
            found=sizes,
            fix="correct them",
        )
    return found


def _steps(target: SizeRequest) -> Steps:
    """Return what the sizes must be multiples of by ``multiple_of`` and ``target``."""
    multiple_of = target.multiple_of or MULTIPLE_OF
    return parse_target(target.target, multiple_of) if target.target else steps(multiple_of)


def fixed_sizes(request: CutRequest, layout: Layout) -> FixedSizes:
    """Return the sizes that are given. Without a ratio, the others keep their full size.

    V' stays open where the vocabulary is to lose certain tokens, however many these are.
    """
    target, drops = request.sizes, request.vocabulary.drops
    widths, vocab_size = _given_widths(target, layout), target.vocab_size
    if target.ratio is None:
        others = target.layers or target.num_hidden_layers or target.dequantize or drops
        if not (target.names_sizes or others or target.num_experts is not None):
            raise BudgetError(
                "sizes",
                "nothing says how much to remove",
                fix="give `ratio`, such as 0.2, or a size to keep, such as `vocab_size`, "
                "`intermediate_size`, `num_experts` or `num_hidden_layers`",
            )
        if vocab_size is None and not drops:
            vocab_size = layout.vocab_size
        widths = {**layout.widths, **widths}
    elif vocab_size is not None and len(widths) == len(layout.widths):
        raise BudgetError(
            "`ratio`",
            "has no size left to choose, for all are given",
            fix="leave out the ratio, or one of the sizes",
        )
    if target.parts and VOCABULARY not in target.parts:
        vocab_size = layout.vocab_size
    if target.parts and CHANNELS not in target.parts:
        widths = dict(layout.widths)
    fixed = FixedSizes(vocab_size, widths)
    if target.multiple_of or target.target:
        _check_steps(layout, fixed, _steps(target))
    return fixed


def _given_widths(target: SizeRequest, layout: Layout) -> dict[str, int]:
    """Return key of config.json → channels that are asked for."""
    for key, size in target.widths.items():
        if key not in layout.widths:
            raise BudgetError(
                "`widths`",
                "is no width of this model",
                expected=f"KEY=N with KEY one of {', '.join(layout.widths) or 'none'}",
                found=f"{key}={size}",
                fix="correct it",
            )
    found = dict(target.widths)
    if target.intermediate_size is not None:
        found = {main_width(layout): target.intermediate_size} | found
    return found


def main_width(layout: Layout) -> str:
    """Return the key that ``intermediate_size`` stands for: that of this name, or the only one."""
    if "intermediate_size" in layout.widths:
        return "intermediate_size"
    if len(layout.widths) == 1:
        return next(iter(layout.widths))
    names = ", ".join(layout.widths)
    raise BudgetError(
        "`intermediate_size`",
        "is not clear: this model has several widths"
        if names
        else "cannot change: config.json has no key for the width of this model's FFN",
        expected=f"`widths` with one of {names}" if names else None,
        fix="use `widths`" if names else "prune the vocabulary alone, with `vocab_size`",
    )


def _near(size: int, step: int, full: int) -> str:
    """Name the multiple of ``step`` nearest to ``size``, or ``full`` where there is none below."""
    if step > full:
        return f"or all {full}"
    return f"such as {max(step, min(round(size / step), full // step) * step)}"


def _check_steps(layout: Layout, fixed: FixedSizes, wanted: Steps) -> None:
    """Refuse given sizes that are no multiples of what was asked for; full sizes are allowed."""
    given = {}
    if fixed.vocab_size is not None:
        given["vocab_size"] = (fixed.vocab_size, layout.vocab_size, wanted.vocab)
    for key, size in fixed.widths.items():
        given[key] = (size, layout.widths[key], wanted.width)
    for key, (size, full, step) in given.items():
        if size != full and size % step:
            raise BudgetError(
                key,
                "does not divide as `multiple_of` and `target` ask",
                expected=f"a multiple of {step}, {_near(size, step, full)}",
                found=size,
                fix="choose one, or leave the options out",
            )


def _vocabulary_choice(
    layout: Layout,
    tokenizer: TokenizerFile,
    vocabulary: VocabularyOptions,
    documents: Iterable[str] | None,
) -> VocabularyChoice:
    """Read the tokens and scripts that the options name, and count tokens if they ask for it."""
    scripts = tuple(check_script(name) for name in vocabulary.keep_scripts)
    dropped = tuple(check_script(name, "drop_scripts") for name in vocabulary.drop_scripts)
    if both := sorted(set(scripts) & set(dropped)):
        raise TokenizerError(
            "`drop_scripts`",
            f"{both[0]} is also to be kept",
            fix="name it in `keep_scripts` or in `drop_scripts`",
        )
    keep = kept_tokens(vocabulary.keep_tokens, tokenizer)
    counts = None
    if vocabulary.vocab_by == "frequency":
        if documents is None:
            raise DataError(
                "`vocab_by` frequency", "needs a text to count tokens in", fix="give `data`"
            )
        counts = count_tokens(tokenizer.library(), documents, layout.vocab_size)
    return VocabularyChoice(counts, vocabulary.drop_reserved, keep, scripts, dropped)
