"""The table of model families: per model type its tensors, and the axis on each dimension.

Every other module reads this table. A new family is one entry in ``FAMILIES``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery.errors import FamilyError, UnknownTypeError
from surgery.families.blocks import (
    BASE,
    FFN_NORMS,
    INV_FREQ,
    LATENT,
    LAYER,
    LLAMA,
    MOE,
    POST_NORM,
    PRE_NORM,
    QK_NORM,
    as_buffers,
    attention,
    beside_experts,
    buffers,
    ends,
    experts,
    fused,
    gated,
    into,
    norms,
    one,
    optional,
    out_of,
    packed,
    per_layer,
    router,
    shared,
    transposed,
)
from surgery.families.default_ids import SECTION_TYPES
from surgery.families.encoder_table import ENCODER_DECODERS, ENCODERS
from surgery.families.layer_rules import LAYER_RULES
from surgery.families.schema import (
    EXPERT,
    EXPERTS,
    FFN,
    SHARED,
    Dim,
    ExpertGroups,
    Experts,
    Family,
    Slot,
    Width,
    Wrapper,
)

_OUT = attention("self_attn.dense")
_H = "transformer.h.{layer}."
_NEOX = "gpt_neox.layers.{layer}."
_OPT = "model.decoder.layers.{layer}."
_BIO = "biogpt.layers.{layer}."
_QKV_OUT = tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
_POSITIONS = one("transformer.wpe.weight")
_FALCON = (
    ends("transformer.word_embeddings", "transformer.ln_f")
    + attention("self_attention.query_key_value", "self_attention.dense", at=_H)
)  # fmt: skip
_GPT = ends("transformer.wte", "transformer.ln_f")
_GPTJ = _GPT + norms("ln_1", at=_H) + into("mlp.fc_in", at=_H) + out_of("mlp.fc_out", at=_H)
_GPTJ_MASKS = buffers("attn.bias", "attn.masked_bias", "attn.causal_mask", at=_H)
_FAIRSEQ_NORMS = ("self_attn_layer_norm", "final_layer_norm")

_N_INNER = {FFN: Width("n_inner")}
_FFN_DIM = {FFN: Width("ffn_dim")}
_EXPERT_ONLY = {EXPERT: Width("intermediate_size")}
_DENSE_AND_EXPERT = {FFN: Width("intermediate_size"), EXPERT: Width("moe_intermediate_size")}
_WITH_SHARED = _DENSE_AND_EXPERT | {SHARED: Width("shared_expert_intermediate_size")}
_N_SHARED = _DENSE_AND_EXPERT | {SHARED: Width("moe_intermediate_size", "n_shared_experts")}
_NUM_SHARED = _DENSE_AND_EXPERT | {SHARED: Width("moe_intermediate_size", "num_shared_experts")}
_ERNIE = _DENSE_AND_EXPERT | {SHARED: Width("moe_intermediate_size", "moe_num_shared_experts")}

_BIAS_OF_CHOICE = as_buffers(router("mlp.gate.e_score_correction_bias", required=False))
_ERNIE_BIAS = tuple(
    replace(slot, axes=(None, EXPERTS))
    for slot in router("mlp.moe_statics.e_score_correction_bias")
)
_SHARED_GATE = beside_experts("mlp.shared_expert_gate.weight")
_MIXTRAL = experts("block_sparse_moe.experts", "w1", "w3", "w2") + router(
    "block_sparse_moe.gate.weight"
)
_GRANITE_MOE = (
    BASE
    + PRE_NORM
    + packed("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
    + router("block_sparse_moe.router.layer.weight")
)
_PAIRS = Dim(EXPERT, copies=2, interleaved=True)
_GPT_OSS = (
    Slot(f"{LAYER}mlp.experts.gate_up_proj", "ffn", (EXPERTS, None, _PAIRS), block="packed"),
    Slot(f"{LAYER}mlp.experts.gate_up_proj_bias", "ffn", (EXPERTS, _PAIRS), block="packed"),
    Slot(
        f"{LAYER}mlp.experts.down_proj",
        "ffn",
        (EXPERTS, EXPERT, None),
        block="packed",
        ffn_output=True,
    ),
    Slot(f"{LAYER}mlp.experts.down_proj_bias", "ffn", (EXPERTS, None), block="packed"),
)

_SUM_OF_TWO = ExpertGroups(1, 1, least=2)
"""Groups scored by the sum of their two best experts; one group by default."""

_MISREAD = (32016, 49152)
"""llama.cpp's converter takes the first for CodeLlama; at the second it switches bos off."""

_VISION = ("vision_tower.", "vision_model.", "multi_modal_projector.")
_UNDER_PREFIX = (("language_model.", ""), ("model.language_model.", "model."))

FAMILIES: dict[str, Family | Wrapper] = {
    # Gated FFN, each projection a tensor of its own
    "llama": Family(LLAMA + INV_FREQ, tied=False, misread_vocab_sizes=_MISREAD),
    "mistral": Family(LLAMA, tied=False, misread_vocab_sizes=_MISREAD),
    "ministral": Family(LLAMA, tied=False),
    "ministral3": Family(LLAMA, tied=False),
    "qwen2": Family(LLAMA, tied=False),
    "qwen3": Family(LLAMA + QK_NORM, tied=False),
    "gemma": Family(LLAMA, tied=True),
    "gemma2": Family(LLAMA + FFN_NORMS, tied=True),
    "gemma3_text": Family(LLAMA + QK_NORM + FFN_NORMS, tied=True),
    "vaultgemma": Family(
        BASE + gated() + norms("input_layernorm", "pre_feedforward_layernorm"), tied=True
    ),
    "granite": Family(LLAMA, tied=False, misread_vocab_sizes=_MISREAD),
    "granite_swa": Family(
        LLAMA + per_layer("attention", "self_attn.sinks", required=False), tied=True
    ),
    "olmo": Family(tuple(slot for slot in BASE if slot.group != "norms") + gated(), tied=False),
    "olmo2": Family(BASE + QK_NORM + POST_NORM + gated(), tied=False),
    "olmo3": Family(BASE + QK_NORM + POST_NORM + gated(), tied=False),
    "smollm3": Family(LLAMA, tied=True, misread_vocab_sizes=_MISREAD),
    "stablelm": Family(
        BASE
        + norms("input_layernorm")
        + gated()
        + per_layer(
            "norms",
            "post_attention_layernorm.weight",
            "post_attention_layernorm.bias",
            "self_attn.q_layernorm.norms.{expert}.weight",
            "self_attn.k_layernorm.norms.{expert}.weight",
            required=False,
        ),
        tied=False,
    ),
    "cohere": Family(
        BASE
        + norms("input_layernorm")
        + gated()
        + per_layer("norms", "self_attn.q_norm.weight", "self_attn.k_norm.weight", required=False),
        tied=True,
    ),
    "cohere2": Family(BASE + norms("input_layernorm") + gated(), tied=True),
    "exaone4": Family(BASE + QK_NORM + POST_NORM + gated(), tied=False),
    "internlm3": Family(LLAMA, tied=False),
    "ernie4_5": Family(LLAMA, tied=True),
    "hunyuan_v1_dense": Family(
        LLAMA + norms("self_attn.query_layernorm", "self_attn.key_layernorm"), tied=False
    ),
    "seed_oss": Family(LLAMA, tied=False),
    "helium": Family(LLAMA, tied=False),
    "diffllama": Family(
        LLAMA
        + per_layer("attention", *(f"self_attn.lambda_{n}" for n in ("q1", "k1", "q2", "k2"))),
        tied=False,
    ),
    "youtu": Family(LATENT + gated(), tied=True),
    # Gated FFN, gate and up projection in one tensor
    "phi3": Family(
        ends()
        + attention("self_attn.qkv_proj", "self_attn.o_proj")
        + PRE_NORM
        + fused("mlp.gate_up_proj")
        + out_of("mlp.down_proj"),
        tied=False,
    ),
    "glm": Family(
        BASE + PRE_NORM + fused("mlp.gate_up_proj") + out_of("mlp.down_proj"), tied=False
    ),
    "glm4": Family(
        BASE
        + PRE_NORM
        + norms("post_self_attn_layernorm", "post_mlp_layernorm")
        + fused("mlp.gate_up_proj")
        + out_of("mlp.down_proj"),
        tied=False,
    ),
    # FFN of two linear maps
    "arcee": Family(
        BASE + PRE_NORM + into("mlp.up_proj") + out_of("mlp.down_proj"),
        tied=False,
        misread_vocab_sizes=_MISREAD,
    ),
    "nemotron": Family(BASE + PRE_NORM + into("mlp.up_proj") + out_of("mlp.down_proj"), tied=False),
    "jais2": Family(BASE + PRE_NORM + into("mlp.up_proj") + out_of("mlp.down_proj"), tied=False),
    "apertus": Family(
        BASE
        + QK_NORM
        + norms("attention_layernorm", "feedforward_layernorm")
        + into("mlp.up_proj")
        + out_of("mlp.down_proj")
        + per_layer("ffn", "mlp.act_fn.alpha_n", "mlp.act_fn.alpha_p")
        + as_buffers(per_layer("ffn", "mlp.act_fn.beta", "mlp.act_fn.eps")),
        tied=False,
    ),
    "starcoder2": Family(BASE + PRE_NORM + into("mlp.c_fc") + out_of("mlp.c_proj"), tied=True),
    "nanochat": Family(
        tuple(slot for slot in BASE if slot.group != "norms") + into("mlp.fc1") + out_of("mlp.fc2"),
        tied=False,
    ),
    "phi": Family(
        ends(norm="model.final_layernorm")
        + attention(*(f"self_attn.{p}_proj" for p in "qkv"))
        + _OUT
        + norms("input_layernorm")
        + per_layer(
            "norms",
            *(f"self_attn.{p}_layernorm.{n}" for p in "qk" for n in ("weight", "bias")),
            required=False,
        )
        + into("mlp.fc1")
        + out_of("mlp.fc2"),
        tied=False,
    ),
    "persimmon": Family(
        ends(norm="model.final_layernorm")
        + attention("self_attn.query_key_value")
        + _OUT
        + PRE_NORM
        + per_layer(
            "norms",
            *(f"self_attn.{p}_layernorm.{n}" for p in "qk" for n in ("weight", "bias")),
            required=False,
        )
        + into("mlp.dense_h_to_4h")
        + out_of("mlp.dense_4h_to_h"),
        tied=False,
    ),
    "gpt2": Family(
        _GPT
        + _POSITIONS
        + attention("attn.c_attn", "attn.c_proj", at=_H)
        + norms("ln_1", "ln_2", at=_H)
        + transposed("mlp.c_fc", "mlp.c_proj", at=_H)
        + buffers("attn.bias", "attn.masked_bias", at=_H),
        tied=True,
        widths=_N_INNER,
        depth="n_layer",
        embedding="transformer.wte.weight",
    ),
    "gpt_bigcode": Family(
        _GPT
        + _POSITIONS
        + attention("attn.c_attn", "attn.c_proj", at=_H)
        + norms("ln_1", "ln_2", at=_H)
        + into("mlp.c_fc", at=_H)
        + out_of("mlp.c_proj", at=_H)
        + buffers("attn.bias", at=_H),
        tied=True,
        widths=_N_INNER,
        depth="n_layer",
        embedding="transformer.wte.weight",
    ),
    "gptj": Family(
        _GPTJ + attention(*(f"attn.{p}_proj" for p in ("q", "k", "v", "out")), at=_H) + _GPTJ_MASKS,
        tied=False,
        widths=_N_INNER,
        depth="n_layer",
        embedding="transformer.wte.weight",
    ),
    "codegen": Family(
        _GPTJ + attention("attn.qkv_proj", "attn.out_proj", at=_H) + _GPTJ_MASKS,
        tied=False,
        widths=_N_INNER,
        depth="n_layer",
        embedding="transformer.wte.weight",
    ),
    "gpt_neo": Family(
        _GPT
        + _POSITIONS
        + attention(*(f"attn.attention.{p}_proj" for p in ("q", "k", "v", "out")), at=_H)
        + norms("ln_1", "ln_2", at=_H)
        + into("mlp.c_fc", at=_H)
        + out_of("mlp.c_proj", at=_H)
        + buffers("attn.attention.bias", "attn.attention.masked_bias", at=_H),
        tied=True,
        depth="num_layers",
        embedding="transformer.wte.weight",
    ),
    "gpt_neox": Family(
        ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
        + attention("attention.query_key_value", "attention.dense", at=_NEOX)
        + norms("input_layernorm", "post_attention_layernorm", at=_NEOX)
        + into("mlp.dense_h_to_4h", at=_NEOX)
        + out_of("mlp.dense_4h_to_h", at=_NEOX)
        + buffers(
            "attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq", at=_NEOX
        ),
        tied=False,
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
    ),
    "opt": Family(
        optional("norms", ends("model.decoder.embed_tokens", "model.decoder.final_layer_norm"))
        + one("model.decoder.embed_positions.weight")
        + one("model.decoder.project_in.weight", required=False)
        + one("model.decoder.project_out.weight", required=False)
        + attention(*_QKV_OUT, at=_OPT)
        + norms(*_FAIRSEQ_NORMS, at=_OPT)
        + into("fc1", at=_OPT)
        + out_of("fc2", at=_OPT),
        tied=True,
        widths=_FFN_DIM,
        embedding="model.decoder.embed_tokens.weight",
    ),
    "biogpt": Family(
        ends("biogpt.embed_tokens", "biogpt.layer_norm", "output_projection")
        + one("biogpt.embed_positions.weight")
        + attention(*_QKV_OUT, at=_BIO)
        + norms(*_FAIRSEQ_NORMS, at=_BIO)
        + into("fc1", at=_BIO)
        + out_of("fc2", at=_BIO),
        tied=True,
        embedding="biogpt.embed_tokens.weight",
        head="output_projection.weight",
    ),
    "falcon": Family(
        _FALCON
        + optional(
            "norms",
            norms("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp", at=_H),
        )
        + into("mlp.dense_h_to_4h", at=_H)
        + out_of("mlp.dense_4h_to_h", at=_H),
        tied=True,
        widths={FFN: Width("ffn_hidden_size")},
        embedding="transformer.word_embeddings.weight",
    ),
    # FFN whose width no key of config.json holds: only the vocabulary can be pruned
    "bloom": Family(
        _FALCON
        + norms("word_embeddings_layernorm", at="transformer.")
        + norms("input_layernorm", "post_attention_layernorm", at=_H)
        + per_layer(
            "ffn",
            *(f"mlp.dense_{n}.{p}" for n in ("h_to_4h", "4h_to_h") for p in ("weight", "bias")),
            at=_H,
        ),
        tied=True,
        widths={},
        depth="n_layer",
        embedding="transformer.word_embeddings.weight",
    ),
    "mpt": Family(
        ends("transformer.wte", "transformer.norm_f")
        + attention("attn.Wqkv", "attn.out_proj", at="transformer.blocks.{layer}.")
        + norms("norm_1", "norm_2", at="transformer.blocks.{layer}.")
        + per_layer(
            "ffn", "ffn.up_proj.weight", "ffn.down_proj.weight", at="transformer.blocks.{layer}."
        ),
        tied=True,
        widths={},
        depth="n_layers",
        embedding="transformer.wte.weight",
    ),
    # Mixtures of experts
    "mixtral": Family(
        BASE + PRE_NORM + _MIXTRAL,
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_local_experts", 2),
        misread_vocab_sizes=_MISREAD,
    ),
    "phimoe": Family(
        BASE + PRE_NORM + _MIXTRAL,
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_local_experts", 2, least=2),
    ),
    "minimax_m2": Family(
        BASE
        + PRE_NORM
        + QK_NORM
        + _MIXTRAL
        + as_buffers(router("block_sparse_moe.e_score_correction_bias")),
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_local_experts", 8),
        draft_layers="num_mtp_modules",
    ),
    "olmoe": Family(
        BASE + PRE_NORM + QK_NORM + experts() + router("mlp.gate.weight"),
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_experts", 8),
    ),
    "flex_olmo": Family(
        BASE + POST_NORM + QK_NORM + experts() + router("mlp.gate.weight"),
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_experts", 5),
    ),
    "qwen2_moe": Family(
        BASE + PRE_NORM + MOE + shared("mlp.shared_expert") + _SHARED_GATE,
        tied=False,
        widths=_WITH_SHARED,
        experts=Experts("num_experts", 4),
    ),
    "qwen3_moe": Family(
        BASE + PRE_NORM + QK_NORM + MOE,
        tied=False,
        widths=_DENSE_AND_EXPERT,
        experts=Experts("num_experts", 8),
    ),
    "qwen3_next": Family(
        ends()
        + PRE_NORM
        + MOE
        + shared("mlp.shared_expert")
        + _SHARED_GATE
        + tuple(
            replace(slot, block="attention")
            for slot in attention(*(f"self_attn.{p}_proj" for p in "qkvo")) + QK_NORM
        )
        + tuple(
            Slot(f"{LAYER}linear_attn.{name}", "attention", block="linear_attention")
            for name in (
                *("A_log", "dt_bias", "conv1d.weight", "norm.weight", "out_proj.weight"),
                *("in_proj_ba.weight", "in_proj_qkvz.weight"),
            )
        ),
        tied=False,
        widths=_WITH_SHARED,
        experts=Experts("num_experts", 10),
        left_out=("mtp.",),
    ),
    "deepseek_v2": Family(
        LATENT + MOE + shared(),
        tied=False,
        widths=_N_SHARED,
        experts=Experts("n_routed_experts", None, ExpertGroups(None, None, least=1)),
    ),
    "deepseek_v3": Family(
        LATENT + MOE + shared() + _BIAS_OF_CHOICE,
        tied=False,
        widths=_N_SHARED,
        experts=Experts("n_routed_experts", 8, ExpertGroups(8, 4, least=2)),
        draft_layers="num_nextn_predict_layers",
    ),
    "glm4_moe": Family(
        BASE
        + PRE_NORM
        + per_layer("norms", "self_attn.q_norm.weight", "self_attn.k_norm.weight", required=False)
        + MOE
        + shared()
        + _BIAS_OF_CHOICE,
        tied=False,
        widths=_N_SHARED,
        experts=Experts("n_routed_experts", 8, _SUM_OF_TWO),
        draft_layers="num_nextn_predict_layers",
    ),
    "dots1": Family(
        BASE + PRE_NORM + QK_NORM + MOE + shared() + _BIAS_OF_CHOICE,
        tied=False,
        widths=_N_SHARED,
        experts=Experts("n_routed_experts", None, _SUM_OF_TWO),
    ),
    "solar_open": Family(
        BASE + PRE_NORM + MOE + shared() + _BIAS_OF_CHOICE,
        tied=False,
        widths=_N_SHARED,
        experts=Experts("n_routed_experts", 8, _SUM_OF_TWO),
    ),
    "exaone_moe": Family(
        BASE
        + PRE_NORM
        + QK_NORM
        + MOE
        + shared()
        + as_buffers(router("mlp.e_score_correction_bias")),
        tied=False,
        widths=_NUM_SHARED,
        experts=Experts("num_experts", 8, _SUM_OF_TWO),
        left_out=("mtp.",),
    ),
    "afmoe": Family(
        BASE
        + PRE_NORM
        + QK_NORM
        + norms("pre_mlp_layernorm", "post_mlp_layernorm")
        + attention("self_attn.gate_proj")
        + gated(block="dense")
        + experts()
        + router("mlp.router.gate.weight", "mlp.expert_bias")
        + shared(),
        tied=False,
        widths=_NUM_SHARED,
        experts=Experts("num_experts", 6),
    ),
    "ernie4_5_moe": Family(
        BASE + PRE_NORM + MOE + shared() + _ERNIE_BIAS,
        tied=True,
        widths=_ERNIE,
        experts=Experts("moe_num_experts", 6),
        left_out=("model.mtp_",),
    ),
    "hunyuan_v1_moe": Family(
        BASE
        + PRE_NORM
        + norms("self_attn.query_layernorm", "self_attn.key_layernorm")
        + experts()
        + router("mlp.gate.wg.weight")
        + shared("mlp.shared_mlp"),
        tied=False,
        widths={EXPERT: Width("intermediate_size"), SHARED: Width("intermediate_size")},
        experts=Experts("num_experts", 1),
    ),
    "cohere2_moe": Family(
        BASE + norms("input_layernorm") + MOE + shared(),
        tied=True,
        widths={
            FFN: Width("prefix_dense_intermediate_size"),
            EXPERT: Width("intermediate_size"),
            SHARED: Width("intermediate_size", "num_shared_experts"),
        },
        experts=Experts("num_experts", 2),
    ),
    "granitemoe": Family(
        _GRANITE_MOE,
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_local_experts", 2),
        misread_vocab_sizes=_MISREAD,
    ),
    "granitemoeshared": Family(
        _GRANITE_MOE
        + fused("shared_mlp.input_linear", SHARED, block="shared")
        + out_of("shared_mlp.output_linear", SHARED, block="shared"),
        tied=False,
        widths=_EXPERT_ONLY | {SHARED: Width("shared_intermediate_size")},
        experts=Experts("num_local_experts", 2),
    ),
    "gpt_oss": Family(
        BASE
        + PRE_NORM
        + per_layer("attention", "self_attn.sinks")
        + _GPT_OSS
        + router("mlp.router.weight", "mlp.router.bias"),
        tied=False,
        widths=_EXPERT_ONLY,
        experts=Experts("num_local_experts", 4),
    ),
    "llama4_text": Family(
        BASE
        + PRE_NORM
        + gated("feed_forward", block="dense")
        + packed(
            "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True
        )
        + router("feed_forward.router.weight")
        + shared("feed_forward.shared_expert"),
        tied=False,
        widths={
            FFN: Width("intermediate_size_mlp"),
            EXPERT: Width("intermediate_size"),
            SHARED: Width("intermediate_size"),
        },
        experts=Experts("num_local_experts", 1),
    ),
    # Language models inside image models
    "gemma3": Wrapper(_VISION, _UNDER_PREFIX, tied=True),
    "mistral3": Wrapper(_VISION, _UNDER_PREFIX, tied=True),
    "llama4": Wrapper(_VISION, _UNDER_PREFIX, tied=False),
    "llava": Wrapper(_VISION, _UNDER_PREFIX, tied=False),
    "internvl": Wrapper(_VISION, _UNDER_PREFIX, tied=True),
    "qwen2_vl": Wrapper(("visual.",), _UNDER_PREFIX, False, {"qwen2_vl_text": "qwen2"}),
    "qwen2_5_vl": Wrapper(("visual.",), _UNDER_PREFIX, False, {"qwen2_5_vl_text": "qwen2"}),
    "qwen3_vl": Wrapper(
        ("visual.",), _UNDER_PREFIX, False, {"qwen3_vl_text": "qwen3"}, by_number=True
    ),
    **ENCODERS,
    **ENCODER_DECODERS,
}
"""model_type → family, or ``Wrapper`` for a model with a language model in it."""


def family_of(config: Mapping[str, Any], where: object, name: str | None = None) -> Family:
    """Return the table's entry for a config.json.

    Args:
        config: Content of config.json.
        where: Name of the file, for errors.
        name: Key of the entry to use instead of the config's model type: the user's ``family``.

    Raises:
        UnknownTypeError: the table has no such model type.
        FamilyError: it has no entry ``name``, or the config names no model type at all.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise FamilyError(
            where, "names no model_type", expected=f"one of {', '.join(FAMILIES)}", fix="add it"
        )
    if name is not None and name not in FAMILIES:
        raise FamilyError(
            "`family`",
            "names no family",
            expected=f"one of {', '.join(FAMILIES)}",
            found=repr(name),
            fix="inspect MODEL with `probe` shows which fit",
        )
    kind, code = model_type if name is None else name, "auto_map" in config
    entry = _entry(kind, where, code)
    if isinstance(entry, Family):
        return replace(entry, model_type=kind)
    section = config.get(entry.section)
    inner = section.get("model_type") if isinstance(section, dict) else None
    inner = inner or SECTION_TYPES.get(kind, {}).get(entry.section)
    text_type = entry.text_types.get(str(inner), inner)
    where = f"{where}: {entry.section}"
    family = _entry(text_type, where, code)
    if isinstance(family, Wrapper):
        raise UnknownTypeError(where, text_type, code=code)
    return replace(entry.around(family, str(text_type)), model_type=kind)


def _entry(model_type: Any, where: object, code: bool) -> Family | Wrapper:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnknownTypeError(where, model_type, code=code)
    entry = FAMILIES[model_type]
    if isinstance(entry, Family):
        return replace(entry, layer_rules=LAYER_RULES.get(model_type))
    return entry
