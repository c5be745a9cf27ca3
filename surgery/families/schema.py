"""What surgery must know of a model type: its tensors, and which dimension carries which axis."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.families.layer_rules import LayerRule

VOCAB = "vocab"
FFN = "ffn"
EXPERT = "expert"
SHARED = "shared"
WIDTHS = (FFN, EXPERT, SHARED)
"""Axes of channels: of the dense FFN, of each routed expert, of the expert that sees all tokens."""

STACK = "stack"
"""The axis along which a packed tensor holds one matrix per expert; it is never cut."""

GROUPS = ("vocabulary", "attention", "ffn", "norms", "other")

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_PLACES = ("{layer}", "{expert}")


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor."""

    axis: str
    """One of VOCAB, WIDTHS and STACK."""
    copies: int = 1
    """How often the axis lies on this dimension: twice in a fused gate and up projection."""
    interleaved: bool = False
    """Whether the copies of one channel are neighbours; else all of one copy come first."""


@dataclass(frozen=True)
class Slot:
    """A tensor that a family has once, once per layer, or once per expert of a layer."""

    name: str
    """Tensor name; ``{layer}`` and ``{expert}`` stand for numbers."""
    group: str
    """One of GROUPS: whose parameters these are in the census."""
    axes: tuple[Dim | str | None, ...] = ()
    """By dimension; a name stands for ``Dim(name)``; None or missing where nothing is ever cut."""
    required: bool = True
    """Whether every layer that has another tensor of the same block must have it."""
    block: str = ""
    """Tensors of a block come together; a layer needs all required ones without a block."""
    beside: tuple[str, ...] = ()
    """Blocks one of which must be there for this tensor to be needed."""
    ffn_output: bool = False
    """Whether the *input* of this weight is the channel axis: its square is the statistic."""
    is_parameter: bool = True
    """Whether transformers holds it as a parameter; it does not count its buffers."""

    @cached_property
    def dims(self) -> tuple[Dim | None, ...]:
        """``axes`` with names spelled out."""
        return tuple(Dim(axis) if isinstance(axis, str) else axis for axis in self.axes)

    @cached_property
    def width(self) -> str | None:
        """The one of WIDTHS that this tensor carries, if any."""
        return next((dim.axis for dim in self.dims if dim and dim.axis in WIDTHS), None)


@dataclass(frozen=True)
class Width:
    """Where config.json holds the length of a channel axis."""

    key: str
    times: str = ""
    """A key by whose number the axis is longer: DeepSeek's shared experts lie in one matrix."""


@dataclass(frozen=True)
class Family:
    """One model type."""

    slots: tuple[Slot, ...]
    tied: bool
    """Whether the config class ties embeddings when config.json does not say."""
    widths: Mapping[str, Width] = field(default_factory=lambda: {FFN: Width("intermediate_size")})
    """Channel axis → its place in config.json; an axis without one cannot change its length."""
    depth: str = "num_hidden_layers"
    """Key of config.json for the number of layers."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefixes: tuple[tuple[str, str], ...] = ()
    """(prefix in the file, prefix in ``slots``): other spellings that checkpoints use."""
    section: str = ""
    """Part of config.json that describes the language model; "" is the whole."""
    text_type: str = ""
    """Model type to run the language model as, where ``section`` names another or none."""
    model_type: str = ""
    """Key of the table under which this entry was found; ``family_of`` writes it."""
    left_out: tuple[str, ...] = ()
    """Prefixes of tensors that only guess ahead (MTP), outside the layers."""
    carried: tuple[str, ...] = ()
    """Prefixes of tensors that belong to no language model and are copied as they are."""
    draft_layers: str = ""
    """Key for the number of layers behind the last that only guess ahead (MTP): left out."""
    layer_rules: tuple[LayerRule, ...] | None = None
    """Keys by which layers differ; ``family_of`` takes them from its table. None: layers cannot go,
    for their number may say what they are."""
    misread_vocab_sizes: Mapping[int, str] = field(default_factory=dict)
    """Sizes V' by which another program tells models apart → what it would take this one for."""

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        """Slots by name."""
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def layers(self) -> str:
        """Module that holds the decoder layers."""
        return next(s.name for s in self.slots if _PLACES[0] in s.name).partition(".{layer}")[0]

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        section = config.get(self.section) if self.section else config
        return section if isinstance(section, dict) else {}

    def spellings(self, name: str) -> list[str]:
        """Names that a tensor ``name`` of the file may have among ``slots``, likeliest first."""
        return [
            *(new + name[len(old) :] for old, new in self.prefixes if name.startswith(old)),
            name,
        ]


@dataclass(frozen=True)
class Wrapper:
    """A model type that has a language model of another type in it."""

    carried: tuple[str, ...]
    """Prefixes of the tensors beside the language model, which are copied as they are."""
    prefixes: tuple[tuple[str, str], ...]
    """(prefix in the file, prefix in the language model's slots)."""
    tied: bool
    """Whether the config class ties embeddings when config.json does not say."""
    text_types: Mapping[str, str] = field(default_factory=dict)
    """Model type of the section → an equal one, for text, that stands alone."""
    section: str = "text_config"
    by_number: bool = False
    """Whether something beside the language model enters it at layers of certain numbers."""

    def around(self, family: Family, text_type: str) -> Family:
        """Return ``family`` as it lies in a checkpoint of this type."""
        return replace(
            family,
            tied=self.tied,
            prefixes=self.prefixes,
            carried=(*self.carried, *(f"model.{name}" for name in self.carried)),
            section=self.section,
            text_type=text_type,
            layer_rules=None if self.by_number else family.layer_rules,
        )


def template(name: str) -> tuple[str, list[int]]:
    """Return ``name`` with ``{layer}`` and ``{expert}`` for its numbers, and the numbers."""
    parts, numbers = name.split("."), list[int]()
    for place, part in enumerate(parts):
        if _NUMBER.fullmatch(part) and len(numbers) < len(_PLACES):
            parts[place] = _PLACES[len(numbers)]
            numbers.append(int(part))
    return ".".join(parts), numbers


def renumbered(name: str, layer: int) -> str:
    """Return the name of a layer's tensor with ``layer`` for its first number."""
    parts = name.split(".")
    place = next(place for place, part in enumerate(parts) if _NUMBER.fullmatch(part))
    return ".".join([*parts[:place], str(layer), *parts[place + 1 :]])
