"""Tiny checkpoints of each type that can be exported as GGUF, and what llama.cpp makes of them."""

from pathlib import Path
from typing import Any

import torch

from tests.support import tiny

FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * tiny.LAYERS}
SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": FULL,
    "qwen3": FULL,
    "qwen2_moe": {**FULL, **SPARSE, "norm_topk_prob": False},
    "qwen3_moe": {**SPARSE, "norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 8, "tied": True},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "olmo2": {},
    "smollm3": {**FULL, "no_rope_layers": [1, 1, 1]},
    "granite": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}
"""Model type → what its tiny config needs so that llama.cpp computes the same."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
}
"""Module in transformers, without its layer and expert → its name in GGUF."""

AFTER_ATTENTION = ("gemma2", "gemma3_text", "olmo2", "gpt_oss")
"""Types that have a norm after the attention; in GGUF it has a name of its own."""

INTERLEAVED = ("llama", "mistral", "mixtral", "smollm3", "granite")


def save(path: Path, key: str, **changes: Any) -> Path:
    """Save a tiny checkpoint that llama.cpp computes as transformers does."""
    return tiny.save(path, key, **{**CHANGES[key], **changes})


def expected(key: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the GGUF file must hold in float32, by name, computed with torch."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(tensors, key=_by_number):
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        bare = ".".join(part for part in parts if not part.isdigit())
        bare = bare.replace("model.layers.", "")
        values = _edited(key, bare, tensors[name].float())
        for module, kept in _split(bare, values):
            stem, suffix = _names(key, module)
            full = f"blk.{numbers[0]}.{stem}.{suffix}" if numbers else f"{stem}.{suffix}"
            if len(numbers) == 2:
                experts.setdefault(full, []).append(kept)
            else:
                found[full] = kept
    return found | {name: torch.stack(each) for name, each in experts.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _names(key: str, module: str) -> tuple[str, str]:
    stem, suffix = module, "weight"
    if module.rpartition(".")[2] in ("weight", "bias"):
        stem, _, suffix = module.rpartition(".")
    elif module.endswith("_bias"):
        stem, suffix = module.removesuffix("_bias"), "bias"
    if stem == "post_attention_layernorm" and key in AFTER_ATTENTION:
        return "post_attention_norm", suffix
    if stem == "post_feedforward_layernorm" and key == "olmo2":
        return "post_ffw_norm", suffix
    return NAMES[stem], suffix


def _edited(key: str, bare: str, values: torch.Tensor) -> torch.Tensor:
    if key.startswith("gemma") and bare.endswith("norm.weight"):
        return values + 1
    heads = {"q_proj": 4, "k_proj": 2}.get(bare.split(".")[-2] if "." in bare else "")
    if heads and key in INTERLEAVED:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    return values


def _split(bare: str, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """gpt-oss packs experts as ``[experts, in, out]``; gate and up take turns in ``out``."""
    if "experts.gate_up_proj" in bare:
        gate, up = values[..., ::2], values[..., 1::2]
        if not bare.endswith("_bias"):
            gate, up = gate.transpose(1, 2), up.transpose(1, 2)
        return [(bare.replace("gate_up", name), v) for name, v in (("gate", gate), ("up", up))]
    if bare == "mlp.experts.down_proj":
        return [(bare, values.transpose(1, 2))]
    return [(bare, values)]
