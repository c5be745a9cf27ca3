"""What the user asks for: a ratio, sizes and their steps, and how to choose tokens and channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

from surgery.errors import BudgetError, OptionError, check_choice
from surgery.hub.upload import HUB_NAME
from surgery.layout.layout import Layout
from surgery.planning.serving import AIMS, QUALITY
from surgery.planning.shapes import blocks
from surgery.planning.sizes import MULTIPLE_OF, FixedSizes, Steps, check_ratio, parse_target, steps
from surgery.stats.channels import ChannelOptions
from surgery.vocabulary.order import VocabularyOptions

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


def _steps(target: SizeRequest) -> Steps:
    """Return what the sizes must be multiples of by ``multiple_of`` and ``target``."""
    multiple_of = target.multiple_of or MULTIPLE_OF
    return parse_target(target.target, multiple_of) if target.target else steps(multiple_of)


def allowed_steps(layout: Layout, target: SizeRequest) -> Steps:
    """Return what the sizes must be multiples of, FP8 blocks included."""
    wanted = _steps(target)
    if target.dequantize:
        return wanted
    by_key = blocks(layout)
    width = lcm(wanted.width, *(by_key.get(key, 1) for key in layout.widths))
    return replace(wanted, width=width)


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
