"""Token ids in parsed JSON: every key form is found, mapped, and nothing else is touched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.config.token_ids import id_paths, reference_paths, visit_ids
from surgery.errors import TokenizerError
from surgery.tokenizer.id_map import IdMap

HERE = Path("config.json")
IDS = IdMap(np.arange(0, 100, 2), 100)
"""Even ids are kept and halved; odd ones are removed."""

NUMBER_KEYS = [
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "image_token_id", "video_token_id", "vision_start_token_id",
    "image_token_index", "boi_token_index", "eoi_token_index", "image_patch_id", "im_start_id",
    "im_end_id", "im_newline_id", "image_start_id", "slice_end_id", "newline_id", "pad_index",
    "unk_index", "bos_index", "eos_index", "mask_index", "audio_token_id", "audio_token_index",
    "image_end_id", "slice_start_id", "forced_eos_token_id", "mask_token_id", "eoi_token_id",
]  # fmt: skip
LIST_KEYS = ["eos_token_id", "suppress_tokens", "begin_suppress_tokens", "stop_token_ids",
             "visual_indicator_token_ids", "decoder_start_token_id"]  # fmt: skip
NESTED_KEYS = ["bad_words_ids", "force_words_ids"]
OTHER_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "type_vocab_size", "token_type_ids_size",
    "max_length", "model_max_length", "id2label", "architectures", "bos_token", "codec_bos_id",
    "num_token_id_bits", "sliding_window", "layer_types", "codec_eos_token_id", "audio_vocab_size",
    "codebook_pad_token_id", "bos_token_ids_of", "pad_token_type_id", "vocab_offset",
]  # fmt: skip
SECTIONS = ["text_config", "llm_config", "thinker_config", "encoder", "decoder"]

kept = st.integers(0, 49).map(lambda i: 2 * i)
removed = st.integers(0, 49).map(lambda i: 2 * i + 1) | st.integers(100, 10**9)
none = st.none() | st.integers(-300, -1)


def visit(**data: Any) -> dict[str, Any]:
    return visit_ids(data, IDS.new, HERE)


# Forms of a reference.


@pytest.mark.parametrize("key", NUMBER_KEYS)
@pytest.mark.parametrize("old", [0, 2, 98])
def test_a_number_is_mapped(key: str, old: int) -> None:
    assert visit(**{key: old}) == {key: old // 2}


@given(key=st.sampled_from(NUMBER_KEYS), value=none)
def test_null_and_negative_numbers_do_not_change(key: str, value: int | None) -> None:
    assert visit(**{key: value}) == {key: value}


@pytest.mark.parametrize("key", LIST_KEYS)
@given(entries=st.lists(kept | removed | st.integers(-300, -1), max_size=9))
def test_a_list_is_mapped_without_the_removed_entries(key: str, entries: list[int]) -> None:
    expected = [old if old < 0 else old // 2 for old in entries if old < 0 or old in IDS.kept]
    if expected or not entries:
        assert visit(**{key: entries}) == {key: expected}
    else:
        with pytest.raises(TokenizerError, match=f"config.json: {key}: points at no token"):
            visit(**{key: entries})


@pytest.mark.parametrize("key", NESTED_KEYS)
def test_a_word_is_removed_with_any_of_its_tokens(key: str) -> None:
    assert visit(**{key: [[2, 4], [6, 7], [9], [8]]}) == {key: [[1, 2], [4]]}


def test_alternatives_of_words_are_mapped() -> None:
    assert visit(force_words_ids=[[[2, 4], [6]], [[8]]]) == {
        "force_words_ids": [[[1, 2], [3]], [[4]]]
    }


def test_a_biased_sequence_is_removed_with_any_of_its_tokens() -> None:
    bias = [[[2, 4], -1.5], [[6, 7], 2.0], [[9], 1.0], [[8], 10]]
    assert visit(sequence_bias=bias) == {"sequence_bias": [[[1, 2], -1.5], [[4], 10]]}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"(4, 8)": 1.5, "(6, 7)": 2, "(2,)": -10.0}, {"(2, 4)": 1.5, "(1,)": -10.0}),
        ({"4,10": 1}, {"2,5": 1}),
        ({}, {}),
    ],
)
def test_biases_in_a_dict_map_their_keys(old: dict[str, float], new: dict[str, float]) -> None:
    assert visit(sequence_bias=old) == {"sequence_bias": new}


def test_a_map_of_the_vocabulary_follows_it_by_its_values() -> None:
    old = {"<image>": 4, "IMGIMGABZ": 8, "the": 6, "7": 10, "gone": 7, "4": 9}
    assert visit(vocabulary_map=old) == {
        "vocabulary_map": {"<image>": 2, "IMGIMGABZ": 4, "the": 3, "7": 5}
    }
    assert set(reference_paths({"vocabulary_map": old}, HERE).values()) == {4, 8}


@pytest.mark.parametrize("token", ["<image>", "IMGIMGABZ", "<|visual token 000000|>"])
def test_a_map_that_loses_an_image_token_is_refused(token: str) -> None:
    with pytest.raises(TokenizerError, match=r"vocabulary_map: .*no token that is kept: found 7"):
        visit(text_config={"vocabulary_map": {token: 7}})


def test_forced_decoder_ids_map_the_id_not_the_position() -> None:
    assert visit(forced_decoder_ids=[[1, 2], [2, 8], [3, 5]]) == {
        "forced_decoder_ids": [[1, 1], [2, 4]]
    }
    assert visit(forced_decoder_ids=[[1, None], [2, 8]]) == {
        "forced_decoder_ids": [[1, None], [2, 4]]
    }
    assert visit(forced_decoder_ids=None) == {"forced_decoder_ids": None}


def test_added_tokens_decoder_maps_its_keys() -> None:
    tokens = {"0": {"content": "<unk>"}, "10": {"content": "<s>", "id": 10}}
    assert visit(added_tokens_decoder=tokens) == {
        "added_tokens_decoder": {"0": {"content": "<unk>"}, "5": {"content": "<s>", "id": 10}}
    }


@pytest.mark.parametrize("key", ["7", "x", "-1", "1.0"])
def test_added_tokens_decoder_without_a_token_is_refused(key: str) -> None:
    with pytest.raises(TokenizerError, match=f"config.json: added_tokens_decoder.*{key}"):
        visit(added_tokens_decoder={key: {"content": "<x>"}})


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_of_the_same_vocabulary_are_mapped(section: str) -> None:
    found = visit(bos_token_id=2, **{section: {"bos_token_id": 4, "decoder": {"pad_index": 6}}})
    assert found == {"bos_token_id": 1, section: {"bos_token_id": 2, "decoder": {"pad_index": 3}}}


def test_settings_for_a_task_are_mapped() -> None:
    """As mBART names its language."""
    settings = {"decoder_start_token_id": 4, "bad_words_ids": [[6], [7]], "max_length": 6}
    data = {"task_specific_params": {"translation": settings, "other": None}}
    settings = {"decoder_start_token_id": 2, "bad_words_ids": [[3]], "max_length": 6}
    assert visit(**data) == {"task_specific_params": {"translation": settings, "other": None}}
    assert set(id_paths(data, HERE).values()) == {4, 6, 7}
    with pytest.raises(TokenizerError, match=r"task_specific_params: x: pad_token_id: .*found 7"):
        visit(task_specific_params={"x": {"pad_token_id": 7}})


def test_a_listing_is_not_a_reference() -> None:
    data = {"added_tokens_decoder": {"4": {"content": "<a>"}}, "pad_token_id": 6}
    assert set(reference_paths(data, HERE).values()) == {6}


def test_paths_name_every_id() -> None:
    data = {
        "thinker_config": {"text_config": {"eos_token_id": [1, 2]}},
        "sequence_bias": [[[3, 4], 0.5]],
        "forced_decoder_ids": [[7, 5]],
        "added_tokens_decoder": {"6": {"content": "<a>"}},
        "pad_token_id": -1,
    }
    assert {": ".join(map(str, path)): id_ for path, id_ in id_paths(data, "x").items()} == {
        "x: thinker_config: text_config: eos_token_id[0]": 1,
        "x: thinker_config: text_config: eos_token_id[1]": 2,
        "x: sequence_bias[0][0]": 3,
        "x: sequence_bias[0][1]": 4,
        "x: forced_decoder_ids[0]": 5,
        "x: added_tokens_decoder: 6": 6,
    }


@pytest.mark.parametrize("section", ["vision_config", "audio_config", "talker_config", "codec"])
def test_other_sections_are_left_alone(section: str) -> None:
    inside = {"bos_token_id": 4, "eos_token_id": 7, "vocab_size": 5}
    assert visit(**{section: inside}) == {section: inside}


@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.parametrize("value", [4, 7, [4, 7], {"4": 7}, "4", None, True])
def test_other_keys_are_left_alone(key: str, value: object) -> None:
    assert visit(**{key: value}) == {key: value}


@pytest.mark.parametrize("value", [True, False, "<s>", {"a": 4}])
def test_what_is_not_an_id_is_left_alone(value: object) -> None:
    assert visit(eos_token_id=value) == {"eos_token_id": value}


# Refusals.


@given(st.sampled_from(NUMBER_KEYS), removed)
def test_a_single_removed_id_is_refused_by_name(key: str, old: int) -> None:
    message = rf"^config.json: {key}: points at no token that is kept: found {old}; correct the id"
    with pytest.raises(TokenizerError, match=message):
        visit(**{key: old})


@pytest.mark.parametrize(
    "data",
    [
        {"bad_words_ids": [[7], [2, 9]]},
        {"sequence_bias": [[[7], 1.0]]},
        {"sequence_bias": {"(7,)": 1.0}},
        {"forced_decoder_ids": [[0, 7]]},
    ],
    ids=str,
)
def test_a_list_that_loses_everything_is_refused_by_name(data: dict[str, Any]) -> None:
    with pytest.raises(
        TokenizerError, match=f"{next(iter(data))}: points at no token that is kept"
    ):
        visit_ids(data, IDS.new, HERE)


def test_a_refusal_names_the_section() -> None:
    with pytest.raises(TokenizerError, match=r"config.json: text_config: eos_token_id: .*found 7"):
        visit(text_config={"eos_token_id": 7})


@pytest.mark.parametrize(
    "data",
    [
        {"eos_token_id": [2, [4]]},
        {"mask_token_id": "4"},
        {"mask_token_id": 4.0},
        {"eos_token_id": [2, "4"]},
        {"sequence_bias": [[[2]]]},
        {"sequence_bias": [3]},
        {"forced_decoder_ids": [[1]]},
        {"forced_decoder_ids": [5]},
        {"sequence_bias": {"4, x": 1.0}},
        {"sequence_bias": {"-4": 1.0}},
        {"sequence_bias": {"4 8": 1.0}},
    ],
    ids=str,
)
def test_a_malformed_list_is_refused_by_name(data: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=f"config.json: {next(iter(data))}"):
        visit_ids(data, IDS.new, HERE)


# The whole document.

entries = st.one_of(
    st.tuples(st.sampled_from(NUMBER_KEYS), kept | none),
    st.tuples(st.sampled_from(LIST_KEYS), st.lists(kept, max_size=3)),
    st.tuples(st.sampled_from(NESTED_KEYS), st.just([[2, 4], [6]])),
    st.tuples(st.sampled_from(OTHER_KEYS), st.integers(-5, 200) | st.text(max_size=3)),
)
flat = st.lists(entries, max_size=5).map(dict)
configs = st.tuples(st.sampled_from(SECTIONS), flat, flat, flat).map(
    lambda drawn: {**drawn[1], drawn[0]: {**drawn[2], "text_config": drawn[3]}, "last": 1}
)


@given(configs)
def test_order_and_shape_stay_and_nothing_is_changed_in_place(data: dict[str, Any]) -> None:
    before = json.dumps(data)
    result = visit_ids(data, IDS.new, HERE)
    assert json.dumps(data) == before
    assert json.dumps(visit_ids(result, lambda new: int(IDS.kept[new]), HERE)) == before


@given(configs)
def test_referenced_ids_are_those_that_are_mapped(data: dict[str, Any]) -> None:
    mapped: set[int] = set()
    visit_ids(data, lambda old: mapped.add(old) or old, HERE)  # type: ignore[func-returns-value]
    assert set(reference_paths(data, HERE).values()) == mapped


def test_the_identity_changes_nothing() -> None:
    data = {"eos_token_id": [1, 3], "pad_token_id": 7, "sequence_bias": [[[5], 1.0]]}
    assert visit_ids(data, lambda old: old, HERE) == data


@pytest.mark.parametrize("section", ["vision_config", "audio_config"])
def test_the_texts_token_in_a_section_of_images_or_sounds(section: str) -> None:
    """As of Phi-4 multimodal; other ids there are of codes."""
    inside = {"image_token_id": 8, "bos_token_id": 8, "hidden_size": 8}
    found = visit_ids({section: inside}, lambda old: old // 2, HERE)
    assert found == {section: inside | {"image_token_id": 4}}
