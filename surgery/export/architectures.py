"""The table of GGUF architectures: how llama.cpp runs each model type, and what it cannot be told.

Read from llama.cpp's ``conversion/`` and ``src/models/``, as in llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.errors import FamilyError
from surgery.layout.layout import Layout


@dataclass(frozen=True)
class Key:
    """A key of the file, without the architecture's name in front of it."""

    name: str
    type: type[int] | type[float]
    sources: tuple[str, ...]
    """Keys of config.json; the first that is there gives the value."""
    required: bool = True


@dataclass(frozen=True)
class Windows:
    """Layers that attend through a window; the others attend to the whole text."""

    period: int
    """Every layer whose number + 1 is a multiple of it is full, where config.json has no list."""
    period_keys: tuple[str, ...] = ()
    """Keys of config.json that may hold another period."""


@dataclass(frozen=True)
class CountedRope:
    """The runtime leaves out the rotary embedding of every ``step``-th layer; no key says which."""

    key: str
    """Key of config.json: for each layer 1 with it, 0 without it."""
    step: int


@dataclass(frozen=True)
class CountedScale:
    """The runtime takes the scale of attention from other sizes, and these by the layers' number.

    With ``layers`` layers it is by hidden_size ÷ num_attention_heads, else by head_dim.
    """

    layers: int


@dataclass(frozen=True)
class Architecture:
    """How one model type is written."""

    name: str
    """Of the architecture in GGUF."""
    interleaved_heads: bool = False
    """Whether the rows of q and k are stored in pairs, one row of each half of a head."""
    norm_offset: float = 0.0
    """What is added to the weight of every norm."""
    own_head: bool = False
    """Whether the runtime needs an output matrix even where the embedding is one."""
    keys: tuple[Key, ...] = ()
    """Besides ``COMMON``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the config class fills in where config.json has no such key."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json → the values that the runtime computes with; None stands for no key."""
    windows: Windows | None = None
    counted: CountedRope | CountedScale | None = None
    """What the runtime counts by the number of layers, and cannot be told."""
    partial_rope: bool = False
    """Whether transformers heeds partial_rotary_factor."""
    full_beyond: bool = False
    """Whether the runtime has no windows for the type: it always attends to the whole text."""
    encoder: bool = False
    """Whether it is one like BERT: all tokens see each other, positions are a table, and its
    output is embeddings."""


_SILU = {"hidden_act": ("silu", "swish", None)}
_NO_WINDOWS = {"use_sliding_window": (False, None)}
_SPARSE = {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}
_GEMMA = {
    "use_bidirectional_attention": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}
_CAPS = tuple(
    Key(key, float, (key,)) for key in ("attn_logit_softcapping", "final_logit_softcapping")
)
_EXPERTS = (
    Key("expert_count", int, ("num_local_experts", "num_experts")),
    Key("expert_used_count", int, ("num_experts_per_tok",)),
)
_EXPERT_WIDTH = Key("expert_feed_forward_length", int, ("moe_intermediate_size",))
_SHARED_WIDTH = Key("expert_shared_feed_forward_length", int, ("shared_expert_intermediate_size",))
_MULTIPLIERS = (
    Key("attention.scale", float, ("attention_multiplier",)),
    Key("embedding_scale", float, ("embedding_multiplier",)),
    Key("residual_scale", float, ("residual_multiplier",)),
    Key("logit_scale", float, ("logits_scaling",)),
)
_THETA = {"rope_theta": 10000.0}
_BERT = Architecture(
    "bert",
    encoder=True,
    defaults={"layer_norm_eps": 1e-12},
    required={
        "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", None),
        "activation": ("gelu", None),
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),
    },
)
_GEMMA_SIZES = {
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved_heads=True, defaults=_THETA, required=_SILU),
    "mistral": Architecture(
        "llama", interleaved_heads=True, defaults=_THETA, required=_SILU, full_beyond=True
    ),
    "mixtral": Architecture(
        "llama",
        interleaved_heads=True,
        keys=_EXPERTS,
        defaults={"rope_theta": 1e6},
        required=_SILU,
        full_beyond=True,
    ),
    "qwen2": Architecture("qwen2", defaults=_THETA, required=_SILU | _NO_WINDOWS),
    "qwen3": Architecture("qwen3", defaults=_THETA, required=_SILU | _NO_WINDOWS),
    "qwen2_moe": Architecture(
        "qwen2moe",
        own_head=True,
        keys=(*_EXPERTS, _EXPERT_WIDTH, _SHARED_WIDTH),
        defaults=_THETA,
        required=_SILU | _NO_WINDOWS | _SPARSE | {"norm_topk_prob": (False, None)},
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        keys=(*_EXPERTS, _EXPERT_WIDTH),
        defaults=_THETA,
        required=_SILU | _NO_WINDOWS | _SPARSE | {"norm_topk_prob": (True,)},
    ),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        keys=_CAPS,
        defaults={
            **_GEMMA_SIZES,
            **_THETA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        required=_GEMMA,
        windows=Windows(2),
        counted=CountedScale(46),
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        keys=(replace(_CAPS[1], required=False),),
        defaults={
            **_GEMMA_SIZES,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        required=_GEMMA | {"attn_logit_softcapping": (None,)},
        windows=Windows(6, ("sliding_window_pattern",)),
        counted=CountedScale(62),
    ),
    "phi3": Architecture(
        "phi3", defaults=_THETA, required=_SILU, partial_rope=True, full_beyond=True
    ),
    "olmo2": Architecture("olmo2", own_head=True, defaults=_THETA, required=_SILU),
    "smollm3": Architecture(
        "smollm3",
        interleaved_heads=True,
        defaults={"rope_theta": 2e6},
        required=_SILU | _NO_WINDOWS,
        counted=CountedRope("no_rope_layers", 4),
    ),
    "granite": Architecture(
        "granite",
        interleaved_heads=True,
        keys=_MULTIPLIERS,
        defaults=_THETA,
        required=_SILU,
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        own_head=True,
        keys=(*_EXPERTS, Key("expert_feed_forward_length", int, ("intermediate_size",))),
        defaults={"rope_theta": 150000.0},
        windows=Windows(2),
    ),
    **dict.fromkeys(("bert", "distilbert", "roberta", "xlm-roberta", "camembert"), _BERT),
}
"""Model type → how it is written."""

NOT_IN_RUNTIME = {
    "mpnet": "attention by relative positions",
    "deberta-v2": "attention by relative positions",
    "big_bird": "attention to blocks",
}
"""Model type that embeds text → what llama.cpp lacks for it."""

COMMON = (
    Key("context_length", int, ("max_position_embeddings",)),
    Key("embedding_length", int, ("hidden_size",)),
    Key("feed_forward_length", int, ("intermediate_size",)),
    Key("attention.head_count", int, ("num_attention_heads",)),
    Key("attention.head_count_kv", int, ("num_key_value_heads", "num_attention_heads")),
    Key("attention.layer_norm_rms_epsilon", float, ("rms_norm_eps",)),
)
"""Keys that every decoder has."""

OF_ENCODERS = (
    Key("embedding_length", int, ("hidden_size", "dim")),
    Key("feed_forward_length", int, ("intermediate_size", "hidden_dim")),
    Key("attention.head_count", int, ("num_attention_heads", "n_heads")),
    Key("attention.layer_norm_epsilon", float, ("layer_norm_eps",)),
)
"""Keys that every encoder has; DistilBERT has other names in config.json."""


def architecture_of(layout: Layout, pre: str | None) -> Architecture:
    """Return the entry of the model's type; ``pre`` is the name of its pre-tokenizer, if known.

    Raises:
        FamilyError: there is none; it names what llama.cpp's own converter would need.
    """
    model_type = layout.family.text_type or layout.family.model_type
    found = ARCHITECTURES.get(model_type)
    if missing := NOT_IN_RUNTIME.get(model_type):
        raise FamilyError(
            layout.where,
            f"llama.cpp has no {missing}",
            found=model_type,
            fix="serve it with sentence-transformers or transformers",
        )
    if found is None:
        needs = f", whose get_vocab_base_pre has to return {pre!r}" if pre else ""
        raise FamilyError(
            layout.where,
            "model type cannot be exported as GGUF",
            expected=", ".join(ARCHITECTURES),
            found=model_type,
            fix=f"use llama.cpp's convert_hf_to_gguf.py{needs}",
        )
    return found
