"""Configs with the dimensions of published models, and one of any dimensions."""

from typing import Any

from tools.synthetic_tokenizer import SPECIAL_TOKENS


def llama_config(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    **changes: Any,
) -> dict[str, Any]:
    """Return a config.json of model type llama; ``changes`` replaces or adds keys.

    bos and eos are the first two of the synthetic tokenizer's special tokens, which end at
    ``vocab_size`` where that allows it.
    """
    special = max(vocab_size - SPECIAL_TOKENS, 0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": special,
        "eos_token_id": special + 1,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    } | changes


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": llama_config(
        *(896, 4864, 24, 14, 2, 151936),
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
    ),
    "Llama-3.2-1B": llama_config(
        *(2048, 8192, 16, 32, 8, 128256), head_dim=64, tie_word_embeddings=True
    ),
    "Llama-3.1-8B": llama_config(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": llama_config(8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": llama_config(16384, 53248, 126, 128, 8, 128256),
    "Gemma-3-1B": llama_config(
        *(1152, 6912, 26, 4, 1, 262144),
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        head_dim=256,
        tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=32768,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=512,
    ),
}
"""The paper's models, all dense: name → a config with the published dimensions."""

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": llama_config(
        *(2048, 6144, 48, 32, 4, 151936),
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
    ),
    "Mixtral-8x7B": llama_config(
        *(4096, 14336, 32, 32, 8, 32000),
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
    ),
    "GPT-OSS-120B": llama_config(
        *(2880, 2880, 36, 64, 8, 201088),
        model_type="gpt_oss",
        architectures=["GptOssForCausalLM"],
        head_dim=64,
        attention_bias=True,
        num_local_experts=128,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"] * 18,
        sliding_window=128,
        rope_theta=150000.0,
    ),
    "Qwen3-235B-A22B": llama_config(
        *(4096, 12288, 94, 64, 4, 151936),
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        norm_topk_prob=True,
    ),
    "GLM-4.6": llama_config(
        *(5120, 12288, 92, 96, 8, 151552),
        model_type="glm4_moe",
        architectures=["Glm4MoeForCausalLM"],
        head_dim=128,
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=3,
        n_routed_experts=160,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        n_group=1,
        topk_group=1,
    ),
    "DeepSeek-V3": llama_config(
        *(7168, 18432, 61, 128, 128, 129280),
        model_type="deepseek_v3",
        architectures=["DeepseekV3ForCausalLM"],
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-06,
        rope_theta=10000.0,
    ),
    "Kimi-K2": llama_config(
        *(7168, 18432, 61, 64, 64, 163840),
        model_type="deepseek_v3",
        architectures=["DeepseekV3ForCausalLM"],
        first_k_dense_replace=1,
        n_routed_experts=384,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=1,
        topk_group=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
}
"""Mixtures of experts, likewise, the smallest first. DeepSeek-V3 is without the layer that only
guesses ahead."""

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
QUANTIZED: dict[str, dict[str, Any]] = {
    name: MIXTURES[name] | {"quantization_config": section}
    for name, section in {"DeepSeek-V3": FP8, "Kimi-K2": FP8, "GPT-OSS-120B": MXFP4}.items()
}
"""The mixtures that are published quantized, as they are."""
