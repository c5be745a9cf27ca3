"""tokenizer.json as apply reads and writes it: in little memory, and the same to the byte."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import TokenizerError
from surgery.files.strict_json import dump_table, table_pieces
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.merges import MergeRules
from surgery.tokenizer.tokenizer_file import TokenizerFile
from tests.support import tiny
from tests.support.generated_tokenizers import byte_level, sentencepiece, unigram, wordpiece

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=40,
)


@given(value=JSON, batch=st.integers(1, 5))
def test_pieces_are_the_table(value: Any, batch: int) -> None:
    whole = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.files.strict_json.BATCH", batch)
        assert b"".join(table_pieces(value)) == whole


def save(directory: Path, data: dict[str, Any], indent: int | None) -> Path:
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return directory


@given(
    data=byte_level() | sentencepiece() | unigram() | wordpiece(),
    strings=st.booleans(),
    indent=st.sampled_from([None, 2]),
    seed=st.integers(0, 2**16),
)
def test_apply_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    data: dict[str, Any],
    strings: bool,
    indent: int | None,
    seed: int,
) -> None:
    model = data["model"]
    if strings and "merges" in model:
        model["merges"] = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    directory = save(tmp_path_factory.mktemp("x"), data, indent)
    opened, reopened = TokenizerFile.open(directory), TokenizerFile.reopen(directory)
    must = opened.referenced_ids() | set(opened.added.values())
    rows = max(opened.token_ids.values()) + 1
    keep = np.random.default_rng(seed).random(rows) < 0.6
    keep[[0, *must]] = True
    ids = IdMap(np.flatnonzero(keep), rows)
    assert isinstance(reopened.data["model"].get("merges"), MergeRules | None)
    assert np.array_equal(opened.merges, reopened.merges)
    assert dump_table(reopened.rewrite(ids)) == dump_table(opened.rewrite(ids))


MERGES: dict[str, tuple[Any, str]] = {
    "no list": ({"a": "b"}, "has no model.merges"),
    "no pair": ([["h", "e", "l"]], "is not a pair of tokens"),
    "a number": ([7], "is not a pair of tokens"),
    "no text": ([["h", 1]], "is not a pair of tokens"),
    "two forms": (["ab"], "is not of the form of the first"),
    "no token": ([["h", "\ue000"]], "needs a token that the vocabulary lacks"),
    "deep": ([json.loads("[" * 99 + "]" * 99)], "is not a pair of tokens"),
}


@pytest.mark.parametrize("name", MERGES)
def test_bad_merges_are_refused(tmp_path: Path, name: str) -> None:
    merges, words = MERGES[name]
    data = json.loads(tiny.tokenizer().to_str())
    if name == "two forms":
        merges = [data["model"]["merges"][0], *merges]
    directory = save(tmp_path, data | {"model": data["model"] | {"merges": merges}}, None)
    with pytest.raises(TokenizerError, match=words):
        TokenizerFile.reopen(directory)


VOCABULARIES: dict[str, tuple[Any, str]] = {
    "no number": ({"a": "0"}, "an id that is not a number"),
    "negative": ({"a": -1}, "an id that is not a number"),
    "huge": ({"a": 2**40}, "an id that is not a number"),
    "twice": ({"h": 0, "e": 1, "he": 1}, "belongs to two tokens"),
    "text": ("abc", "has no model.vocab"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_bad_vocabularies_are_refused(tmp_path: Path, name: str) -> None:
    vocab, words = VOCABULARIES[name]
    data = json.loads(tiny.tokenizer().to_str())
    directory = save(tmp_path, data | {"model": {**data["model"], "vocab": vocab, "merges": []}}, 2)
    for read in (TokenizerFile.open, TokenizerFile.reopen):
        with pytest.raises(TokenizerError, match=words):
            read(directory)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": 7}', '{"model": {"merges": [', '{"model": ' + "[" * 10**5, "\xff"]
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TokenizerError):
        TokenizerFile.reopen(tmp_path)


def test_a_merge_takes_few_bytes(tmp_path: Path) -> None:
    """All pairs of some hundred letters: the file is held without its white space, and 12 each."""
    letters = [chr(0x4E00 + i) for i in range(200)]
    pairs = [[a, b] for a in letters for b in letters]
    names = [*letters, *(a + b for a, b in pairs)]
    data = json.loads(tiny.tokenizer().to_str())
    model = {**data["model"], "vocab": {name: i for i, name in enumerate(names)}, "merges": pairs}
    directory = save(tmp_path, data | {"model": model, "added_tokens": []}, 4)
    nbytes = (directory / "tokenizer.json").stat().st_size
    tracemalloc.start()
    try:
        tokenizer = TokenizerFile.reopen(directory)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tokenizer.merges) == len(pairs)
    assert held < 200 * len(names)
    assert peak < held + nbytes * 1.5
