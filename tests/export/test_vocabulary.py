"""Tokenizers in GGUF: tokens, kinds, scores, special ids, templates, the pre-tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

import surgery
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import OptionError, TokenizerError
from surgery.export.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from surgery.planning.plan import PROVENANCE_NAME, Plan
from surgery.tokenizer import kinds
from surgery.tokenizer.tokenizer_file import read_pre_tokenizer
from tests.support import gguf_models, sentencepiece_models, tiny
from tests.support.gguf_files import read_gguf
from tests.support.json_files import change, put


def vocabulary_of(path: Path, rows: int = 640, pre: str | None = "gpt-2") -> Vocabulary:
    return read_vocabulary(Checkpoint.open(path), rows, pre)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the tiny tokenizer a name, as llama.cpp's table does for published ones."""
    table = json.loads(kinds.PRE_TOKENIZERS.read_text("utf-8"))
    ids = tiny.tokenizer().encode(table["text"]).ids
    table["names"]["tiny"] = [hashlib.sha256(str(ids).encode()).hexdigest()]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(kinds, "PRE_TOKENIZERS", path)
    return "tiny"


def test_byte_level(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    made, tokenizer = vocabulary_of(source), tiny.tokenizer()
    data = json.loads(tokenizer.to_str())
    assert (made.model, made.pre, made.scores) == ("gpt2", "gpt-2", None)
    for id_ in range(tiny.TOKENS):
        assert made.texts[id_] == tokenizer.id_to_token(id_)
    assert made.texts[tiny.TOKENS :].tolist() == [f"[PAD{i}]" for i in range(tiny.TOKENS, 640)]
    kinds = made.kinds.tolist()
    assert kinds[: len(tiny.SPECIAL)] == [CONTROL] * len(tiny.SPECIAL)
    assert set(kinds[len(tiny.SPECIAL) : tiny.TOKENS]) == {NORMAL}
    assert set(kinds[tiny.TOKENS :]) == {UNUSED}
    assert made.merges is not None
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    assert list(made.merges) == [*made.merges[:]] == merges
    assert made.merges[3] == merges[3]
    assert made.settings["bos_token_id"] == tokenizer.token_to_id("<s>")
    assert made.settings["padding_token_id"] == tokenizer.token_to_id("<pad>")
    assert (made.settings["add_bos_token"], made.settings["add_eos_token"]) == (True, False)


def test_added_tokens_have_the_kinds_of_llama_cpps_converter(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")

    def add(data: Any) -> None:
        for text, special in (("<|end|>", False), ("two\u2581words", False), ("[X]", True)):
            entry = {"id": 616 + len(data["added_tokens"]), "content": text, "special": special}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append(entry | flags)

    change(source / "tokenizer.json", add)
    made = vocabulary_of(source)
    assert made.texts[620:623].tolist() == ["<|end|>", "two words", "[X]"]
    assert made.kinds[620:623].tolist() == [CONTROL, USER_DEFINED, CONTROL]
    assert vocabulary_of(source, rows=621).texts.tolist() == made.texts[:621].tolist()


@pytest.mark.parametrize("with_model", [False, True])
def test_sentencepiece(tmp_path: Path, with_model: bool) -> None:
    source, kind = tiny.save(tmp_path / "model"), sentencepiece_models.source("bpe")
    kind.tokenizer.save(str(source / "tokenizer.json"))
    if with_model:
        (source / "tokenizer.model").write_bytes(kind.data)
    made = vocabulary_of(source, rows=1000, pre=None)
    assert (made.model, made.pre, made.merges) == ("llama", "default", None)
    assert made.scores is not None
    by_text = {piece.piece: piece for piece in kind.pieces}
    merged = [text for text, piece in by_text.items() if piece.type == 1 and len(text) > 1]
    ids = kind.tokens
    order = sorted(merged, key=lambda text: -by_text[text].score)
    scores = [float(made.scores[ids[text]]) for text in order]
    assert scores == sorted(scores, reverse=True)
    if with_model:
        assert scores == [by_text[text].score for text in order]
    assert made.kinds[ids["<0x41>"]] == BYTE
    assert made.kinds[ids["<unk>"]] == UNKNOWN


def test_templates_by_name(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    surgery.export_gguf(source, tmp_path / "out.gguf", pre="gpt-2")
    keys, _ = read_gguf(tmp_path / "out.gguf")
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ tools }}"


TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize(
    ("given", "files", "words"),
    [
        ([1], {}, "is no template"),
        ([{"name": "a"}], {}, "is no template"),
        ([{"name": 1, "template": "x"}], {}, "is no template"),
        ([{"name": "a", "template": 5}], {}, "is no template"),
        ({"a": 1}, {}, "is no template"),
        (None, {"chat_template.jinja": b"\xff\xfe{{"}, "is not UTF-8"),
        (None, {f"{TEMPLATES}/{n}.jinja": b"x" for n in ("tool_use", "tool-use")}, "spells alike"),
    ],
)
def test_damaged_templates_are_refused(
    tmp_path: Path, given: Any, files: dict[str, bytes], words: str
) -> None:
    source = tiny.save(tmp_path / "model")
    change(source / "tokenizer_config.json", put(chat_template=given))
    (source / TEMPLATES).mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=words):
        vocabulary_of(source)


@pytest.mark.parametrize(
    ("single", "added"),
    [
        (["A"], (False, False)),
        (["<s>", "A", "</s>"], (True, True)),
        (["<unk>", "A"], None),
        (["<unk>", "<s>", "A"], None),
        (["A", "<s>"], None),
        (["A", None], "is damaged"),
    ],
)
def test_only_one_bos_before_and_one_eos_after_a_text_can_be_told(
    tmp_path: Path, single: list[str], added: Any
) -> None:
    source, tokenizer = tiny.save(tmp_path / "model"), tiny.tokenizer()
    texts = ("<unk>", "<s>", "</s>")
    special = {t: {"id": t, "ids": [tokenizer.token_to_id(t)], "tokens": [t]} for t in texts}
    pieces = [
        {"Sequence" if text == "A" else "SpecialToken": {"id": text, "type_id": 0}}
        for text in single
    ]
    processor = {"type": "TemplateProcessing", "single": pieces, "special_tokens": special}
    change(source / "tokenizer.json", put(post_processor=processor))
    if isinstance(added, tuple):
        settings = vocabulary_of(source).settings
        assert (settings["add_bos_token"], settings["add_eos_token"]) == added
    else:
        with pytest.raises(TokenizerError, match=added or "adds no token to a text but one"):
            vocabulary_of(source)


def test_published_tokenizers_have_names_in_the_table() -> None:
    table = json.loads(kinds.PRE_TOKENIZERS.read_text("utf-8"))
    hashes = [digest for known in table["names"].values() for digest in known]
    assert len(hashes) == len(set(hashes)) == 95
    assert {"llama-bpe", "qwen2", "smollm", "gpt-2"} <= table["names"].keys()
    assert table["license"].startswith("MIT")


def test_the_name_is_kept_when_the_vocabulary_is_pruned_twice(tmp_path: Path, known: str) -> None:
    source = gguf_models.save(tmp_path / "model", "llama")
    for size in (600, 560):
        plan = surgery.make_plan(source, vocab_size=size)
        assert plan.pre_tokenizer == known
        source = surgery.apply_plan(plan, output=tmp_path / str(size)).output
        assert Plan.load(source / PROVENANCE_NAME).pre_tokenizer == known
        made = surgery.export_gguf(source, tmp_path / f"{size}.gguf")
        assert made.pre == known


def test_a_whole_vocabulary_needs_no_name_in_the_plan(tmp_path: Path, known: str) -> None:
    source = gguf_models.save(tmp_path / "model", "llama")
    plan = surgery.make_plan(source, layers="0,2")
    assert plan.pre_tokenizer is None
    out = surgery.apply_plan(plan, output=tmp_path / "out").output
    assert surgery.export_gguf(out, tmp_path / "out.gguf").pre == known


def test_a_pruned_vocabulary_without_a_name_is_refused(tmp_path: Path, known: str) -> None:
    source = gguf_models.save(tmp_path / "model", "llama")
    plan = msgspec.structs.replace(surgery.make_plan(source, vocab_size=600), pre_tokenizer=None)
    out = surgery.apply_plan(plan, output=tmp_path / "out").output
    with pytest.raises(TokenizerError, match="nobody knows what"):
        surgery.export_gguf(out, tmp_path / "out.gguf")
    assert surgery.export_gguf(out, tmp_path / "out.gguf", pre=known).pre == known


def test_a_name_that_contradicts_the_known_one_is_refused(tmp_path: Path, known: str) -> None:
    dense = gguf_models.save(tmp_path / "model", "llama")
    plan = surgery.make_plan(dense, vocab_size=600)
    for source in (dense, surgery.apply_plan(plan, output=tmp_path / "out").output):
        with pytest.raises(OptionError, match=f"contradicts .* expected {known}, found 'gpt-2'"):
            surgery.export_gguf(source, tmp_path / "out.gguf", pre="gpt-2")
        assert not (tmp_path / "out.gguf").exists()
        made = surgery.export_gguf(source, tmp_path / "out.gguf", pre=known)
        assert made.pre == known
        made.output.unlink()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_kinds_need_no_name(tmp_path: Path, kind: str) -> None:
    sentencepiece_models.source(kind).tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_pre_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        b'{"model": ',
        b"[]",
        b"null",
        b'{"model": null}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": null}',
        b'{"model": {"type": "BPE", "vocab": 5}, "decoder": {"type": "ByteLevel"}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},'
        b' "decoder": {"type": "ByteLevel"}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_refused_before_its_name_is_looked_up(
    tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage)
    with pytest.raises(TokenizerError, match=path.name):
        read_pre_tokenizer(tmp_path)


def test_a_name_that_a_tokenizer_does_not_take_is_refused(tmp_path: Path) -> None:
    source = gguf_models.save(tmp_path / "model", "llama")
    sentencepiece_models.source("bpe").tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(surgery.SurgeryError, match="has no effect, for this tokenizer needs 'def"):
        surgery.export_gguf(source, tmp_path / "out.gguf", pre="qwen2")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    source = gguf_models.save(tmp_path / "model", "llama")
    words = {"[UNK]": 0, "a": 1, "##b": 2}
    Tokenizer.from_str(
        json.dumps(
            {
                "model": {
                    "type": "WordPiece",
                    "vocab": words,
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100,
                },
                "added_tokens": [],
            }
        )
    ).save(str(source / "tokenizer.json"))
    change(source / "tokenizer_config.json", put(unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="prepares text otherwise than this tokenizer"):
        vocabulary_of(source)
