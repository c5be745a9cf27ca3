"""A config of each model type that transformers registers: its class's defaults, with fewer layers.

``OVERRIDES`` holds what a class's own defaults lack to build a model.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel
from transformers.utils import is_timm_available

Kwargs = dict[str, Any]


def _without_weights(tower: Any, config: Any) -> None:
    PreTrainedModel.__init__(tower, config)
    tower.timm_model = nn.Linear(1, 1)
    PreTrainedModel.post_init(tower)


if not is_timm_available():  # no text passes a vision tower
    setattr(TimmWrapperModel, "__init__", _without_weights)  # noqa: B010

CAUSAL: Mapping[str, Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE: Mapping[str, Any] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("depth", "encoder_layers", "decoder_layers", "num_layer", "num_blocks"),
)
"""Keys for numbers of layers."""

LAYERS = 4
"""Layers that a config keeps; more where it has further kinds of layers."""

MOST_KINDS = 6
"""A list with more different entries than this describes no kinds of layers."""

_HEAD_DIM = {"head_dim": 128}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_INDEXED = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
OVERRIDES: Mapping[str, Kwargs] = {
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"text_config": _ROPES},
    "cohere_compass_text": _ROPES,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 256}
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 6,
        }
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hunyuan_vl": {"text_config": _HEAD_DIM},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 2,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_vl": {"text_config": {"block_auto_adjust_ff_dim": False}},
    "ministral": _HEAD_DIM,
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"embed_dim": 192},
        }
    },
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True},
}
"""Model type → keys without which its class's defaults build no model."""

WHOLE = ("aya_vision", "zamba", "dots3_note", "dots3_note_text")
"""Types whose configs make no model with fewer layers."""


def registered() -> dict[str, Any]:
    """Every type with a causal or an image-to-text class → the auto class that builds it whole."""
    found = dict.fromkeys(CAUSAL, AutoModelForCausalLM)
    return dict(sorted((found | dict.fromkeys(IMAGE, AutoModelForImageTextToText)).items()))


@cache
def _default(model_type: str) -> str:
    made = CONFIG_MAPPING[model_type]().to_dict()
    return json.dumps(made if model_type in WHOLE else shortened(made))


def default_config(model_type: str) -> Kwargs:
    """Return the keys of a config with the class's defaults, but fewer layers."""
    return merged(json.loads(_default(model_type)), OVERRIDES.get(model_type, {}))


def shortened(config: Kwargs) -> Kwargs:
    """Return ``config`` with few layers, yet of all kinds, in it and in its sections."""
    result = {k: shortened(v) if isinstance(v, dict) else v for k, v in config.items()}
    for key in DEPTHS:
        depth: Any = result.get(key)
        if type(depth) is not int or depth <= LAYERS:
            continue
        lists = {k: v for k, v in result.items() if isinstance(v, list) and len(v) == depth}
        keep = max([LAYERS, *map(_needed, lists.values())])
        result |= {k: v[:keep] for k, v in lists.items()} | {key: min(depth, keep)}
    by_number = result.get("per_layer_config")
    if isinstance(by_number, dict):
        depth = result["num_hidden_layers"]
        result["per_layer_config"] = {
            k: v for k, v in by_number.items() if not str(k).isdigit() or int(k) < depth
        }
    return result


def _needed(entries: list[Any]) -> int:
    """How many of the entries show every kind of layer."""
    kinds = set(map(str, entries))
    if len(kinds) > MOST_KINDS:
        return 0
    return 1 + max(list(map(str, entries)).index(kind) for kind in kinds)


def merged(config: Kwargs, changes: Mapping[str, Any]) -> Kwargs:
    """Return ``config`` with ``changes``, section by section."""
    result = dict(config)
    for key, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inside else value
    return result
