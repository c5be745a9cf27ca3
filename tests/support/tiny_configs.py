"""The smallest sensible config of every decoder family: 3 layers, width 32, 640 tokens.

``TINY[key]`` are keyword arguments for ``AutoConfig.for_model``. The part of a key before a colon
is the model type; the part after it names a layout that the same model type can have, too. Ids of
bos, eos and pad are the caller's, and so is ``tie_word_embeddings``.

Flags that change what is computed (partial rotary tables, multipliers, soft caps, windows) have
values at which a mistake shows in the logits of 20 tokens.
"""

from typing import Any

Kwargs = dict[str, Any]

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
"""Layer types of a family with windows."""

_HEADS: Kwargs = {
    "vocab_size": 640,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_MHA: Kwargs = {**_HEADS, "intermediate_size": 96}
"""As many key and value heads as heads."""
_GQA: Kwargs = {**_MHA, "num_key_value_heads": 2}
"""Head dim 8 follows from the hidden size."""
_GQA_HEAD: Kwargs = {**_GQA, "head_dim": 8}
_WINDOWS: Kwargs = {"sliding_window": 16, "layer_types": MIXED}
_GPT: Kwargs = {"vocab_size": 640, "n_positions": 512, "n_embd": 32, "n_layer": 3, "n_head": 4}
_GEMMA: Kwargs = {**_GQA_HEAD, "query_pre_attn_scalar": 16}
_GEMMA4_UNIFIED: Kwargs = {
    **_GQA_HEAD,
    "global_head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 5.0,
}
_GEMMA4: Kwargs = {
    **_GEMMA4_UNIFIED,
    "vocab_size_per_layer_input": 640,
    "hidden_size_per_layer_input": 12,
}
_GEMMA4_SHARED: Kwargs = {
    "num_hidden_layers": 5,
    "layer_types": [*MIXED[:2], *MIXED[:1], *MIXED[:2]],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
"""The last two layers take the keys and values of others, and their FFN is twice as wide."""
_GRANITE: Kwargs = {
    **_GQA,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}
_LATENT: Kwargs = {
    **_MHA,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Multi-head latent attention; a query head has 12 dims, a value head 8."""
_TOP2: Kwargs = {"num_experts": 4, "num_experts_per_tok": 2}
_TOP2_LOCAL: Kwargs = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TOP2_ROUTED: Kwargs = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
"""Two groups of two experts, of which one is taken; the shared expert is 2 × 64 wide."""

_DENSE: dict[str, Kwargs] = {
    "llama": _GQA_HEAD,
    "mistral": {**_GQA_HEAD, "sliding_window": 16},
    "ministral": {**_GQA_HEAD, **_WINDOWS},
    "ministral3": {
        **_GQA_HEAD,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2": {**_GQA, **_WINDOWS, "use_sliding_window": True},
    "qwen3": {**_GQA_HEAD, **_WINDOWS, "use_sliding_window": True},
    "gemma": _GQA_HEAD,
    "gemma2": {
        **_GEMMA,
        **_WINDOWS,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_GEMMA, **_WINDOWS},
    "gemma4_text": _GEMMA4,
    "gemma4_text:shared": {**_GEMMA4, **_GEMMA4_SHARED},
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "gemma4_unified_text:shared": {**_GEMMA4_UNIFIED, **_GEMMA4_SHARED},
    "gemma4_text:mixture": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "vaultgemma": {
        **_GEMMA,
        **_WINDOWS,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {**_GQA, "sliding_window": 16, "partial_rotary_factor": 0.75},
    "granite": _GRANITE,
    "granite_swa": {**_GRANITE, **_WINDOWS, "layer_rope_theta": [10000.0, 0.0, 100.0]},
    "olmo": {**_GQA, "clip_qkv": 1.0},
    "olmo2": _GQA,
    "olmo3": {**_GQA, **_WINDOWS},
    "smollm3": {**_GQA, **_WINDOWS, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "stablelm": {**_GQA, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "stablelm:parallel": {
        **_GQA,
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
    },
    "cohere": {**_GQA, "logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {**_GQA, **_WINDOWS, "logit_scale": 0.5},
    "glm": {**_GQA_HEAD, "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {**_GQA_HEAD, "attention_bias": True, "partial_rotary_factor": 0.5},
    "exaone4": {**_GQA, **_WINDOWS},
    "gpt2": {**_GPT, "n_inner": 96},
    "gpt_neox": {**_MHA, "attention_bias": True, "rotary_pct": 0.5},
    "opt": {**_HEADS, "ffn_dim": 96},
    "opt:350m": {
        **_HEADS,
        "ffn_dim": 96,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "falcon": {
        **_HEADS,
        "num_kv_heads": 2,
        "ffn_hidden_size": 96,
        "new_decoder_architecture": True,
    },
    "falcon:old": {**_HEADS, "ffn_hidden_size": 96, "multi_query": True, "parallel_attn": True},
    "falcon:alibi": {
        **_HEADS,
        "ffn_hidden_size": 96,
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
    },
    "bloom": {"vocab_size": 640, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "phi": {**_GQA, "partial_rotary_factor": 0.5},
    "ernie4_5": {**_GQA_HEAD, "use_bias": False},
    "hunyuan_v1_dense": _GQA_HEAD,
    "seed_oss": {**_GQA_HEAD, "attention_bias": True},
    "arcee": _GQA_HEAD,
    "nemotron": {**_GQA_HEAD, "partial_rotary_factor": 0.5},
    "starcoder2": {**_GQA, "use_bias": True, "sliding_window": 16},
    "helium": _GQA_HEAD,
    "persimmon": {**_MHA, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "gptj": {**_GPT, "n_inner": 96, "rotary_dim": 4},
    "codegen": {**_GPT, "n_ctx": 512, "n_inner": 96, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT, "n_inner": 96, "multi_query": True},
    "internlm3": _GQA_HEAD,
    "apertus": _GQA,
    "diffllama": _GQA_HEAD,
    "mpt": {"vocab_size": 640, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512},
    "biogpt": _MHA,
    "gpt_neo": {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 512,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 16,
    },
    "jais2": {**_GQA_HEAD, "attention_bias": True, "mlp_bias": True},
    "youtu": _LATENT,
    "nanochat": {**_GQA, "final_logit_softcapping": 5.0},
}

MOE: dict[str, Kwargs] = {
    "mixtral": {**_GQA_HEAD, **_TOP2_LOCAL, "sliding_window": 16},
    "qwen2_moe": {
        **_GQA,
        **_TOP2,
        **_WINDOWS,
        "use_sliding_window": True,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        **_GQA_HEAD,
        **_TOP2,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "olmoe": {**_GQA, **_TOP2},
    "deepseek_v2": {
        **_LATENT,
        **_TOP2_ROUTED,
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {**_LATENT, **_TOP2_ROUTED, "first_k_dense_replace": 1},
    "gpt_oss": {**_GQA_HEAD, **_TOP2_LOCAL, **_WINDOWS, "attention_bias": True},
    "llama4_text": {
        **_GQA_HEAD,
        **_TOP2_LOCAL,
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "moe_layers": [1, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 16,
        "floor_scale": 4,
    },
    "granitemoe": {**_GRANITE, **_TOP2_LOCAL},
    "granitemoeshared": {**_GRANITE, **_TOP2_LOCAL, "shared_intermediate_size": 48},
    "glm4_moe": {
        **_GQA_HEAD,
        **_TOP2_ROUTED,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "dots1": {**_GQA_HEAD, **_TOP2_ROUTED, **_WINDOWS, "first_k_dense_replace": 1},
    "phimoe": {**_GQA, **_TOP2_LOCAL, "attention_bias": True, "lm_head_bias": True},
    "ernie4_5_moe": {
        **_GQA,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {**_GQA_HEAD, "num_experts": 4, "moe_topk": 2},
    "minimax_m2": {**_GQA_HEAD, **_TOP2_LOCAL, "partial_rotary_factor": 0.5},
    "exaone_moe": {
        **_GQA,
        **_TOP2,
        **_WINDOWS,
        "moe_intermediate_size": 64,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "flex_olmo": {**_GQA, **_TOP2},
    "solar_open": {k: v for k, v in _GQA_HEAD.items() if k != "intermediate_size"} | _TOP2_ROUTED,
    "afmoe": {
        **_GQA_HEAD,
        **_TOP2,
        **_WINDOWS,
        "moe_intermediate_size": 64,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "cohere2_moe": {
        **_GQA_HEAD,
        **_TOP2,
        **_WINDOWS,
        "intermediate_size": 64,
        "prefix_dense_intermediate_size": 96,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_shared_experts": 2,
        "logit_scale": 0.5,
    },
    "qwen3_next": {
        **_GQA_HEAD,
        **_TOP2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
}
"""Layer 0 is dense where the family can have dense layers."""

_IMAGE: Kwargs = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_IMAGE: Kwargs = {"depth": 2, "num_heads": 4, "patch_size": 4}
_QWEN_IDS: Kwargs = {
    "image_token_id": 4,
    "video_token_id": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
}
_MROPE: Kwargs = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""The sections share half a head's dims among time, height and width."""

WRAPPERS: dict[str, Kwargs] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_DENSE["gemma3_text"]},
        "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
        "mm_tokens_per_image": 4,
        "image_token_index": 4,
        "boi_token_index": 5,
        "eoi_token_index": 6,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_DENSE["mistral"]},
        "vision_config": {"model_type": "pixtral", **_IMAGE},
        "image_token_index": 4,
    },
    "llama4": {
        "text_config": {"model_type": "llama4_text", **MOE["llama4_text"]},
        "vision_config": {
            "model_type": "llama4_vision_model",
            **_IMAGE,
            "intermediate_size": 128,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
        },
        "image_token_index": 4,
        "boi_token_index": 5,
        "eoi_token_index": 6,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_DENSE["llama"]},
        "vision_config": {"model_type": "clip_vision_model", **_IMAGE, "projection_dim": 32},
        "image_token_index": 4,
        "image_seq_length": 16,
    },
    "qwen2_vl": {
        "text_config": {"model_type": "qwen2_vl_text", **_GQA, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_IMAGE, "embed_dim": 32, "hidden_size": 32},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **_GQA, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_IMAGE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", **_GQA_HEAD, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_IMAGE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_IDS,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_DENSE["qwen2"]},
        "vision_config": {
            "model_type": "internvl_vision",
            **_IMAGE,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        "image_token_id": 4,
        "image_seq_length": 4,
    },
}
"""Text models inside image models; what marks an image is a byte's token, which always stays."""

TINY: dict[str, Kwargs] = {**_DENSE, **MOE, **WRAPPERS}
"""Dense families, mixtures of experts, wrappers."""
