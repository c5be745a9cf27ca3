"""Tokenizers of vocab.json and merges.txt: the same as transformers builds, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import SurgeryError, TokenizerError
from surgery.files.model_files import LEGACY_NAMES
from surgery.tokenizer.legacy import KNOWN_CLASSES, is_legacy
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizer
from tests.support import tiny
from tests.support.command import Run
from tests.support.languages import ARTICLE_1
from tests.support.tiny import prose

CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BASE = tiny.TOKENS - len(tiny.SPECIAL)
"""Entries of vocab.json, and so the first id of a token that it lacks."""
ORDER = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
LSTRIP = {"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": True}
DECODER = {
    **{str(BASE + index): {"content": token} for token, index in ORDER.items()},
    str(BASE + 3): LSTRIP,
    str(BASE + 4): {"content": "thing", "normalized": True, "single_word": True},
}
ADDED = {token: BASE + index for token, index in ORDER.items()}
MAP = {
    **ROLES,
    "bos_token": {"content": "<s>"},
    "pad_token": LSTRIP,
    "additional_special_tokens": ["<x>"],
}

FILES: dict[str, dict[str, Any]] = {
    "tokens without ids": {"tokenizer_config.json": ROLES},
    "no roles": {"tokenizer_config.json": {}},
    "bos around": {"tokenizer_config.json": {**ROLES, "add_bos_token": True}},
    "both around": {
        "tokenizer_config.json": {**ROLES, "add_bos_token": True, "add_eos_token": True}
    },
    "bos around, but none": {"tokenizer_config.json": {"bos_token": None, "add_bos_token": True}},
    "prefix space": {"tokenizer_config.json": {**ROLES, "add_prefix_space": True}},
    "decoder": {"tokenizer_config.json": {**ROLES, "added_tokens_decoder": DECODER}},
    "decoder and more": {
        "tokenizer_config.json": {
            **ROLES,
            "added_tokens_decoder": DECODER,
            "extra_special_tokens": {},
            "additional_special_tokens": ["<x>", "</s>"],
        },
        "special_tokens_map.json": {"bos_token": "not read"},
    },
    "added": {"tokenizer_config.json": ROLES, "added_tokens.json": {**ADDED, "thing": BASE + 4}},
    "some roles": {"tokenizer_config.json": {"eos_token": "</s>", "unk_token": "<unk>"}},
    "added and listed": {
        "tokenizer_config.json": {"additional_special_tokens": ["thing"]},
        "added_tokens.json": {"thing": BASE},
    },
    "no list": {
        "tokenizer_config.json": {"extra_special_tokens": {}, "added_tokens_decoder": {}, **ROLES}
    },
    "map": {"tokenizer_config.json": {"bos_token": "</s>"}, "special_tokens_map.json": MAP},
    "added and map": {
        "tokenizer_config.json": {},
        "special_tokens_map.json": MAP,
        "added_tokens.json": {**ADDED, "thing": BASE + 4},
    },
}
"""Name → files beside vocab.json and merges.txt."""


def legacy(path: Path, class_: str | None, files: dict[str, Any]) -> Path:
    """Write the tiny tokenizer in the old form, without special tokens in its vocabulary."""
    model = json.loads(tiny.tokenizer(special_first=False, bos=False).to_str())["model"]
    files = {"tokenizer_config.json": {}, "config.json": {"model_type": "llama"}, **files}
    files["tokenizer_config.json"] = {**files["tokenizer_config.json"], "tokenizer_class": class_}
    vocab = {token: id_ for token, id_ in model["vocab"].items() if id_ < BASE}
    for name, content in {"vocab.json": vocab, **files}.items():
        (path / name).write_text(json.dumps(content), "utf-8")
    rules = "\n".join(" ".join(merge) for merge in model["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{rules}\n", "utf-8")
    return path


@pytest.mark.parametrize("class_", CLASSES)
@pytest.mark.parametrize("files", FILES.values(), ids=FILES.keys())
def test_same_as_transformers(tmp_path: Path, class_: str, files: dict[str, Any]) -> None:
    directory = legacy(tmp_path, class_, files)
    auto = AutoTokenizer.from_pretrained(directory)
    built = TokenizerFile.open(directory)
    assert type(auto).__name__ == class_.removesuffix("Fast")
    assert built.data == json.loads(auto.backend_tokenizer.to_str())
    assert built.path == directory / "tokenizer.json"
    assert built.added == auto.get_added_vocab()
    assert set(auto.all_special_ids) <= set(built.token_ids.values())
    library, loaded = built.library(), load_tokenizer(directory)
    for text in (prose(3000), *ARTICLE_1.values(), "<s>a  <pad> thing, things </s><x>\r\n e\u0301"):
        expected = auto(text)["input_ids"]
        assert library.encode(text).ids == expected
        assert loaded.encode(text).ids == expected
        assert library.decode(expected, skip_special_tokens=False) == auto.decode(expected)


@pytest.fixture(scope="module", params=sorted(KNOWN_CLASSES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same tokenizer, ours and transformers'."""
    files = FILES["decoder and more"]
    directory = legacy(tmp_path_factory.mktemp("legacy"), request.param, files)
    return TokenizerFile.open(directory).library(), AutoTokenizer.from_pretrained(directory)


@given(text=st.text(max_size=60))
def test_same_ids_of_any_text(pair: Any, text: str) -> None:
    ours, auto = pair
    assert ours.encode(text).ids == auto(text)["input_ids"]


def test_the_two_classes_differ(tmp_path: Path) -> None:
    text = "e\u0301 12345 it'S"
    ids = []
    for class_ in KNOWN_CLASSES:
        (tmp_path / class_).mkdir()
        directory = legacy(tmp_path / class_, class_, {})
        ids.append(TokenizerFile.open(directory).library().encode(text).ids)
    assert ids[0] != ids[1]


def test_reopen_builds_the_same(tmp_path: Path) -> None:
    directory = legacy(tmp_path, "Qwen2Tokenizer", FILES["decoder"])
    assert TokenizerFile.reopen(directory).data == TokenizerFile.open(directory).data


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    directory = legacy(tmp_path, "Qwen2Tokenizer", FILES["decoder"])
    assert is_legacy(directory)
    tiny.tokenizer().save(str(directory / "tokenizer.json"))
    assert not is_legacy(directory)
    assert TokenizerFile.open(directory).vocab["<unk>"] == 0


@pytest.mark.parametrize("name", LEGACY_NAMES)
def test_fingerprint_covers(llama: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(llama, tmp_path / "model")
    (root / "tokenizer.json").unlink()
    kept = json.loads((root / "config.json").read_text("utf-8"))
    legacy(root, "GPT2Tokenizer", {**FILES["added and map"], "config.json": kept})
    before = Checkpoint.open(root).fingerprint
    with open(root / name, "a") as file:
        file.write("\n")
    assert Checkpoint.open(root).fingerprint != before


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text("utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), "utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("tokenizer_config.json", "GPT2Tokenizer", "BertTokenizer",
         ("tokenizer_class", "expected GPT2Tokenizer or Qwen2Tokenizer", "found BertTokenizer",
          "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")),
        ("tokenizer_config.json", '"GPT2Tokenizer"', "null", ("tokenizer_class", "found none")),
        ("config.json", "llama", "qwen2",
         ("tokenizer_config.json", "expected Qwen2Tokenizer", "found GPT2Tokenizer")),
        ("tokenizer_config.json", "{", '{"image_token": "<s>",',
         ("transformers 4 and 5", "found image_token")),
        ("tokenizer_config.json", "{", '{"additional_special_tokens": ["<y>"],',
         ("transformers 4 and 5", "found ['<y>'] and ['<x>']")),
        ("tokenizer_config.json", "{", '{"added_tokens_decoder": [],',
         ("cannot be read", "AttributeError")),
        ("added_tokens.json", "620", "700",
         ("token 'thing'", "another id", "expected 620", "found 700", "save_pretrained(DIR)")),
        ("added_tokens.json", "620", "619", ("token 'thing'", "expected 620", "found 619")),
        ("tokenizer_config.json", "{", '{"added_tokens_decoder": {"7": {"content": "<z>"}},',
         ("token '<z>'", "another id", "expected 616", "found 7;")),
        ("merges.txt", "\n", "\nĠ t h\n", ("line 2", "not a pair of tokens", "found 'Ġ t h'")),
        ("merges.txt", "\n", "\n\n", ("line 2", "not a pair of tokens", "published")),
        ("merges.txt", "\n", "\nnot there\n", ("does not fit vocab.json", "`not`")),
        ("vocab.json", '": 5,', '": 6,', ("id 6", "belongs to two tokens")),
        ("vocab.json", '": 5,', '": "5",', ("has an id that is not a number", "published")),
        ("vocab.json", "{", "[{", ("not valid JSON",)),
        ("tokenizer_config.json", "{", "[{", ("not valid JSON",)),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, name: str, old: str, new: str, words: tuple[str, ...]) -> None:
    directory = legacy(tmp_path, "GPT2Tokenizer", FILES["added and map"])
    edit(directory / name, old, new)
    with pytest.raises(SurgeryError) as refusal:
        TokenizerFile.open(directory)
    message = str(refusal.value)
    assert "\n" not in message
    where = "tokenizer_config.json" if name == "config.json" else name
    assert all(word in message for word in (str(directory / where), *words)), message


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    directory = legacy(tmp_path, "GPT2Tokenizer", {})
    before = TokenizerFile.open(directory).data
    rules = (directory / "merges.txt").read_bytes()
    (directory / "merges.txt").write_bytes(rules.replace(b"\n", b"\r\n"))
    assert TokenizerFile.open(directory).data == before


def test_no_object(tmp_path: Path) -> None:
    directory = legacy(tmp_path, "GPT2Tokenizer", {})
    (directory / "vocab.json").write_text("[1]")
    with pytest.raises(SurgeryError, match=r"vocab\.json: is not a JSON object: .*found list"):
        TokenizerFile.open(directory)


def test_merges_of_other_bytes(tmp_path: Path) -> None:
    directory = legacy(tmp_path, "GPT2Tokenizer", {})
    (directory / "merges.txt").write_bytes(b"\xff a\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: is not UTF-8"):
        TokenizerFile.open(directory)


@pytest.mark.parametrize(
    ("absent", "found"),
    [
        (["vocab.json"], ": found merges.txt alone;"),
        (["merges.txt"], ": found vocab.json alone;"),
        (["vocab.json", "merges.txt"], ";"),
    ],
)
def test_missing(tmp_path: Path, absent: list[str], found: str) -> None:
    directory = legacy(tmp_path, "GPT2Tokenizer", {})
    for name in absent:
        (directory / name).unlink()
    with pytest.raises(TokenizerError) as refusal:
        TokenizerFile.open(directory)
    expected = f"{directory / 'tokenizer.json'}: is missing{found} save the tokenizer"
    assert str(refusal.value).startswith(expected)


def test_the_whole_way_without_a_tokenizer_json(llama: Path, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    data = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in data["model"]["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    sizes = ("--vocab-size", 480, "--intermediate-size", 64, "--samples", 2, "--seq-len", 32)
    result = run("prune", source, "--data", tiny.TEXT, *sizes, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    pruned, old = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    assert pruned.get_vocab_size() == 480
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()).items() <= (
        pruned.get_vocab().items()
    )
    (tmp_path / "out" / "tokenizer.json").unlink()
    rebuilt = load_tokenizer(tmp_path / "out")
    for text in ("The crew <s> of the ship</s>", "naïve 人 🙂"):
        assert rebuilt.encode(text).ids == pruned.encode(text).ids
        assert pruned.decode(pruned.encode(text).ids) == old.decode(old.encode(text).ids)
