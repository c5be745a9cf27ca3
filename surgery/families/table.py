"""The table of model families: per model type its tensors, and the axis on each dimension.

Every other module reads this table. What models show on the meta device is in ``derived.json``,
which ``python -m tools.derive`` writes. What they do not show is here, by hand.
"""

import re
from collections import UserDict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from surgery.errors import SAVE_WITH_GLINER, FamilyError, UnknownTypeError
from surgery.families.blocks import buffers
from surgery.families.default_ids import DERIVED, SECTION_TYPES, derived
from surgery.families.encoder_decoder_table import ENCODER_DECODERS, UNDIVIDED_MODELS
from surgery.families.encoder_table import ENCODERS
from surgery.families.layer_rules import LAYER_RULES
from surgery.families.schema import (
    ENCODER,
    ENCODER_DECODER,
    FFN,
    GLINER,
    WIDE,
    Dim,
    ExpertGroups,
    Experts,
    Family,
    Slot,
    Width,
    Wrapper,
)

_H = "transformer.h.{layer}."
_GPTJ_MASKS = buffers("attn.bias", "attn.masked_bias", "attn.causal_mask", at=_H)

BUFFERS: Mapping[str, tuple[Slot, ...]] = {
    "llama": buffers("self_attn.rotary_emb.inv_freq"),
    "gpt2": buffers("attn.bias", "attn.masked_bias", at=_H),
    "gpt_bigcode": buffers("attn.bias", at=_H),
    "gptj": _GPTJ_MASKS,
    "codegen": _GPTJ_MASKS,
    "gpt_neo": buffers("attn.attention.bias", "attn.attention.masked_bias", at=_H),
    "gpt_neox": buffers(
        *("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        at="gpt_neox.layers.{layer}.",
    ),
}
"""Constants that older checkpoints store, and that transformers computes itself."""

OPTIONAL: Mapping[str, tuple[str, ...]] = {"granite_swa": ("self_attn.sinks",)}
"""Ends of the names of tensors that published checkpoints may lack."""

EXPERTS_KEY: Mapping[str, str] = dict.fromkeys(("qwen3_moe", "qwen3_vl_moe"), "num_experts")
"""Key for the number of experts that transformers 4 reads, too, unlike the class's own."""

LEAST_EXPERTS: Mapping[str, int] = {"phimoe": 2}
"""Fewest experts that a router's code can choose among, where one is too few."""

BEST_OF_GROUP = ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr")
"""Types that score a group by its best expert. All others take the sum of the two best."""

EXPERTS_STAY: Mapping[str, str] = {
    "deepseek_v4": "its hash layers have a table with the experts of each token",
    "zaya": "its router has a row that belongs to no expert",
}
"""Model type → why whole experts cannot be removed."""

_FOUR = "config.json has no key for the FFN's width, which is four times that of the states"
ONLY_VOCABULARY: Mapping[str, str] = {
    **dict.fromkeys(("bloom", "mpt", "openai-gpt"), _FOUR),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "its layers have no FFN"),
    "ctrl": "the maps of its FFN have numbers in place of names",
    "recurrent_gemma": "its FFN has half the width that config.json says",
}
"""Model type → why it has no channels to remove."""

_NEXTN = (
    *("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3"),
    *("bailing_hybrid", "glm4v_moe", "glm_ocr", "glm5_next", "kimi_k25"),
)
DRAFT_LAYERS: Mapping[str, str] = {
    "minimax_m2": "num_mtp_modules",
    **dict.fromkeys(_NEXTN, "num_nextn_predict_layers"),
}
"""Key for the number of layers for multi-token prediction after the last."""

_MTP = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "exaone_moe"),
    *("exaone4_5", "granite_docling", "mellum", "nemotron_h", "olmo_hybrid"),
)
LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_MTP, ("mtp.",)),
    "deepseek_v4": ("mtp.",),
    "ernie4_5_moe": ("model.mtp_",),
    "hy_v4": ("model.mtp_layers.",),
    "mimo_v2_flash": ("model.mtp.",),
    "minimax_m3_vl": ("mtp.", "model.mtp."),
    "minimax_m3_vl_text": ("mtp.", "model.mtp."),
    "mistral_large4": ("mtp_dspark.",),
}
"""Prefixes of tensors for multi-token prediction outside of the layers."""

SPELLINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "deepseek_v4": (
        ("embed.", "model.embed_tokens."),
        *((f"hc_head_{part}", f"model.hc_head.hc_{part}") for part in ("fn", "base", "scale")),
    ),
}
"""(prefix in published checkpoints, prefix in the slots), where a class would save others."""

ROUNDS: Mapping[str, str] = {"lfm2": "block_auto_adjust_ff_dim"}
"""Flag by which a class rounds the width that config.json has."""

DOUBLE_WIDE: Mapping[str, str] = dict.fromkeys(
    ("gemma4_text", "gemma4_unified_text"), "use_double_wide_mlp"
)
"""Flag by which FFNs are twice as wide in the last layers, ``num_kv_shared_layers`` of them."""

MISREAD = (32016, 49152)
"""llama.cpp's converter takes the first for CodeLlama; at the second it switches bos off."""

MISREAD_TYPES = ("llama", "mistral", "granite", "smollm3", "arcee", "mixtral", "granitemoe")

_UNDER_PREFIX = (("language_model.", ""), ("model.language_model.", "model."))
WRAPPERS: Mapping[str, Wrapper] = {
    "qwen2_vl": Wrapper(("visual.",), _UNDER_PREFIX, False, {"qwen2_vl_text": "qwen2"}),
    "qwen2_5_vl": Wrapper(("visual.",), _UNDER_PREFIX, False, {"qwen2_5_vl_text": "qwen2"}),
    "qwen3_vl": Wrapper(
        ("visual.",), _UNDER_PREFIX, False, {"qwen3_vl_text": "qwen3"}, by_number=True
    ),
}
"""Models whose text runs as an equal type that stands alone."""

_INSIDE = "token_rep_layer.bert_layer.model."
_HEADS = ("rnn", "cross_fuser", "span_rep_layer", "prompt_rep_layer", "scorer")
_RELATIONS = ("relations_rep_layer", "triples_score_layer", "pair_rep_layer")
_BESIDE = ("token_rep_layer.projection", "token_rep_layer.bert_layer.layers_fuser")

OF_GLINER = Wrapper(
    (*(f"{name}." for name in (*_HEADS, *_RELATIONS, *_BESIDE)), f"{_INSIDE}pooler."),
    ((_INSIDE, ""),),
    tied=True,
    section="encoder_config",
    by_number=True,
)
"""The package gliner's models, which transformers does not register."""

SECOND_TEXT = ("labels_encoder", "labels_decoder", "decoder_config")
"""Keys by which a GLiNER has a second model of text, with a tokenizer of its own."""

_NORM = "a norm over the FFN's channels divides by all of them, kept or not"
_ROWS = "its embedding has more rows after those of the vocabulary"
_SHARED = "several layers share one block"
_UNSEEN = "its experts run in code of their own, where calibration sees no activations"
_UNPROVEN = "no tiny model of it runs yet, and nothing else would prove an entry"
_OTHER = "no text goes in, or none comes out, by way of one decoder"

REFUSED: Mapping[str, str] = {
    "bitnet": _NORM,
    "cpmant": _ROWS,
    "mllama": _ROWS,
    "molmo2": _ROWS,
    "dbrx": "all experts of a layer are folded into the rows of one matrix",
    "ernie4_5_vl_moe": "its experts have two widths, one for images",
    "hrm_text": "it has two stacks of layers",
    "longcat_flash": "each layer has two FFNs",
    "zamba": _SHARED,
    "zamba2": _SHARED,
    "rwkv": "its layers pass on a state and more",
    **dict.fromkeys(("dots3_note", "xlstm"), _UNPROVEN),
    **dict.fromkeys(
        ("jetmoe", "step3p7", "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
        _UNSEEN,
    ),
    **dict.fromkeys(
        (
            *("blt", "chameleon", "diffusion_gemma", "evolla", "gemma4_assistant"),
            *("gemma4_unified_assistant", "idefics", "moshi", "musicgen", "musicgen_melody"),
            *("pi0", "shieldgemma2"),
        ),
        _OTHER,
    ),
}
"""Model type → why it cannot be pruned exactly, or not yet."""

BY_NUMBER = ("cohere_compass",)
"""Wrappers of which images feed into the language model's layers by their number."""

_SPEC = re.compile(r"(?P<group>\w+)(?: \((?P<axes>[^)]*)\))?(?P<rest>.*)")


@cache
def _slot(name: str, spec: str) -> Slot:
    """Read a line of the file: group, axes in parentheses, then flags and blocks."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{DERIVED}: {name}: {spec!r} is no line of this table")
    words = match["rest"].split()
    told = dict(word.split("=") for word in words if "=" in word)
    return Slot(
        name,
        match["group"],
        tuple(map(_dim, match["axes"].split(", "))) if match["axes"] else (),
        required="optional" not in words,
        block=told.get("in", ""),
        beside=tuple(told["beside"].split(",")) if "beside" in told else (),
        ffn_output="out" in words,
        is_parameter="buffer" not in words,
    )


def _dim(text: str) -> Dim | None:
    """Read a dimension: "-", an axis, or "2 axis" where it lies there twice, in halves or pairs."""
    copies, axis, *pairs = text.split() if " " in text else ("1", text)
    return None if text == "-" else Dim(axis, int(copies), bool(pairs))


def _family(name: str, data: Mapping[str, Any]) -> Family:
    slots = tuple(_slot(*line) for line in data["tensors"].items())
    ends = OPTIONAL.get(name)
    if ends:
        slots = tuple(replace(s, required=s.required and not s.name.endswith(ends)) for s in slots)
    widths = {axis: Width(*key.split(" * ")) for axis, key in data["widths"].items()}
    if name in DOUBLE_WIDE:
        widths[WIDE] = replace(widths[FFN], times=DOUBLE_WIDE[name])
    told = {key: data[key] for key in ("depth", "embedding", "head", "section") if key in data}
    if name in EXPERTS_STAY:
        told["experts_stay"] = EXPERTS_STAY[name]
    if not widths:
        told["only_vocabulary"] = ONLY_VOCABULARY.get(name, "no width of its FFN was found")
    return Family(
        slots + BUFFERS.get(name, ()),
        data["tied"],
        widths,
        None if name in EXPERTS_STAY else _experts(name, data.get("experts")),
        prefixes=SPELLINGS.get(name, ()),
        left_out=LEFT_OUT.get(name, ()),
        carried=tuple(data.get("carried", ())),
        draft_layers=DRAFT_LAYERS.get(name, ""),
        rounds=ROUNDS.get(name, ""),
        mixed=data.get("mixed", False),
        double_wide=DOUBLE_WIDE.get(name, ""),
        misread_vocab_sizes=MISREAD if name in MISREAD_TYPES else (),
        **told,
    )


def _experts(name: str, data: Mapping[str, Any] | None) -> Experts | None:
    if data is None:
        return None
    told, least = data.get("groups"), 1 if name in BEST_OF_GROUP else 2
    groups = ExpertGroups(told["count"], told["chosen"], least, told["key"]) if told else None
    key = EXPERTS_KEY.get(name, data["key"])
    return Experts(key, data["per_token"], groups, LEAST_EXPERTS.get(name, 1))


def read_entry(name: str, data: Mapping[str, Any]) -> Family | Wrapper:
    """Return an entry of the file, with what is written by hand for it."""
    if "tensors" in data:
        return _family(name, data)
    prefixes = tuple((outer, inner) for outer, inner in data["prefixes"])
    return Wrapper(
        tuple(data["carried"]),
        prefixes,
        data["tied"],
        section=data["around"],
        left_out=LEFT_OUT.get(name, ()),
        by_number=name in BY_NUMBER,
    )


BY_HAND: Mapping[str, Family] = {**ENCODERS, **ENCODER_DECODERS, **UNDIVIDED_MODELS}
"""model_type → family, of the part of the table that is not derived."""


class _Families(UserDict[str, Any]):
    """model_type → family; an entry of the file is built when it is asked for."""

    def __getitem__(self, name: str) -> Family | Wrapper:
        entry: Any = self.data[name]
        if not isinstance(entry, Family | Wrapper):
            entry = self.data[name] = WRAPPERS.get(name) or read_entry(name, entry)
        built: Family | Wrapper = entry
        return built


FAMILIES = _Families({**derived(), **BY_HAND})
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
    if model_type is None and name != GLINER:
        raise FamilyError(
            where, "names no model_type", expected="a model type, such as llama", fix="add it"
        )
    if name is not None and name not in (GLINER, *FAMILIES):
        from difflib import get_close_matches  # 5 to 20 ms; few starts need it

        raise FamilyError(
            "`family`",
            "names no family",
            expected=f"a model type, such as {', '.join(get_close_matches(name, FAMILIES, 5, 0))}",
            found=repr(name),
            fix="inspect MODEL with `probe` shows which fit",
        )
    kind: Any = model_type if name is None else name
    code = "auto_map" in config
    if kind == GLINER:
        _check_gliner(config, where)
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
    if kind == GLINER and family.kind not in (ENCODER, ENCODER_DECODER):
        raise FamilyError(
            where, "is not an encoder", found=text_type, fix="choose a GLiNER with an encoder in it"
        )
    return replace(entry.around(family, str(text_type)), model_type=kind)


def _check_gliner(config: Mapping[str, Any], where: object) -> None:
    """Refuse a GLiNER with two models of text in it, or without the config of its encoder."""
    for key in SECOND_TEXT:
        if config.get(key) is not None:
            raise FamilyError(
                f"{where}: {key}",
                "names a second model of text, with a tokenizer of its own",
                expected="one encoder, which reads labels and text",
                fix="choose a GLiNER with one encoder",
            )
    if not isinstance(config.get(OF_GLINER.section), dict):
        raise FamilyError(
            f"{where}: {OF_GLINER.section}",
            "is missing, so that the encoder is described in another model alone",
            found=config.get("model_name"),
            fix=SAVE_WITH_GLINER,
        )


def _entry(model_type: Any, where: object, code: bool) -> Family | Wrapper:
    if isinstance(model_type, str) and model_type in REFUSED:
        raise FamilyError(
            where,
            f"models of type {model_type} cannot be pruned: {REFUSED[model_type]}",
            fix="choose a type of the list on the page Models",
        )
    if model_type == GLINER:
        return OF_GLINER
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnknownTypeError(where, model_type, code=code)
    entry = FAMILIES[model_type]
    if isinstance(entry, Family):
        return replace(entry, layer_rules=LAYER_RULES.get(model_type))
    return entry
