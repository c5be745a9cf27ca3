"""JSON files beside the weights: sizes, names of tokens, chat templates, and config.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.apply.companions import rewrite_document
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.config.rewrite import (
    referenced_tokens,
    remove_tokens,
    rewrite_config,
    template_tokens,
    token_references,
    visit_sizes,
)
from surgery.errors import TokenizerError
from surgery.families.table import family_of
from surgery.tokenizer.id_map import IdMap

HERE = Path("config.json")
IDS = IdMap(np.arange(0, 100, 2), 100, rowless=3)
"""Even ids are kept and halved; odd ones are removed; 3 tokens have no row."""
LLAMA = family_of({"model_type": "llama"}, HERE)

# Tokens named by their text.


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}, {"<s>", "</s>"}),
        ({"image_token": "<i>", "add_bos_token": True, "max_new_tokens": 7}, {"<i>"}),
        ({"additional_special_tokens": ["<a>", {"content": "<b>"}]}, set()),
        ({"extra_special_tokens": {"image_token": "<i>", "x": {"content": "<x>"}}}, {"<i>", "<x>"}),
        ({"extra_special_tokens": ["<e>"], "suppress_tokens": [1]}, set()),
        ({"model_specific_special_tokens": {"y": "<y>"}}, {"<y>"}),
        ({"unk_token": None, "pad_token": "", "bos_token_id": 1, "tokenizer_class": "T"}, set()),
    ],
)  # fmt: skip
def test_tokens_that_have_a_role(data: dict[str, Any], tokens: set[str]) -> None:
    assert referenced_tokens(data) == tokens


def test_removed_tokens_are_named_no_more() -> None:
    data = {
        "bos_token": "<s>",
        "additional_special_tokens": ["<a>", {"content": "<b>", "lstrip": True}, "<c>"],
        "extra_special_tokens": ["<a>"],
        "added_tokens_decoder": {"1": {"content": "<a>"}, "2": {"content": "<c>"}, "3": "<b>"},
        "suppress_tokens": [1, 2],
        "chat_template": "<a>",
    }
    before = json.dumps(data)
    assert remove_tokens(data, {"<a>", "<b>", "the"}.__contains__, HERE) == {
        "bos_token": "<s>",
        "additional_special_tokens": ["<c>"],
        "extra_special_tokens": [],
        "added_tokens_decoder": {"2": {"content": "<c>"}},
        "suppress_tokens": [1, 2],
        "chat_template": "<a>",
    }
    assert json.dumps(data) == before


@pytest.mark.parametrize(
    "data", [{"bos_token": "<a>"}, {"extra_special_tokens": {"image_token": {"content": "<a>"}}}]
)
def test_a_token_with_a_role_may_not_be_removed(data: dict[str, Any]) -> None:
    with pytest.raises(
        TokenizerError, match=r"config.json: token '<a>': has a role .*; plan again"
    ):
        remove_tokens(data, {"<a>"}.__contains__, HERE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": 'a\n"<a>" b'})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "x", "template": "-"}, {"template": "<a>"}]}),
        ),
        ("chat_template.json", json.dumps({"chat_template": "{{ '<a>' }}"})),
        ("chat_template.jinja", "{{ '<a>' }}"),
        ("additional_chat_templates/tool_use.jinja", "{{ '<a>' }}"),
        ("processor_config.json", json.dumps({"chat_template": "<a>"})),
    ],
)
def test_tokens_of_a_chat_template(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "other.json").write_text(json.dumps({"template": "<b>"}))
    assert template_tokens(tmp_path, {"<a>": 5, "<b>": 6, "<c>": 7}) == {5}


def test_without_a_chat_template_no_token_is_in_one(tmp_path: Path) -> None:
    for template in (None, 7, [3], [{"name": "<a>"}], {"template": "<a>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert template_tokens(tmp_path, {"<a>": 5, "None": 6, "3": 7}) == set()


# Sizes of the vocabulary.

SIZE_KEYS = ["vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size",
             "n_words", "n_token", "vocab_size_per_layer_input", "vocab_offset"]  # fmt: skip


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize(("old", "new"), [(100, 50), (103, 53), (None, None)])
def test_a_size_is_replaced_in_every_section(key: str, old: int | None, new: int | None) -> None:
    data = {key: old, "decoder": {key: old}, "thinker_config": {"encoder": {key: old}}}
    assert visit_sizes(data, IDS, HERE) == {
        key: new, "decoder": {key: new}, "thinker_config": {"encoder": {key: new}}
    }  # fmt: skip


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize("size", [99, 101, 50, 0, "100", True])
def test_a_size_of_another_vocabulary_is_refused_by_name(key: str, size: object) -> None:
    match = f"config.json: decoder: {key}: is not the size .*expected 100, found {size}; correct"
    with pytest.raises(TokenizerError, match=match):
        visit_sizes({"decoder": {key: size}}, IDS, HERE)


def test_only_the_offset_counts_in_sections_of_other_vocabularies() -> None:
    data = {"vision_config": {"vocab_size": 128, "vocab_offset": 100}, "type_vocab_size": 100,
            "audio_config": {"vocab_size": 100}, "talker_config": {"vocab_size": 100},
            "audio_vocab_size": 100}  # fmt: skip
    assert visit_sizes(data, IDS, HERE) == {
        **data, "vision_config": {"vocab_size": 128, "vocab_offset": 50}
    }  # fmt: skip
    with pytest.raises(TokenizerError, match=r"audio_config: vocab_offset: .*found 228"):
        visit_sizes({"audio_config": {"vocab_offset": 228}}, IDS, HERE)


def test_a_text_config_without_a_size_is_given_one() -> None:
    assert visit_sizes({"text_config": {}}, IDS, HERE) == {"text_config": {"vocab_size": 50}}


# config.json of a model.


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_llama_without_bos_keeps_the_default_ids_that_its_config_class_fills_in(
    model: Path,
) -> None:
    edit(model / "config.json", bos_token_id=None, eos_token_id=None)
    (model / "generation_config.json").unlink()  # it names them, too
    config = Checkpoint.open(model).config
    ids = IdMap(np.array([0, 2, 3, *range(300, 400)]), 640)
    result = rewrite_config(config, LLAMA, ids, {"intermediate_size": 64}, HERE)
    assert result["eos_token_id"] == 1
    assert result["bos_token_id"] is None  # its row is removed: the old 1 would be another token
    found = token_references(Checkpoint.open(model), {"a": 0, "b": 1, "c": 2, "d": 3})
    assert {1, 2} <= found.keys()
    assert list(result)[: len(config)] == list(config)


def test_null_is_not_a_default() -> None:
    config = {
        "model_type": "llama",
        "bos_token_id": None,
        "vocab_size": 100,
        "intermediate_size": 9,
    }
    result = rewrite_config(config, LLAMA, IDS, {"intermediate_size": 8}, HERE)
    assert result == {
        "model_type": "llama",
        "bos_token_id": None,
        "vocab_size": 50,
        "intermediate_size": 8,
        "eos_token_id": 1,
    }


def test_a_whole_vocabulary_leaves_every_id_as_it_is() -> None:
    config = {"vocab_size": 100, "eos_token_id": 10**6, "intermediate_size": 9}
    whole = IdMap(np.arange(100), 100)
    result = rewrite_config(config, LLAMA, whole, {"intermediate_size": 8}, HERE)
    assert result == config | {"intermediate_size": 8}


def test_a_width_that_config_json_leaves_to_its_class_is_written_out() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    result = rewrite_config(config, LLAMA, IdMap(np.arange(100), 100), {}, HERE)
    assert result == config
    result = rewrite_config(config, LLAMA, IDS, {"intermediate_size": 8}, HERE)
    assert result["vocab_size"] == 50
    assert result["intermediate_size"] == 8


def test_a_width_given_for_each_layer_stays_a_list() -> None:
    config = {"model_type": "llama", "vocab_size": 100, "intermediate_size": [9, 9, 9]}
    result = rewrite_config(config, LLAMA, IDS, {"intermediate_size": 8}, HERE)
    assert result["intermediate_size"] == [8, 8, 8]


@pytest.mark.parametrize("inner", ["gemma3_text", None])
def test_the_sizes_of_a_language_model_are_in_its_section(inner: str | None) -> None:
    text = {"model_type": inner, "vocab_size": 100, "intermediate_size": 9, "eos_token_id": 4}
    vision = {"vocab_size": 77, "intermediate_size": 9}
    config: dict[str, Any] = {
        "model_type": "gemma3",
        "image_token_index": 6,
        "text_config": {key: value for key, value in text.items() if value},
        "vision_config": vision,
        "boi_token_index": 8,
    }
    before = json.dumps(config)
    family = family_of(config, HERE)
    result = rewrite_config(config, family, IDS, {"intermediate_size": 8}, HERE)
    assert json.dumps(config) == before
    assert list(result)[: len(config)] == list(config)
    assert result["vision_config"] == vision
    assert (result["image_token_index"], result["boi_token_index"]) == (3, 4)
    assert result["text_config"] == config["text_config"] | {
        "vocab_size": 50,
        "intermediate_size": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    assert "vocab_size" not in result
    assert "intermediate_size" not in result


def test_every_file_beside_the_weights_keeps_its_tokens(model: Path) -> None:
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    rare = sorted(tokens, key=lambda token: tokens[token])[-6:]
    edit(model / "config.json", eos_token_id=[2, tokens[rare[0]]])
    edit(model / "generation_config.json", suppress_tokens=[tokens[rare[1]], 639])
    edit(
        model / "tokenizer_config.json",
        additional_special_tokens=[rare[5]],
        added_tokens_decoder={str(tokens[rare[5]]): {"content": rare[5]}},
    )
    edit(model / "config.json", text_config={"pad_token_id": tokens[rare[2]]})
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": rare[3]}}))
    (model / "processor_config.json").write_text(json.dumps({"image_token_id": tokens[rare[4]]}))
    found = token_references(Checkpoint.open(model), tokens)
    assert {tokens[token] for token in rare[:5]} <= found.keys()
    assert tokens[rare[5]] not in found  # only listed
    assert 639 not in found


def test_a_removed_token_leaves_the_listings_of_every_file(model: Path) -> None:
    tokens = {"<a>": 4, "<b>": 5, "<c>": 6}
    edit(
        model / "tokenizer_config.json",
        vocab_size=640,
        additional_special_tokens=["<a>", "<b>"],
        added_tokens_decoder={"4": {"content": "<a>"}, "6": {"content": "<c>"}},
    )
    ids = IdMap(np.array([0, 1, 2, 3, 5, 6]), 640)
    result = rewrite_document(model / "tokenizer_config.json", tokens, ids)
    assert result["additional_special_tokens"] == ["<b>"]
    assert result["added_tokens_decoder"] == {"5": {"content": "<c>"}}
    assert result["vocab_size"] == 6
    for old, new in ((3, 2), (620, 620)):  # the number of tokens; neither of the two
        edit(model / "tokenizer_config.json", vocab_size=old)
        result = rewrite_document(model / "tokenizer_config.json", tokens, ids)
        assert result["vocab_size"] == new
    edit(model / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<x>"}})
    with pytest.raises(TokenizerError, match="added_tokens_decoder: 7: is the id of no token"):
        rewrite_document(model / "tokenizer_config.json", tokens, ids)
