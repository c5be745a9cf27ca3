"""Building blocks of the table of families: tensors that many model types share."""

from collections.abc import Iterable
from dataclasses import replace

from surgery.families.schema import EXPERT, EXPERTS, FFN, HEAD, SHARED, VOCAB, Dim, Slot

LAYER = "model.layers.{layer}."
BUFFER = "buffer"
"""Block of tensors that no model needs."""

OUTSIDE = (BUFFER, HEAD)
"""Blocks of tensors that no pass over a text needs."""


def adds_up(slot: Slot) -> bool:
    """Whether merging layers adds up this tensor; norms and buffers are the first layer's.

    LaCo's code also leaves norms out. But it takes each difference to the running sum, and so ends
    with the last layer's weights. This project computes the formula of the paper, with differences
    to the first layer.
    """
    return slot.block != BUFFER and slot.group != "norms"


def per_layer(group: str, *names: str, required: bool = True, at: str = LAYER) -> tuple[Slot, ...]:
    """Tensors that every layer has and that are never pruned."""
    return tuple(Slot(at + name, group, (), required) for name in names)


def one(name: str, *, required: bool = True) -> tuple[Slot, ...]:
    """A tensor outside the layers, such as a table of positions."""
    return (Slot(name, "other", (), required),)


def optional(group: str, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """Return ``slots`` with those of ``group`` not required."""
    return tuple(replace(s, required=s.required and s.group != group) for s in slots)


def attention(*names: str, at: str = LAYER) -> tuple[Slot, ...]:
    """Linear maps of the attention, each with a weight and an optional bias."""
    weights = per_layer("attention", *(f"{name}.weight" for name in names), at=at)
    return weights + per_layer("attention", *(f"{n}.bias" for n in names), required=False, at=at)


def norms(*names: str, at: str = LAYER) -> tuple[Slot, ...]:
    """Norms of every layer, each with a weight and an optional bias."""
    weights = per_layer("norms", *(f"{name}.weight" for name in names), at=at)
    return weights + per_layer("norms", *(f"{n}.bias" for n in names), required=False, at=at)


def older_norms(*names: str, at: str = "") -> tuple[Slot, ...]:
    """Norms, each with a weight and a bias; the first checkpoints call them gamma and beta."""
    leaves = ("weight", "bias", "gamma", "beta")
    return tuple(
        Slot(f"{at}{name}.{leaf}", "norms", required=False) for name in names for leaf in leaves
    )


def into(path: str, axis: str = FFN, *, block: str = "", at: str = LAYER) -> tuple[Slot, ...]:
    """A linear map into the channels: its rows, and its bias if any, are pruned."""
    return (
        Slot(f"{at}{path}.weight", "ffn", (axis, None), block=block),
        Slot(f"{at}{path}.bias", "ffn", (axis,), required=False, block=block),
    )


def fused(path: str, axis: str = FFN, *, block: str = "", at: str = LAYER) -> tuple[Slot, ...]:
    """Gate and up projection in one tensor: each half has one row per channel."""
    both = Dim(axis, copies=2)
    return (
        Slot(f"{at}{path}.weight", "ffn", (both, None), block=block),
        Slot(f"{at}{path}.bias", "ffn", (both,), required=False, block=block),
    )


def out_of(path: str, axis: str = FFN, *, block: str = "", at: str = LAYER) -> tuple[Slot, ...]:
    """A linear map out of the channels: its columns are pruned, its bias is kept."""
    return (
        Slot(f"{at}{path}.weight", "ffn", (None, axis), block=block, ffn_output=True),
        Slot(f"{at}{path}.bias", "ffn", (), required=False, block=block),
    )


def transposed(first: str, second: str, *, at: str) -> tuple[Slot, ...]:
    """An FFN of two Conv1D, whose weights are stored ``[in, out]``."""
    return (
        Slot(f"{at}{first}.weight", "ffn", (None, FFN)),
        Slot(f"{at}{first}.bias", "ffn", (FFN,), required=False),
        Slot(f"{at}{second}.weight", "ffn", (FFN, None), ffn_output=True),
        Slot(f"{at}{second}.bias", "ffn", (), required=False),
    )


def gated(path: str = "mlp", axis: str = FFN, *, block: str = "") -> tuple[Slot, ...]:
    """gate_proj, up_proj and down_proj of an FFN."""
    return (
        *into(f"{path}.gate_proj", axis, block=block),
        *into(f"{path}.up_proj", axis, block=block),
        *out_of(f"{path}.down_proj", axis, block=block),
    )


def experts(
    path: str = "mlp.experts",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[Slot, ...]:
    """Routed experts: tensors per expert, or packed into one as in transformers 5."""
    return (
        *into(f"{path}.{{expert}}.{gate}", EXPERT, block="experts"),
        *into(f"{path}.{{expert}}.{up}", EXPERT, block="experts"),
        *out_of(f"{path}.{{expert}}.{down}", EXPERT, block="experts"),
        *packed("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    )


def packed(gate_up: str, down: str, *, transposed: bool = False) -> tuple[Slot, ...]:
    """Experts of a layer in one tensor, ``[experts, out, in]`` or ``[experts, in, out]``."""
    both = Dim(EXPERT, copies=2)
    inner: tuple[Dim | str | None, ...] = (None, both) if transposed else (both, None)
    outer = (EXPERT, None) if transposed else (None, EXPERT)
    return (
        Slot(LAYER + gate_up, "ffn", (EXPERTS, *inner), block="packed"),
        Slot(LAYER + down, "ffn", (EXPERTS, *outer), block="packed", ffn_output=True),
    )


def shared(path: str = "mlp.shared_experts") -> tuple[Slot, ...]:
    """An expert that every token passes."""
    return gated(path, SHARED, block="shared")


def router(*names: str, required: bool = True) -> tuple[Slot, ...]:
    """The router of the experts: a row of each weight, and an entry of each bias, per expert."""
    return tuple(
        replace(slot, axes=(EXPERTS, None) if slot.name.endswith(".weight") else (EXPERTS,))
        for slot in beside_experts(*names, required=required)
    )


def beside_experts(*names: str, required: bool = True) -> tuple[Slot, ...]:
    """Tensors that only layers of experts have: counted with the FFN, never pruned."""
    beside = ("experts", "packed")
    return tuple(Slot(LAYER + name, "ffn", (), required, beside=beside) for name in names)


def as_buffers(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """The same slots, whose tensors transformers holds as buffers, not as parameters."""
    return tuple(replace(slot, is_parameter=False) for slot in slots)


def buffers(*names: str, at: str = LAYER) -> tuple[Slot, ...]:
    """Constants that older checkpoints store; transformers computes them itself."""
    return as_buffers(Slot(at + name, "attention", (), False, BUFFER) for name in names)


def ends(
    embedding: str = "model.embed_tokens",
    norm: str = "model.norm",
    head: str = "lm_head",
) -> tuple[Slot, ...]:
    """Embedding, final norm and head."""
    return (
        Slot(f"{embedding}.weight", "vocabulary", (VOCAB, None)),
        Slot(f"{head}.weight", "vocabulary", (VOCAB, None), required=False),
        Slot(f"{head}.bias", "vocabulary", (VOCAB,), required=False),
        Slot(f"{norm}.weight", "norms"),
        Slot(f"{norm}.bias", "norms", required=False),
    )


QKVO = attention(*(f"self_attn.{p}_proj" for p in "qkvo"))
PRE_NORM = norms("input_layernorm", "post_attention_layernorm")
POST_NORM = norms("post_attention_layernorm", "post_feedforward_layernorm")
QK_NORM = norms("self_attn.q_norm", "self_attn.k_norm")
FFN_NORMS = norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
INV_FREQ = buffers("self_attn.rotary_emb.inv_freq")

BASE = ends() + QKVO
"""Common to nearly all: embedding, final norm, head, and four projections of the attention."""

LLAMA = BASE + PRE_NORM + gated()
"""Llama's layout: gated FFN, norms before attention and FFN."""

LATENT = (
    ends()
    + PRE_NORM
    + attention("self_attn.o_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj")
    + norms("self_attn.kv_a_layernorm")
    + per_layer(
        "attention",
        *(f"self_attn.{n}" for n in ("q_proj.weight", "q_a_proj.weight", "q_a_proj.bias")),
        *(f"self_attn.{n}" for n in ("q_a_layernorm.weight", "q_b_proj.weight")),
        required=False,
    )
)
"""DeepSeek's multi-head latent attention; small models have one q_proj."""

MOE = gated(block="dense") + experts() + router("mlp.gate.weight")
"""Layers of experts; some layers may be dense instead."""
