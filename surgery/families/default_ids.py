"""Token ids that config classes fill in where config.json names none; the output names them.

If a key were absent from the output, the class would fill in the *old* id. The table has the
defaults of transformers; tests/families/test_default_ids.py compares it with the installed classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

Change = Callable[[int], int | None]
"""Old id → new id, or None where no kept token has the old id."""

SECTIONS = ("text_config", "llm_config", "thinker_config", "encoder", "decoder")
"""Parts of a config whose ids belong to the text vocabulary."""

OFFSET_SECTIONS = ("vision_config", "audio_config")
"""Parts with their own vocabularies; only their vocab_offset counts text ids."""

_ONE_TWO = {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_QWEN_VL = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_QWEN_VL_TEXT = {"bos_token_id": 151643, "eos_token_id": 151645}
_GPT2 = {"bos_token_id": 50256, "eos_token_id": 50256}
_OLMO = {"pad_token_id": 1, "eos_token_id": 50279}
_COHERE = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001}
_ZERO_ONE_TWO = {"pad_token_id": 0, **_ONE_TWO}
_PAD = {"pad_token_id": 0}
_BLENDERBOT = {
    "pad_token_id": 0,
    **_ONE_TWO,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_T5 = {"pad_token_id": 0, "eos_token_id": 1}
_ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_LLAMA3 = {"bos_token_id": 128000, "eos_token_id": 128001}

Default = int | list[int]

_GLM: Mapping[str, Default] = {
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
}

DEFAULT_IDS: Mapping[str, Mapping[str, Default]] = {
    "afmoe": {},
    "apertus": {"pad_token_id": 3, **_ONE_TWO},
    "arcee": _LLAMA3,
    "biogpt": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "blenderbot": _BLENDERBOT,
    "blenderbot-small": _BLENDERBOT,
    "bloom": _ONE_TWO,
    "codegen": _GPT2,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "cohere2_moe": _COHERE,
    "bart": {**_ROBERTA, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    "bert": _PAD,
    "bigbird_pegasus": {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "decoder_start_token_id": 2,
    },
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "deberta-v2": _PAD,
    "deepseek_v2": _ONE_TWO,
    "deepseek_v3": {"bos_token_id": 0, "eos_token_id": 1},
    "diffllama": _ONE_TWO,
    "distilbert": _PAD,
    "dots1": {},
    "electra": _PAD,
    "ernie4_5": _ZERO_ONE_TWO,
    "ernie4_5_moe": _ZERO_ONE_TWO,
    "ernie": _PAD,
    "eurobert": {
        "pad_token_id": 128001,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "mask_token_id": 128002,
    },
    "exaone4": {"bos_token_id": 0, "eos_token_id": 2},
    "exaone_moe": {"bos_token_id": 1, "eos_token_id": 53, "pad_token_id": 0},
    "falcon": {"bos_token_id": 11, "eos_token_id": 11},
    "flex_olmo": {"pad_token_id": 100277, "eos_token_id": 100257},
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
    },
    "gemma3_text": _GEMMA,
    "gemma3n": {
        "boi_token_id": 255999,
        "eoi_token_id": 262144,
        "image_token_id": 262145,
        "boa_token_id": 256000,
        "eoa_token_id": 262272,
        "audio_token_id": 262273,
    },
    "gemma3n_audio": {"vocab_offset": 262272},
    "gemma3n_text": {**_GEMMA, "vocab_size_per_layer_input": 262144},
    "gemma3n_vision": {"vocab_offset": 262144},
    "glm": _GLM,
    "glm4": _GLM,
    "glm4_moe": {},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": _GPT2,
    "gpt_neox": {"bos_token_id": 0, "eos_token_id": 2},
    "gpt_oss": {},
    "gptj": _GPT2,
    "granite": _ONE_TWO,
    "granite_swa": {"bos_token_id": 100257, "eos_token_id": 100257},
    "granitemoe": _ONE_TWO,
    "granitemoeshared": _ONE_TWO,
    "helium": {"pad_token_id": 3, **_ONE_TWO},
    "hunyuan_v1_dense": {**_ZERO_ONE_TWO, "eod_token_id": 3},
    "hunyuan_v1_moe": {**_ZERO_ONE_TWO, "eod_token_id": 3, "sep_token_id": 4},
    "internlm3": {"pad_token_id": 2, **_ONE_TWO},
    "internvl": {"image_token_id": 151667},
    "jais2": {"bos_token_id": 0, "eos_token_id": 150024},
    "llama": _ONE_TWO,
    "llama4": {"boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092},
    "llama4_text": _ONE_TWO,
    "llava": {"image_token_index": 32000},
    "m2m_100": {**_ROBERTA, "decoder_start_token_id": 2},
    "marian": {
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "decoder_start_token_id": 58100,
        "forced_eos_token_id": 0,
    },
    "mbart": {**_ROBERTA, "forced_eos_token_id": 2},
    "megatron-bert": _PAD,
    "minimax_m2": {"bos_token_id": 200034, "eos_token_id": 200020},
    "ministral": _ONE_TWO,
    "ministral3": {"pad_token_id": 11, **_ONE_TWO},
    "mistral": _ONE_TWO,
    "mistral3": {"image_token_index": 10},
    "mixtral": _ONE_TWO,
    "mllama": {"image_token_index": 128256},
    "mllama_text_model": {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "modernbert": {
        "pad_token_id": 50283,
        "bos_token_id": 50281,
        "eos_token_id": 50282,
        "cls_token_id": 50281,
        "sep_token_id": 50282,
    },
    "mpnet": _ROBERTA,
    "mpt": {},
    "mt5": {**_T5, "decoder_start_token_id": 0},
    "mvp": {**_ROBERTA, "decoder_start_token_id": 2},
    "nanochat": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    "nemotron": {"bos_token_id": 2, "eos_token_id": 3},
    "olmo": _OLMO,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "olmoe": _OLMO,
    "opt": {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    "pegasus": {**_T5, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
    "persimmon": _ONE_TWO,
    "phi": _ONE_TWO,
    "phi3": {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    "phimoe": _ONE_TWO,
    "plbart": {**_ROBERTA, "forced_eos_token_id": 2},
    "qwen2": {},
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL_TEXT,
    "qwen2_audio": {"audio_token_index": 151646},
    "qwen2_moe": {},
    "qwen2_vl": _QWEN_VL,
    "qwen2_vl_text": _QWEN_VL_TEXT,
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_vl": _QWEN_VL,
    "qwen3_vl_text": {},
    "rembert": {"pad_token_id": 0, "bos_token_id": 312, "eos_token_id": 313},
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roformer": _PAD,
    "seed_oss": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "smollm3": {"pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001},
    "solar_open": {},
    "stablelm": {"bos_token_id": 0, "eos_token_id": 0},
    "starcoder2": _GPT2,
    "t5": _T5,
    "umt5": {**_T5, "decoder_start_token_id": 0},
    "vaultgemma": _GEMMA,
    "whisper": {
        "pad_token_id": 50256,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "decoder_start_token_id": 50257,
        "begin_suppress_tokens": [220, 50256],
    },
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "youtu": _LLAMA3,
}
"""model_type → key → id; vocab_offset and vocab_size_per_layer_input are numbers of ids."""

SECTION_TYPES: Mapping[str, Mapping[str, str]] = {
    "gemma3": {"text_config": "gemma3_text"},
    "gemma3n": {
        "text_config": "gemma3n_text",
        "vision_config": "gemma3n_vision",
        "audio_config": "gemma3n_audio",
    },
    "internvl": {"text_config": "qwen2"},
    "llama4": {"text_config": "llama4_text"},
    "llava": {"text_config": "llama"},
    "mistral3": {"text_config": "mistral"},
    "mllama": {"text_config": "mllama_text_model"},
    "qwen2_5_vl": {"text_config": "qwen2_5_vl_text"},
    "qwen2_audio": {"text_config": "qwen2"},
    "qwen2_vl": {"text_config": "qwen2_vl_text"},
    "qwen3_vl": {"text_config": "qwen3_vl_text"},
}
"""model_type → section → its model_type, for a section that does not name one."""

NULLABLE = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys where null means "no such token". For other keys the classes accept only a number: -1.
Those of lists, such as begin_suppress_tokens, accept an empty one.

Where the default is a list of ids, null would mean that list: -1 again."""

COUNTS = ("vocab_offset", "vocab_size_per_layer_input")
"""Keys of the table whose values are not ids."""


def fill_defaults(
    config: Mapping[str, Any], change: Change, model_type: str | None = None
) -> dict[str, Any]:
    """Return ``config`` with absent default ids filled in, still as *old* ids.

    A default whose token is removed (``change`` returns None) must not become another token's id:
    it is written as "no such token".

    Args:
        config: config.json, or a section of it.
        change: Returns None for the ids of removed tokens.
        model_type: Model type to treat it as; None is the config's own.
    """
    kind = str(model_type or config.get("model_type"))
    inner = SECTION_TYPES.get(kind, {})
    result = dict(config)
    for name in (*SECTIONS, *OFFSET_SECTIONS):
        if isinstance(config.get(name), dict):
            given = None if "model_type" in config[name] else inner.get(name)
            result[name] = fill_defaults(config[name], change, given)
    flat = {} if "text_config" in config else DEFAULT_IDS.get(inner.get("text_config", ""), {})
    for key, old in {**DEFAULT_IDS.get(kind, {}), **flat}.items():
        if key not in config and _other_name(key) not in config:
            kept = key in COUNTS or _is_kept(old, change)
            nullable = key in NULLABLE and isinstance(old, int)
            listed = key.endswith("_tokens")
            result[key] = old if kept else None if nullable else [] if listed else -1
    return result


def _is_kept(default: Default, change: Change) -> bool:
    """Whether a default, or one id of several, belongs to a kept token."""
    ids = [default] if isinstance(default, int) else default
    return any(change(old) is not None for old in ids)


def _other_name(key: str) -> str:
    """The alias of a key: config classes read image_token_id and image_token_index alike."""
    if key.endswith("_token_index"):
        return key.removesuffix("index") + "id"
    return key.removesuffix("id") + "index"
