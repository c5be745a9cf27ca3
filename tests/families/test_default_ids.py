"""Default ids: the table is transformers' own, and absent keys are written out from it."""

import re
from typing import Any

import pytest
from transformers import AutoConfig

from surgery.config.token_ids import ID_KEY, visit_ids
from surgery.families.default_ids import (
    COUNTS,
    DEFAULT_IDS,
    MEDIA_IDS,
    OFFSET_SECTIONS,
    SECTION_TYPES,
    SECTIONS,
    fill_defaults,
)
from surgery.families.schema import Wrapper
from surgery.families.table import FAMILIES

KEY = re.compile(f"{ID_KEY.pattern}|{'|'.join(COUNTS)}")
MODEL_TYPES = sorted({*DEFAULT_IDS, *FAMILIES})
COPIES = {"pix2struct": "text_config", "t5gemma2": "encoder"}
"""Types whose class takes ids from a section, whatever the whole names."""


def even(old: int) -> int | None:
    """Only even ids are kept."""
    return None if old % 2 else old // 2


def ids_of(config: Any) -> dict[str, Any]:
    """The class's defaults in ``config``, an instance without arguments."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(config).items()
        if KEY.fullmatch(key) and value is not None and value != []
    }


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_is_what_the_config_class_fills_in(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    section = getattr(config, COPIES.get(model_type, ""), None)
    copied = ids_of(section) if section is not None else {}
    copied = {key: value for key, value in copied.items() if hasattr(config, key)}
    assert ids_of(config) == {**copied, **DEFAULT_IDS.get(model_type, {})}
    for name in (*SECTIONS, *OFFSET_SECTIONS):
        section = getattr(config, name, None)
        if section is None:
            continue
        known = SECTION_TYPES[model_type].get(name)
        if name in SECTIONS:
            assert known == section.model_type
            assert known in DEFAULT_IDS
        else:
            of_text = any(getattr(section, key, None) for key in ("vocab_offset", *MEDIA_IDS))
            assert of_text == (known is not None)
            assert known in (section.model_type, None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_config_class_accepts_what_is_written_for_removed_tokens(model_type: str) -> None:
    written = fill_defaults({"model_type": model_type, "text_config": {}}, lambda old: None)
    del written["text_config"]
    for key in DEFAULT_IDS.get(model_type, {}):
        config = AutoConfig.for_model(model_type, **{key: written[key]})
        assert getattr(config, key) == written[key]
        assert (written[key] in (None, -1, [])) == (key not in COUNTS)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_in_the_table(model_type: str) -> None:
    """One without defaults, too: a class that gains some is noticed."""
    assert model_type in DEFAULT_IDS
    family = FAMILIES[model_type]
    if isinstance(family, Wrapper):
        assert family.section in SECTION_TYPES[model_type]


def test_of_several_default_ids_the_kept_ones_are_written() -> None:
    """As GLM's eos has them."""
    config = {"model_type": "glm"}
    defaults = [151329, 151336, 151338]
    filled = fill_defaults(config, lambda old: None if old == 151329 else old)
    assert filled == {**config, "pad_token_id": None, "eos_token_id": defaults}
    ids = {151336: 7, 151338: 9}
    assert visit_ids(filled, ids.get, "config.json") == {
        **config, "pad_token_id": None, "eos_token_id": [7, 9]
    }  # fmt: skip
    assert fill_defaults(config, lambda old: None)["eos_token_id"] == -1


def test_absent_keys_are_filled_in_after_the_others() -> None:
    config = {"model_type": "llama", "eos_token_id": [5], "hidden_size": 8}
    assert list(fill_defaults(config, lambda old: old).items()) == [
        *config.items(), ("bos_token_id", 1)
    ]  # fmt: skip


def test_null_and_the_other_spelling_are_not_absent() -> None:
    config = {"model_type": "gemma3", "image_token_id": 4, "boi_token_index": None,
              "text_config": {"model_type": "qwen3"}}  # fmt: skip
    assert fill_defaults(config, even) == {**config, "eoi_token_index": 256000}
    config = {"model_type": "qwen3_vl", "image_token_index": 4, "text_config": {}}
    assert "image_token_id" not in fill_defaults(config, even)


def test_a_default_that_points_at_nothing_is_no_token() -> None:
    filled = fill_defaults({"model_type": "qwen2_vl", "text_config": {}}, even)
    assert filled == {
        "model_type": "qwen2_vl",
        "text_config": {"bos_token_id": None, "eos_token_id": None},
        "image_token_id": -1,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": -1,
    }


def test_a_flat_config_has_the_defaults_of_its_text() -> None:
    """As Qwen2-VL's were saved; its class hands the top level to the text's."""
    filled = fill_defaults({"model_type": "qwen2_vl", "eos_token_id": 7}, lambda old: old)
    assert filled["bos_token_id"] == 151643
    assert filled["eos_token_id"] == 7
    config = AutoConfig.for_model("qwen2_vl", bos_token_id=3)
    assert config.text_config.bos_token_id == 3


def test_sections_by_their_own_type_or_their_parents_class() -> None:
    config = {
        "model_type": "gemma3n",
        "text_config": {"model_type": "llama", "bos_token_id": 9},
        "audio_config": {"vocab_offset": 3},
        "vision_config": {},
        "talker_config": {"model_type": "llama"},
        "thinker_config": {"model_type": "qwen2_audio", "text_config": {"model_type": ["llama"]}},
    }
    filled = fill_defaults(config, lambda old: old)
    assert filled["text_config"] == {"model_type": "llama", "bos_token_id": 9, "eos_token_id": 2}
    assert filled["audio_config"] == {"vocab_offset": 3}
    assert filled["vision_config"] == {"vocab_offset": 262144}
    assert filled["talker_config"] == {"model_type": "llama"}
    assert filled["thinker_config"]["audio_token_index"] == 151646
    assert filled["thinker_config"]["text_config"] == {"model_type": ["llama"]}
