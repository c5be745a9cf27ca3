"""What the user asks for, and the sizes and order of rarity that follow from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

import numpy as np

from surgery.errors import BudgetError, DataError, TokenizerError
from surgery.layout.layout import Layout
from surgery.planning.layers import check_layers, layers_by_influence, parse_layers
from surgery.planning.shapes import blocks
from surgery.planning.sizes import (
    MULTIPLE_OF,
    TOLERANCE,
    Sizes,
    Steps,
    check_ratio,
    parse_target,
    split,
    steps,
    whole,
)
from surgery.stats.channels import ChannelOptions
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

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.multiple_of is not None:
            steps(self.multiple_of)


@dataclass(frozen=True)
class CutRequest:
    """All that the user asks for: sizes, vocabulary and channels."""

    sizes: SizeRequest = field(default_factory=SizeRequest)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    channels: ChannelOptions = field(default_factory=ChannelOptions)


@dataclass(frozen=True, eq=False)
class SizeChoice:
    """The chosen sizes, and the order in which tokens are removed."""

    rarity: Rarity
    sizes: Sizes
    tokenizer: TokenizerFile | None = None
    """None where the whole vocabulary is kept; then the tokenizer may be of any kind."""
    request: CutRequest = field(default_factory=CutRequest)
    """The request that led to them."""


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
        influence: Block influence of each layer, float64 ``[L]``, for ``num_hidden_layers``.

    Raises:
        BudgetError: neither a ratio nor sizes are given, or both; or sizes do not divide as asked.
        DataError: the order is by frequency and there is no text.
        TokenizerError: the vocabulary cannot be pruned, or lacks a token to keep.
    """
    target = request.sizes
    layers = _chosen_layers(target, layout, influence)
    sizes = _given_sizes(target, layout)
    if sizes is not None:
        sizes = replace(sizes, layers=layers)
    if sizes is not None and sizes.vocab_size == layout.vocab_size:
        return SizeChoice(identity_rarity(layout.vocab_size), sizes, None, request)
    tokenizer = open_vocabulary(layout)
    choice = _vocabulary_choice(layout, tokenizer, request.vocabulary, documents)
    rarity = rarity_of(layout, choice, tokenizer)
    if sizes is None:
        sizes = _split(layout, target, rarity.must_keep, layers)
        sizes = replace(sizes, dequantize=target.dequantize, layers=layers)
    return SizeChoice(rarity, sizes, tokenizer, request)


def _chosen_layers(
    target: SizeRequest, layout: Layout, influence: np.ndarray | None
) -> list[list[int]]:
    """Return the layers that are asked for, as in a plan; empty where all are kept."""
    if target.layers is None and target.num_hidden_layers is None:
        return []
    if target.layers is not None and target.num_hidden_layers is not None:
        raise BudgetError(
            "`layers`", "and `num_hidden_layers` exclude each other", fix="give one of them"
        )
    if target.layers is not None:
        groups = parse_layers(target.layers)
    elif influence is not None:
        groups = layers_by_influence(influence, target.num_hidden_layers or 0)
    else:
        raise BudgetError(
            "`num_hidden_layers`",
            "needs statistics to rank the layers by",
            fix="calibrate, then plan with `stats`; or name the layers with `layers`",
        )
    check_layers(layout, groups)
    return [] if groups == [[layer] for layer in range(layout.num_hidden_layers)] else groups


def _split(layout: Layout, target: SizeRequest, smallest: int, layers: list[list[int]]) -> Sizes:
    """Return sizes that remove, together with the removed layers, the ratio that is asked for."""
    steps, ratio, left = allowed_steps(layout, target), target.ratio or 0.0, layout
    if layers:
        left = layout.with_layers(layers)
        full, rest = (each.parameters(layout.vocab_size, layout.widths) for each in (layout, left))
        if abs(rest / full - (1 - ratio)) <= TOLERANCE:
            return whole(layout)
        if rest < (1 - ratio) * full:
            raise BudgetError(
                "`ratio`",
                "is less than the removed layers take alone",
                expected=f"at least {1 - rest / full:.4f}",
                found=ratio,
                fix="keep more layers, or choose a higher ratio",
            )
        ratio = 1 - (1 - ratio) * full / rest
    return split(left, ratio, smallest, steps)


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


def _given_sizes(target: SizeRequest, layout: Layout) -> Sizes | None:
    """Return the sizes, or None where they follow from the ratio; others keep their full size."""
    widths = _given_widths(target, layout)
    by_size = target.vocab_size is not None or bool(widths)
    if target.ratio is not None:
        if by_size:
            raise BudgetError(
                "`ratio`",
                "and sizes exclude each other",
                expected="`ratio`, or `vocab_size` and `intermediate_size`",
                fix="give one or the other",
            )
        return None
    if not by_size and target == SizeRequest():
        raise BudgetError(
            "sizes",
            "are not given",
            expected="`ratio`, or `vocab_size` and `intermediate_size`",
            fix="give one or the other; a size that is not named does not change",
        )
    vocab_size = layout.vocab_size if target.vocab_size is None else target.vocab_size
    sizes = Sizes(vocab_size, {**layout.widths, **widths}, target.dequantize)
    if target.multiple_of or target.target:
        _check_steps(layout, sizes, _steps(target))
    return sizes


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


def _check_steps(layout: Layout, sizes: Sizes, wanted: Steps) -> None:
    """Refuse given sizes that are no multiples of what was asked for; full sizes are allowed."""
    given = {"vocab_size": (sizes.vocab_size, layout.vocab_size, wanted.vocab)}
    for key, size in sizes.widths.items():
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
    keep = kept_tokens(vocabulary.keep_tokens, tokenizer)
    counts = None
    if vocabulary.vocab_by == "frequency":
        if documents is None:
            raise DataError(
                "`vocab_by` frequency", "needs a text to count tokens in", fix="give `data`"
            )
        counts = count_tokens(tokenizer.library(), documents, layout.vocab_size)
    return VocabularyChoice(counts, vocabulary.drop_reserved, keep, scripts)
