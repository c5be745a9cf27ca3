"""The table of named axes: per model type, which tensor carries which axis on which dimension.

Every other module asks this table; a new family is one entry in ``FAMILIES``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgery.default_ids import DEFAULT_IDS
from surgery.errors import FamilyError
from surgery.header import TensorRef

VOCAB = "vocab"
FFN = "ffn"
GROUPS = ("vocabulary", "attention", "ffn", "norms")


@dataclass(frozen=True)
class Slot:
    """A tensor that a family has once, or once per layer."""

    name: str
    """Tensor name; ``{layer}`` stands for the layer's number."""
    group: str
    """One of GROUPS: whose parameters these are in the census."""
    axes: tuple[str | None, ...] = ()
    """Axis name by dimension, None or missing where nothing is ever cut."""
    required: bool = True

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of this slot's tensors; group 1 is the layer, if it has one."""
        return re.compile(re.escape(self.name).replace(r"\{layer\}", "(0|[1-9][0-9]*)"))


@dataclass(frozen=True)
class Family:
    """What surgery must know of one model type."""

    slots: tuple[Slot, ...]
    tied: bool
    """Whether the config class ties embeddings when config.json does not say."""
    default_ids: Mapping[str, int] = field(default_factory=dict)
    """Token ids that the config class fills in when config.json does not name them."""
    sizes: Mapping[str, str] = field(
        default_factory=lambda: {VOCAB: "vocab_size", FFN: "intermediate_size"}
    )
    """Axis name → the key of config.json that holds its length."""
    misread_vocab_sizes: Mapping[int, str] = field(default_factory=dict)
    """Sizes V' by which another program tells models apart → what it would take this one for."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layers: str = "model.layers"
    """Module that holds the decoder layers, for the streamed decoder."""

    def slot(self, tensor: TensorRef) -> tuple[Slot, int | None]:
        """Return the slot of ``tensor`` and its layer (None outside the layers).

        Raises:
            FamilyError: the family has no such tensor.
        """
        for slot in self.slots:
            match = slot.pattern.fullmatch(tensor.name)
            if match:
                return slot, int(match[1]) if match.groups() else None
        raise FamilyError(
            f"{tensor.path}: tensor {tensor.name}",
            "is not a tensor of this model's family",
            fix="add it to the family's slots in surgery/families.py if it belongs there",
        )

    @cached_property
    def ffn_output(self) -> str:
        """Tensor whose *input* is the FFN axis: the statistic is the square of that input."""
        return next(s.name for s in self.slots if len(s.axes) == 2 and s.axes[1] == FFN)


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """Return the table's entry for ``config["model_type"]``; ``where`` names the file in errors.

    Raises:
        FamilyError: the table has no such model type.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise FamilyError(
            where, "names no model_type", expected=f"one of {', '.join(FAMILIES)}", fix="add it"
        )
    if model_type not in FAMILIES:
        raise FamilyError(
            where,
            "model type is not supported",
            expected=f"one of {', '.join(FAMILIES)}",
            found=model_type,
            fix="add one entry to FAMILIES in surgery/families.py",
        )
    return FAMILIES[model_type]


def _per_layer(group: str, *names: str, required: bool = True) -> tuple[Slot, ...]:
    return tuple(Slot(f"model.layers.{{layer}}.{n}", group, (), required) for n in names)


_DECODER = (
    Slot("model.embed_tokens.weight", "vocabulary", (VOCAB, None)),
    Slot("lm_head.weight", "vocabulary", (VOCAB, None), required=False),
    Slot("model.layers.{layer}.mlp.gate_proj.weight", "ffn", (FFN, None)),
    Slot("model.layers.{layer}.mlp.up_proj.weight", "ffn", (FFN, None)),
    Slot("model.layers.{layer}.mlp.down_proj.weight", "ffn", (None, FFN)),
    Slot("model.layers.{layer}.mlp.gate_proj.bias", "ffn", (FFN,), required=False),
    Slot("model.layers.{layer}.mlp.up_proj.bias", "ffn", (FFN,), required=False),
    *_per_layer("ffn", "mlp.down_proj.bias", required=False),
    *_per_layer("attention", *(f"self_attn.{p}_proj.weight" for p in "qkvo")),
    *_per_layer("attention", *(f"self_attn.{p}_proj.bias" for p in "qkvo"), required=False),
    *_per_layer("norms", "input_layernorm.weight", "post_attention_layernorm.weight"),
    Slot("model.norm.weight", "norms"),
)
"""The layout that Llama made common: gated FFN, pre-norm, optional biases."""

_QK_NORM = _per_layer("norms", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
_INV_FREQ = _per_layer("attention", "self_attn.rotary_emb.inv_freq", required=False)
_FFN_NORMS = _per_layer(
    "norms", "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"
)

_MISREAD = {
    32016: "llama.cpp's converter takes it for CodeLlama",
    49152: "llama.cpp's converter switches the bos token off",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        _DECODER + _INV_FREQ,
        tied=False,
        default_ids=DEFAULT_IDS["llama"],
        misread_vocab_sizes=_MISREAD,
    ),
    "mistral": Family(
        _DECODER,
        tied=False,
        default_ids=DEFAULT_IDS["mistral"],
        misread_vocab_sizes=_MISREAD,
    ),
    "qwen2": Family(_DECODER, tied=False),
    "qwen3": Family(_DECODER + _QK_NORM, tied=False),
    "gemma3_text": Family(
        _DECODER + _QK_NORM + _FFN_NORMS,
        tied=True,
        default_ids=DEFAULT_IDS["gemma3_text"],
    ),
}
"""model_type → family."""
