"""The sizes and the order of rarity that follow from what is asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from surgery.errors import BudgetError, DataError, TokenizerError
from surgery.layout.layout import Layout
from surgery.planning.layers import (
    check_layers,
    layers_by_influence,
    needed_layers,
    parse_layers,
)
from surgery.planning.request import (
    CHANNELS,
    EXPERTS,
    LAYERS,
    VOCABULARY,
    CutRequest,
    SizeRequest,
    allowed_steps,
    fixed_sizes,
)
from surgery.planning.serving import QUALITY, aim_note, served_bytes, split_for
from surgery.planning.shapes import check_experts, expert_choices
from surgery.planning.sizes import (
    TOLERANCE,
    FixedSizes,
    Sizes,
    check_sizes,
    sizes_at,
    split,
    vocabulary_first,
    whole,
)
from surgery.stats.channels import RANDOM, needs_stats
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
        needed = needed_layers(layout, influence)
        groups = layers_by_influence(influence, target.num_hidden_layers, needed)
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
    needed = needed_layers(layout, influence)
    for count in range(layout.num_hidden_layers - 1, max(1, len(needed)) - 1, -1):
        groups = layers_by_influence(influence, count, needed)
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
