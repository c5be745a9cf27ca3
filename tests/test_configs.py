"""Token ids in JSON files: every key form is found, mapped, and nothing else is touched."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint import Checkpoint
from surgery.configs import (
    referenced_ids,
    referenced_tokens,
    rewrite_config,
    token_references,
    visit_ids,
)
from surgery.errors import TokenizerError
from surgery.families import FAMILIES
from surgery.idmap import IdMap
from surgery.layout import Layout
from surgery.vocabulary import rarity_of

HERE = Path("config.json")
IDS = IdMap(np.arange(0, 100, 2), 100)
"""Even ids stay and are halved; odd ones go."""

NUMBER_KEYS = [
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "image_token_id", "video_token_id", "vision_start_token_id",
    "image_token_index", "boi_token_index", "eoi_token_index", "image_patch_id", "im_start_id",
    "im_end_id", "im_newline_id", "image_start_id", "slice_end_id", "newline_id", "pad_index",
    "unk_index", "bos_index", "eos_index", "mask_index", "audio_token_id",
]  # fmt: skip
LIST_KEYS = ["eos_token_id", "suppress_tokens", "begin_suppress_tokens", "stop_token_ids"]
NESTED_KEYS = ["bad_words_ids", "force_words_ids"]
OTHER_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "type_vocab_size", "token_type_ids_size",
    "max_length", "model_max_length", "id2label", "architectures", "bos_token", "codec_bos_id",
    "num_token_id_bits", "sliding_window", "layer_types",
]  # fmt: skip
SECTIONS = ["text_config", "llm_config", "thinker_config", "encoder", "decoder"]

kept = st.integers(0, 49).map(lambda i: 2 * i)
gone = st.integers(0, 49).map(lambda i: 2 * i + 1) | st.integers(100, 10**9)
none = st.none() | st.integers(-300, -1)


def visit(**data: Any) -> dict[str, Any]:
    return visit_ids(data, IDS.new, HERE)


# Forms of a reference.


@pytest.mark.parametrize("key", NUMBER_KEYS)
@pytest.mark.parametrize("old", [0, 2, 98])
def test_a_number_is_mapped(key: str, old: int) -> None:
    assert visit(**{key: old}) == {key: old // 2}


@given(key=st.sampled_from(NUMBER_KEYS), value=none)
def test_null_and_negative_numbers_stay(key: str, value: int | None) -> None:
    assert visit(**{key: value}) == {key: value}


@pytest.mark.parametrize("key", LIST_KEYS)
@given(entries=st.lists(kept | gone | st.integers(-300, -1), max_size=9))
def test_a_list_is_mapped_without_the_entries_that_go(key: str, entries: list[int]) -> None:
    expected = [old if old < 0 else old // 2 for old in entries if old < 0 or old in IDS.kept]
    if expected or not entries:
        assert visit(**{key: entries}) == {key: expected}
    else:
        with pytest.raises(TokenizerError, match=f"config.json: {key}: points at no token"):
            visit(**{key: entries})


@pytest.mark.parametrize("key", NESTED_KEYS)
def test_a_word_goes_with_any_of_its_tokens(key: str) -> None:
    assert visit(**{key: [[2, 4], [6, 7], [9], [8]]}) == {key: [[1, 2], [4]]}


def test_alternatives_of_words_are_mapped() -> None:
    assert visit(force_words_ids=[[[2, 4], [6]], [[8]]]) == {
        "force_words_ids": [[[1, 2], [3]], [[4]]]
    }


def test_a_biased_sequence_goes_with_any_of_its_tokens() -> None:
    bias = [[[2, 4], -1.5], [[6, 7], 2.0], [[9], 1.0], [[8], 10]]
    assert visit(sequence_bias=bias) == {"sequence_bias": [[[1, 2], -1.5], [[4], 10]]}


def test_forced_decoder_ids_map_the_id_not_the_place() -> None:
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


@pytest.mark.parametrize("section", ["vision_config", "audio_config", "talker_config", "codec"])
def test_other_sections_are_left_alone(section: str) -> None:
    inside = {"bos_token_id": 4, "image_token_id": 7, "vocab_size": 5}
    assert visit(**{section: inside}) == {section: inside}


@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.parametrize("value", [4, 7, [4, 7], {"4": 7}, "4", None, True])
def test_other_keys_are_left_alone(key: str, value: object) -> None:
    assert visit(**{key: value}) == {key: value}


@pytest.mark.parametrize("value", [True, False, "4", {"a": 4}, 4.5])
def test_what_is_no_id_is_left_alone(value: object) -> None:
    assert visit(eos_token_id=value) == {"eos_token_id": value}


# Refusals.


@given(st.sampled_from(NUMBER_KEYS), gone)
def test_a_single_id_that_goes_is_refused_by_name(key: str, old: int) -> None:
    message = rf"^config.json: {key}: points at no token that stays: found {old}; correct the id"
    with pytest.raises(TokenizerError, match=message):
        visit(**{key: old})


def test_a_refusal_names_the_section() -> None:
    with pytest.raises(TokenizerError, match=r"config.json: text_config: eos_token_id: .*found 7"):
        visit(text_config={"eos_token_id": 7})


@pytest.mark.parametrize(
    "data",
    [
        {"eos_token_id": [2, [4]]},
        {"sequence_bias": [[[2]]]},
        {"sequence_bias": [3]},
        {"forced_decoder_ids": [[1]]},
        {"forced_decoder_ids": [5]},
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
    assert referenced_ids(data, HERE) == mapped


def test_the_identity_changes_nothing() -> None:
    data = {"eos_token_id": [1, 3], "pad_token_id": 7, "sequence_bias": [[[5], 1.0]]}
    assert visit_ids(data, lambda old: old, HERE) == data


# Tokens named by their text.


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}, {"<s>", "</s>"}),
        ({"additional_special_tokens": ["<a>", {"content": "<b>"}]}, {"<a>", "<b>"}),
        ({"extra_special_tokens": {"image_token": "<i>", "x": {"content": "<x>"}}}, {"<i>", "<x>"}),
        ({"extra_special_tokens": ["<e>"]}, {"<e>"}),
        ({"model_specific_special_tokens": {"y": "<y>"}}, {"<y>"}),
        ({"unk_token": None, "pad_token": "", "bos_token_id": 1, "tokenizer_class": "T"}, set()),
    ],
)  # fmt: skip
def test_tokens_named_by_their_text(data: dict[str, Any], tokens: set[str]) -> None:
    assert referenced_tokens(data) == tokens


# config.json of a model.


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None drops one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_llama_without_bos_keeps_the_default_ids_that_its_config_class_fills_in(
    model: Path,
) -> None:
    edit(model / "config.json", bos_token_id=None, eos_token_id=None)
    config = Checkpoint.open(model).config
    ids = IdMap(np.array([0, 2, 3, *range(300, 400)]), 640)
    result = rewrite_config(config, FAMILIES["llama"], ids, 64, HERE)
    assert result["eos_token_id"] == 1
    assert result["bos_token_id"] is None  # its row is gone: the old 1 would be another token
    ids = rarity_of(Layout.of(Checkpoint.open(model))).id_map(300)
    result = rewrite_config(config, FAMILIES["llama"], ids, 64, HERE)
    assert (result["bos_token_id"], result["eos_token_id"]) == (ids.new(1), ids.new(2))
    assert list(result)[: len(config)] == list(config)


def test_null_is_not_a_default() -> None:
    config = {"bos_token_id": None, "vocab_size": 100, "intermediate_size": 9}
    result = rewrite_config(config, FAMILIES["llama"], IDS, 8, HERE)
    assert result == {
        "bos_token_id": None,
        "vocab_size": 50,
        "intermediate_size": 8,
        "eos_token_id": 1,
    }


def test_a_whole_vocabulary_leaves_every_id_as_it_is() -> None:
    config = {"vocab_size": 100, "eos_token_id": 10**6, "intermediate_size": 9}
    result = rewrite_config(config, FAMILIES["llama"], IdMap(np.arange(100), 100), 8, HERE)
    assert result == config | {"intermediate_size": 8}


def test_every_file_beside_the_weights_keeps_its_tokens(model: Path) -> None:
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    rare = sorted(tokens, key=lambda token: tokens[token])[-6:]
    edit(model / "config.json", eos_token_id=[2, tokens[rare[0]]])
    edit(model / "generation_config.json", suppress_tokens=[tokens[rare[1]], 639])
    edit(model / "tokenizer_config.json", additional_special_tokens=[rare[2], "<absent>"])
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": rare[3]}}))
    (model / "processor_config.json").write_text(json.dumps({"image_token_id": tokens[rare[4]]}))
    found = token_references(Checkpoint.open(model), tokens)
    assert {tokens[token] for token in rare[:5]} <= found
    assert tokens[rare[5]] not in found
    assert 639 not in found
    kept_ids = rarity_of(Layout.of(Checkpoint.open(model))).id_map(300).kept
    assert {tokens[token] for token in rare[:5]} <= set(kept_ids.tolist())
