"""A tiny config of any registered type: its class's defaults with every size made small.

Sizes are chosen by the names of their keys. ``CHANGES`` holds what a class wants otherwise.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import AutoConfig

from tests.support.tiny_configs import TINY
from tools.derive.configs import Kwargs, default_config, merged

VOCAB_SIZE = 640

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|src_vocab_size", VOCAB_SIZE),
    (r"shared_expert_intermediate_size|shared_intermediate_size|share_expert_dim", 48),
    (r"(moe|expert)\w*_(intermediate_size|ffn_hidden_size|ffn_dim)|expert_\w*dim", 64),
    (
        r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|n_inner|\w*ffn_hidden_size|\w*inner_dim|d_inner",
        96,
    ),
    (r"mamba_(n|num)_heads", 4),
    (r"mamba_(d_head|head_dim)", 16),
    (r"(mamba_)?n_groups", 1),
    (r"qk_rope_head_dim", 4),
    (r"(\w+_)?head_(dim|size)|d_kv|attention_head_dim|linear_\w+_head_dim|qk_nope_head_dim", 8),
    (r"(\w+_)?(key_value_heads|kv_heads)|kv_n_heads|multi_query_group_num", 2),
    (r"linear_num_key_heads", 2),
    (r"(\w+_)?(num_)?(attention_|key_|value_)?heads(_per_layer)?|n_heads?", 4),
    (r"q_lora_rank", 16),
    (r"\w+_rank", 12),
    (r"(num|n)_(\w+_)?experts_per_tok(en)?|top_?k(_experts)?|moe_(top_?)?k|moe_router_topk", 2),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts|num_experts", 4),
    (r"n_group|num_expert_groups?", 2),
    (r"topk_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length", 512),
    (r"sliding_window(_size)?|attention_chunk_size|window_size", 16),
    (
        r"(\w+_)?hidden_(size|dim)|d_model|n_embd|dim|embed(ding)?_dim|embedding_size|lru_width|model_dim",
        32,
    ),
    (r"image_size", 16),
    (r"patch_size", 4),
)
"""(pattern of a key, its size in a tiny config), the first that matches the whole key."""

_MROPE: Kwargs = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""The sections share half a head's dims among time, height and width."""

_HALF_MROPE = _MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}

CHANGES: dict[str, Kwargs] = {
    "emu3": {"vq_config": {"base_channels": 32, "codebook_size": 64, "channel_multiplier": [1, 1]}},
    "granite4_vision": {"vision_config": {"hidden_size": 64}, "downsample_rate": "2/4"},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v4": {
        "partial_rotary_factor": 0.5,
        "rope_parameters": {key: {"partial_rotary_factor": 0.5} for key in ("main", "compress")},
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            *("heavily_compressed_attention", "sliding_attention"),
            *("compressed_sparse_attention", "heavily_compressed_attention"),
        ],
        "mlp_layer_types": ["hash_moe", "moe"] * 2,
    },
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2}},
    "dots3_note_text": {"head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 32},
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 1, 1]}}},
    "janus": {
        "vision_config": {"projection_dim": 32},
        "vq_config": {"num_embeddings": 64, "image_token_embed_dim": 32, "projection_dim": 32},
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "mamba2": {"head_dim": 16},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "xglm": {"max_position_embeddings": 1024},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE}},
}
"""Model type → keys with other values."""

IDS: Kwargs = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

_SIZE_OF = tuple((re.compile(pattern), size) for pattern, size in SIZES)
_ID = re.compile(r"\w*token_(id|index)|\w*_ids?")
FIRST_FREE_ID = 4
"""A byte's token, which always stays; before it are the special ones."""


def tiny_config(model_type: str) -> Kwargs:
    """Return the keys of a tiny config; ids of bos, eos and pad are left to the caller."""
    changes = CHANGES.get(model_type, {})
    return merged(_small(default_config(model_type)), changes)


def tiny_configs(model_type: str) -> list[Kwargs]:
    """Return all tiny configs of the tests for a model type, with every key of their class."""
    keys = [key for key in TINY if key.partition(":")[0] == model_type]
    values = [deepcopy(TINY[key]) for key in keys] or [tiny_config(model_type)]
    made = [IDS | keys | {"model_type": model_type} for keys in values]
    return [AutoConfig.for_model(**keys).to_dict() for keys in made]


def _small(config: Mapping[str, Any]) -> Kwargs:
    result: Kwargs = {}
    ids = iter(range(FIRST_FREE_ID, 100))
    heads = {key: config.get(key) for key in ("num_attention_heads", "num_key_value_heads")}
    for key, value in config.items():
        if isinstance(value, dict):
            result[key] = _small(value)
        elif _ID.fullmatch(str(key)) and type(value) is int and value >= 0:
            result[key] = next(ids)
        elif _ID.fullmatch(str(key)) and isinstance(value, list):
            result[key] = [next(ids) for _ in value]
        elif key == "mrope_section" and isinstance(value, list):
            result[key] = [2, 1, 1]
        else:
            result[key] = _sized(str(key), value)
    if len(set(heads.values())) == 1 and result.get("num_attention_heads"):
        result["num_key_value_heads"] = result["num_attention_heads"]
    if config.get("head_dim") == config.get("qk_rope_head_dim"):
        result["head_dim"] = result.get("qk_rope_head_dim")
    return {key: value for key, value in result.items() if key in config}


def _sized(key: str, value: Any) -> Any:
    number = value[0] if isinstance(value, list) and value else value
    if type(number) is not int or number <= 0:
        return value
    size = next((size for pattern, size in _SIZE_OF if pattern.fullmatch(key)), number)
    size = min(size, number)
    return [size] * len(value) if isinstance(value, list) else size
