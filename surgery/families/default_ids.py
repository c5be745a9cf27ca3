"""Token ids that config classes fill in where config.json names none; the output names them.

If a key were absent from the output, the class would fill in the *old* id. The table has the
defaults of transformers; tests/families/test_default_ids.py compares it with the installed classes.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Change = Callable[[int], int | None]
"""Old id → new id, or None where no kept token has the old id."""

SECTIONS = ("text_config", "llm_config", "thinker_config", "encoder", "decoder")
"""Parts of a config whose ids belong to the text vocabulary."""

ID_SECTIONS = (*SECTIONS, "encoder_config")
"""Those of models that transformers does not register, too: GLiNER's encoder."""

OFFSET_SECTIONS = ("vision_config", "audio_config")
"""Parts with their own vocabularies; only their vocab_offset and MEDIA_IDS are of the text's."""

MEDIA_IDS = ("image_token_id", "audio_token_id")
"""Keys of those parts, as of Phi-4 multimodal's, for the text's token that stands for them."""

Default = int | list[int]

_PAD = {"pad_token_id": 0}
_BLENDERBOT = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_T5 = {"pad_token_id": 0, "eos_token_id": 1}
_GEMMA = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

_BY_HAND: dict[str, Mapping[str, Default]] = {
    "blenderbot": _BLENDERBOT,
    "blenderbot-small": _BLENDERBOT,
    "bart": {**_ROBERTA, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    "bert": _PAD,
    "bert-generation": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
    "big_bird": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 66},
    "bigbird_pegasus": {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "decoder_start_token_id": 2,
    },
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "deberta-v2": _PAD,
    "distilbert": _PAD,
    "electra": _PAD,
    "ernie": _PAD,
    "eurobert": {
        "pad_token_id": 128001,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "mask_token_id": 128002,
    },
    "led": {**_ROBERTA, "decoder_start_token_id": 2},
    "longt5": _T5,
    "m2m_100": {**_ROBERTA, "decoder_start_token_id": 2},
    "marian": {
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "decoder_start_token_id": 58100,
        "forced_eos_token_id": 0,
    },
    "mbart": {**_ROBERTA, "forced_eos_token_id": 2},
    "megatron-bert": _PAD,
    "modernbert": {
        "pad_token_id": 50283,
        "bos_token_id": 50281,
        "eos_token_id": 50282,
        "cls_token_id": 50281,
        "sep_token_id": 50282,
    },
    "mpnet": _ROBERTA,
    "mt5": {**_T5, "decoder_start_token_id": 0},
    "mvp": {**_ROBERTA, "decoder_start_token_id": 2},
    "pegasus": {**_T5, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
    "pegasus_x": {**_T5, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
    "plbart": {**_ROBERTA, "forced_eos_token_id": 2},
    "rembert": {"pad_token_id": 0, "bos_token_id": 312, "eos_token_id": 313},
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "roc_bert": _PAD,
    "roformer": _PAD,
    "switch_transformers": _T5,
    "t5": _T5,
    "t5gemma2": {**_GEMMA, "image_token_index": 256001},
    "t5gemma2_decoder": _GEMMA,
    "t5gemma2_encoder": {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
    },
    "t5gemma2_text": _GEMMA,
    "umt5": {**_T5, "decoder_start_token_id": 0},
    "whisper": {
        "pad_token_id": 50256,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "decoder_start_token_id": 50257,
        "begin_suppress_tokens": [220, 50256],
    },
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "blip": {},
    "blip_text_model": {
        "pad_token_id": 0,
        "bos_token_id": 30522,
        "eos_token_id": 2,
        "sep_token_id": 102,
    },
    "florence2": {"image_token_id": 51289},
    "git": {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102},
    "idefics2": {"image_token_id": 32001},
    "kosmos-2": {},
    "kosmos-2.5": {},
    "kosmos_2_5_text_model": _ROBERTA,
    "kosmos_2_text_model": _ROBERTA,
    "pix2struct": {},
    "pix2struct_text_model": {**_T5, "decoder_start_token_id": 0},
    "pp_formulanet": {},
    "pp_formulanet_text": {**_ROBERTA, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    "prophetnet": {**_PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
    "reformer": {"pad_token_id": 0, "eos_token_id": 2},
    "trocr": {**_ROBERTA, "decoder_start_token_id": 2},
    "udop": _T5,
    "vision-encoder-decoder": {},
    "vit": {},
    "xlm": {
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unk_index": 3,
        "mask_index": 5,
        "mask_token_id": 0,
    },
    "xlnet": {"pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2},
    "xmod": _ROBERTA,
    "gemma3n": {
        "boi_token_id": 255999,
        "eoi_token_id": 262144,
        "image_token_id": 262145,
        "boa_token_id": 256000,
        "eoa_token_id": 262272,
        "audio_token_id": 262273,
    },
    "gemma3n_audio": {"vocab_offset": 262272},
    "gemma3n_text": {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "vocab_size_per_layer_input": 262144,
    },
    "gemma3n_vision": {"vocab_offset": 262144},
    "mllama": {"image_token_index": 128256},
    "mllama_text_model": {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "qwen2_audio": {"audio_token_index": 151646},
}
"""Types that the table of families lacks."""

_TYPES_BY_HAND: dict[str, Mapping[str, str]] = {
    "gemma3n": {
        "text_config": "gemma3n_text",
        "vision_config": "gemma3n_vision",
        "audio_config": "gemma3n_audio",
    },
    "blip": {"text_config": "blip_text_model"},
    "florence2": {"text_config": "bart"},
    "git": {},
    "gliner": {"encoder_config": "deberta-v2"},
    "idefics2": {"text_config": "mistral"},
    "kosmos-2": {"text_config": "kosmos_2_text_model"},
    "kosmos-2.5": {"text_config": "kosmos_2_5_text_model"},
    "mllama": {"text_config": "mllama_text_model"},
    "pix2struct": {"text_config": "pix2struct_text_model"},
    "pp_formulanet": {"text_config": "pp_formulanet_text"},
    "t5gemma2": {"encoder": "t5gemma2_encoder", "decoder": "t5gemma2_decoder"},
    "t5gemma2_encoder": {"text_config": "t5gemma2_text"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "bert"},
    "qwen2_audio": {"text_config": "qwen2"},
}

DERIVED = Path(__file__).with_name("derived.json")
"""Model type → what ``python -m tools.derive`` found: tensors and axes, ids, types of sections."""


@cache
def derived() -> Mapping[str, Any]:
    """The content of ``DERIVED``."""
    content: Mapping[str, Any] = json.loads(DERIVED.read_text("utf-8"))
    return content


def _ids() -> dict[str, dict[str, Default]]:
    found: dict[str, dict[str, Default]] = {}
    for name, entry in derived().items():
        found[name] = entry["ids"]
        for section in entry.get("sections", {}).values():
            found.setdefault(section["type"], section["ids"])
    return found


def _types() -> dict[str, dict[str, str]]:
    return {
        name: {key: section["type"] for key, section in entry["sections"].items()}
        for name, entry in derived().items()
        if "sections" in entry
    }


DEFAULT_IDS: Mapping[str, Mapping[str, Default]] = _BY_HAND | _ids()
"""model_type → key → id; vocab_offset and vocab_size_per_layer_input are numbers of ids."""

SECTION_TYPES: Mapping[str, Mapping[str, str]] = _TYPES_BY_HAND | _types()
"""model_type → section → its model_type, for a section that does not name one."""

NULLABLE = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys where null means "no such token". For other keys the classes accept only a number: -1.
Those of lists, named in the plural such as begin_suppress_tokens, accept an empty one.

Where the default is a list of ids, null would mean that list: -1 again."""

STRICT = (
    ("cwm", "bos_token_id"),
    ("emu3_text_model", "bos_token_id"),
    ("emu3_text_model", "pad_token_id"),
    ("mllama_text_model", "bos_token_id"),
    ("modernbert-decoder", "bos_token_id"),
    ("modernbert-decoder", "pad_token_id"),
)
"""Those of them, by model type, for which the class accepts only a number, too."""

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
    for name in (*ID_SECTIONS, *OFFSET_SECTIONS):
        if isinstance(config.get(name), dict):
            given = None if "model_type" in config[name] else inner.get(name)
            result[name] = fill_defaults(config[name], change, given)
    flat = {} if "text_config" in config else DEFAULT_IDS.get(inner.get("text_config", ""), {})
    for key, old in {**DEFAULT_IDS.get(kind, {}), **flat}.items():
        if key not in config and _other_name(key) not in config:
            kept = key in COUNTS or _is_kept(old, change)
            nullable = key in NULLABLE and isinstance(old, int) and (kind, key) not in STRICT
            listed = key.endswith(("_tokens", "_ids"))
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
