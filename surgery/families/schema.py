"""Description of a model type: its tensors, and the axis on each of their dimensions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.families.layer_rules import LayerRule

VOCAB = "vocab"
TEXT_VOCAB = "text vocab"
"""The vocabulary without its last rows, which are of images and sounds: some tables lack them."""

FFN = "ffn"
EXPERT = "expert"
SHARED = "shared"
DECODER_FFN = "decoder_ffn"
WIDE = "wide"
WIDTHS = (FFN, EXPERT, SHARED, DECODER_FFN, WIDE)
"""Channel axes: of the dense FFN, of each routed expert, of the expert that every token passes, of
a decoder's dense FFN where the encoder beside it has a width of its own, and of dense FFNs that are
twice as wide as config.json says."""

EXPERTS = "experts"
"""The axis of the routed experts: rows of a router, and matrices of a packed tensor. Experts in
tensors of their own have a number in place of a dimension."""

DECODER, ENCODER, ENCODER_DECODER, UNDIVIDED = KINDS = (
    *("decoder", "encoder", "encoder with a decoder"),
    "undivided model",
)
"""What a family makes of a text: the next token, a state for each token, or another text. Of an
undivided model, only the vocabulary is pruned, and no pass runs its layers one by one."""

HEAD = "head"
"""Block of the tensors of a head that no pass over a text needs: that of an encoder for masked
tokens, and that of an encoder with a decoder."""

GLINER = "gliner"
"""The family of every model with a gliner_config.json, whatever model type that file names."""

TIE_KEY = "tie_word_embeddings"
"""The key of config.json for whether lm_head and the embedding are one tensor."""

GROUPS = ("vocabulary", "attention", "ffn", "norms", "other")

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_PLACEHOLDERS = ("{layer}", "{expert}")


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor."""

    axis: str
    """One of VOCAB, TEXT_VOCAB, WIDTHS and EXPERTS."""
    copies: int = 1
    """How often the axis lies on this dimension: twice in a fused gate and up projection."""
    interleaved: bool = False
    """Whether a channel's copies are neighbours; else each copy has all channels in a row."""


@dataclass(frozen=True)
class Slot:
    """A tensor that a family has once, once per layer, or once per expert of a layer."""

    name: str
    """Tensor name; ``{layer}`` and ``{expert}`` stand for numbers."""
    group: str
    """One of GROUPS: whose parameters these are in the census."""
    axes: tuple[Dim | str | None, ...] = ()
    """By dimension; a name stands for ``Dim(name)``; None or missing: never pruned."""
    required: bool = True
    """Whether every layer that has another tensor of the same block must have it."""
    block: str = ""
    """A layer has all tensors of a block or none; it must have required ones without a block."""
    beside: tuple[str, ...] = ()
    """The tensor is needed only in a layer that has one of these blocks."""
    ffn_output: bool = False
    """Whether the *input* of this weight is the channels; the statistics sum its squares."""
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

    @cached_property
    def of_expert(self) -> bool:
        """Whether each routed expert has this tensor for itself."""
        return self.block == "experts" and _PLACEHOLDERS[1] in self.name

    @cached_property
    def packed(self) -> bool:
        """Whether the tensor holds one matrix or vector of each expert, one after the other."""
        return self.block == "packed" and Dim(EXPERTS) in self.dims

    @cached_property
    def router(self) -> bool:
        """Whether it is a part of the router that has an entry for each expert."""
        return Dim(EXPERTS) in self.dims and not self.packed

    @cached_property
    def counts_experts(self) -> bool:
        """Whether the number of its parameters is proportional to the number of experts."""
        return self.of_expert or Dim(EXPERTS) in self.dims


@dataclass(frozen=True)
class Width:
    """The key of config.json for the length of a channel axis."""

    key: str
    times: str = ""
    """Key of a factor for the length: DeepSeek's shared experts are one matrix. True is two."""


EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""All names that config classes have for the number of routed experts in a layer."""

PER_TOKEN_KEYS = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
)
"""All names for how many of them a token goes to."""

GROUP_KEYS = ("n_group", "num_expert_groups", "num_expert_group")
"""All names for the number of groups that experts are chosen in."""


@dataclass(frozen=True)
class ExpertGroups:
    """Experts in groups of neighbours: a token first chooses groups, then experts in these."""

    count: int | None
    """What the config class takes for ``key`` where config.json has no such key."""
    chosen: int | None
    """Likewise ``topk_group``, the number of groups that a token chooses."""
    least: int
    """Fewest experts of a group: 2 where its score is the sum of its two best experts'."""
    key: str = "n_group"
    """The class's own name for their number, one of ``GROUP_KEYS``."""


@dataclass(frozen=True)
class Experts:
    """How config.json describes the routed experts of a layer."""

    key: str
    """The class's own name for their number. Other names of ``EXPERT_KEYS`` are rewritten, too."""
    per_token: int | None
    """Experts of a token where config.json has none of ``PER_TOKEN_KEYS``; None: it must have."""
    groups: ExpertGroups | None = None
    """None where the model's router knows no groups."""
    least: int = 1
    """Fewest experts that the router's code can choose among."""


@dataclass(frozen=True)
class Family:
    """One model type."""

    slots: tuple[Slot, ...]
    tied: bool
    """Whether the config class ties embeddings where config.json has no such key."""
    widths: Mapping[str, Width] = field(default_factory=lambda: {FFN: Width("intermediate_size")})
    """Channel axis → its key in config.json; an axis without a key cannot be pruned."""
    experts: Experts | None = None
    """The routed experts; without an entry, none can be removed."""
    experts_stay: str = "the table of families has no entry for this model's experts"
    """Why none can be removed where there is no entry."""
    kind: str = DECODER
    """One of KINDS."""
    positions_after_pad: bool = False
    """Whether the table of positions has its first one after the id of the padding token."""
    between_layers: tuple[str, ...] = ()
    """Tensors that compute between two layers: a model with one cannot run layer by layer."""
    depth: str = "num_hidden_layers"
    """Key of config.json for the number of layers."""
    decoder_depth: str = ""
    """Key for the number of the decoder's layers, which come after those of the encoder beside it;
    a config.json without it has as many as the encoder."""
    layer_outputs: int = 2
    """How many values the library's model takes apart of what a layer returns."""
    only_vocabulary: str = ""
    """Why only the vocabulary is pruned, where there are no ``widths``."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefixes: tuple[tuple[str, str], ...] = ()
    """(prefix in the file, prefix in ``slots``): other spellings that checkpoints use."""
    section: str = ""
    """Part of config.json that describes the language model; "" is the whole."""
    text_type: str = ""
    """Model type to run the language model as, where ``section`` names another or none."""
    model_type: str = ""
    """The entry's key in the table; ``family_of`` sets it."""
    left_out: tuple[str, ...] = ()
    """Prefixes of tensors for multi-token prediction (MTP), outside the layers; not copied."""
    carried: tuple[str, ...] = ()
    """Prefixes of tensors that belong to no language model and are copied as they are."""
    draft_layers: str = ""
    """Key for the number of layers for multi-token prediction (MTP) after the last; not copied."""
    layer_rules: tuple[LayerRule, ...] | None = None
    """Keys by which layers differ; ``family_of`` sets them. None: layers cannot be removed, for a
    layer's kind may follow from its number."""
    rounds: str = ""
    """Flag by which the class rounds the width of config.json; a cut config has it off."""
    mixed: bool = False
    """Whether a layer may have no FFN."""
    double_wide: str = ""
    """Flag by which FFNs are twice as wide in layers that take the keys and values of others."""
    misread_vocab_sizes: tuple[int, ...] = ()
    """Sizes V' by which llama.cpp's converter tells other models of the family."""

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        """Slots by name."""
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Modules that hold the layers that are run one by one: the encoder's, then a decoder's."""
        named = (slot.name for slot in self.slots if _PLACEHOLDERS[0] in slot.name)
        found = tuple(dict.fromkeys(name.partition(".{layer}")[0] for name in named))
        return found if self.decoder_depth else found[:1]

    @property
    def layers(self) -> str:
        """The first of ``stacks``; "" where there is none."""
        return self.stacks[0] if self.stacks else ""

    @property
    def base(self) -> str:
        """First part of every name, which a decoder saved without its head lacks; "" for others."""
        if self.kind != DECODER or self.section:
            return ""
        return f"{self.embedding.partition('.')[0]}."

    def wide(self, slot: Slot) -> Slot:
        """Return the slot of a dense FFN with the channels of one that is twice as wide."""
        axes = tuple(replace(d, axis=WIDE) if d and d.axis == FFN else d for d in slot.dims)
        return replace(slot, axes=axes)

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        section = config.get(self.section) if self.section else config
        return section if isinstance(section, dict) else {}

    def spellings(self, name: str) -> list[str]:
        """Names that a tensor ``name`` of the file may have among ``slots``, likeliest first."""
        return [
            *(new + name[len(old) :] for old, new in self.prefixes if name.startswith(old)),
            name,
            *([self.base + name] if self.base else []),
        ]


@dataclass(frozen=True)
class Wrapper:
    """A model type that has a language model of another type in it."""

    carried: tuple[str, ...]
    """Prefixes of tensors outside the language model, which are copied as they are."""
    prefixes: tuple[tuple[str, str], ...]
    """(prefix in the file, prefix in the language model's slots)."""
    tied: bool
    """Whether the config class ties embeddings where config.json has no such key."""
    text_types: Mapping[str, str] = field(default_factory=dict)
    """Model type of the section → an equal one, for text, that stands alone."""
    section: str = "text_config"
    left_out: tuple[str, ...] = ()
    """Prefixes of tensors for multi-token prediction (MTP) beside it; not copied."""
    by_number: bool = False
    """Whether other parts of the model feed into the language model's layers by their number."""

    def around(self, family: Family, text_type: str) -> Family:
        """Return ``family`` adapted to a checkpoint of this type."""
        return replace(
            family,
            tied=self.tied,
            prefixes=self.prefixes,
            carried=(*self.carried, *(f"model.{name}" for name in self.carried)),
            section=self.section,
            text_type=text_type,
            left_out=(*family.left_out, *self.left_out),
            layer_rules=None if self.by_number else family.layer_rules,
        )


def template(name: str, most: int = len(_PLACEHOLDERS)) -> tuple[str, list[int]]:
    """Return ``name`` with ``{layer}`` and ``{expert}`` for its numbers, and the numbers.

    Only the first ``most`` numbers are replaced.
    """
    parts, numbers = name.split("."), list[int]()
    for index, part in enumerate(parts):
        if _NUMBER.fullmatch(part) and len(numbers) < most:
            parts[index] = _PLACEHOLDERS[len(numbers)]
            numbers.append(int(part))
    return ".".join(parts), numbers


def renumbered(name: str, *numbers: int) -> str:
    """Return a tensor's name with ``numbers`` for its first ones: the layer's, the expert's."""
    parts, given = name.split("."), iter(numbers)
    return ".".join(str(next(given, part)) if _NUMBER.fullmatch(part) else part for part in parts)
