"""Text as people have it: rows, compressed files, Parquet, several sources, iterators."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from surgery.errors import DataError
from surgery.text.documents import MOST_BAD, Mixture, Source, TextOptions, parts_of, read_documents

ROWS = [{"text": "one"}, {"text": " \n"}, {"text": "zwei 🙂"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def compressed(path: Path, content: str) -> Path:
    """Write ``content``, compressed by the ending of ``path``."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        with pyarrow.output_stream(path, compression="zstd") as out:
            out.write(content.encode())
    return path


def refusal(text: Any, **options: Any) -> str:
    """Return the one line of an error."""
    with pytest.raises(DataError) as refused:
        list(read_documents(text, **options))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Files.


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_compressed_rows(tmp_path: Path, kind: str, ending: str) -> None:
    path = compressed(tmp_path / f"a{kind}{ending}", LINES)
    assert list(read_documents(path)) == ["one", "zwei 🙂"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_text(tmp_path: Path, ending: str) -> None:
    path = compressed(tmp_path / f"a.txt{ending}", "one\ntwo\n\nthree")
    assert list(read_documents(path)) == ["one\ntwo\n", "three"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path: Path, ending: str) -> None:
    parts = [compressed(tmp_path / f"{n}.txt{ending}", f"{n}\n\n").read_bytes() for n in "ab"]
    whole = tmp_path / f"whole.txt{ending}"
    whole.write_bytes(b"".join(parts))
    assert list(read_documents(whole)) == ["a\n", "b\n"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, ending: str) -> None:
    noise = "\n\n".join(str(7**n) for n in range(2_000))
    path = compressed(tmp_path / f"a.txt{ending}", noise)
    path.write_bytes(path.read_bytes()[:-2_000])
    assert f"a.txt{ending}: is damaged, or not a {ending} file; check" in refusal(path)


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [str(n) for n in range(200)]
    write_table(pyarrow.table({"id": range(200), "text": texts}), path)
    assert list(read_documents(path)) == texts
    assert refusal(TextOptions((Source(path),), field="body")) == (
        f"{path}: has no field 'body': found fields id, text; "
        "name the one that holds the text or the messages with `field`"
    )
    assert "row 1: field 'id' is not a string" in refusal(TextOptions((Source(path),), field="id"))


def test_chats_in_parquet_and_jsonl(tmp_path: Path) -> None:
    write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}))
    found = list(read_documents(tmp_path, render=lambda chat: json.dumps(chat.messages)))
    assert [json.loads(text) for text in found] == [CHAT, CHAT]
    assert "holds chats, and there is no model" in refusal(tmp_path / "b.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_missing_library_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert f"{name}: needs the pyarrow library; pip install 'compact-surgery[datasets]'" in refusal(
        tmp_path / name
    )


def test_a_directory_of_all_kinds_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    compressed(tmp_path / "b.jsonl.gz", '{"text": "2"}')
    compressed(tmp_path / "c.txt.zst", "3")
    write_table(pyarrow.table({"text": ["4"]}), tmp_path / "d.parquet")
    (tmp_path / "._a.txt").write_bytes(b"\0\xff")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.txt").write_text("5")
    (tmp_path / "dataset_info.json").write_text("{}")
    compressed(tmp_path / "f.csv.gz", "6")
    assert list(read_documents(tmp_path)) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    content = "one" if name == "a.txt" else '{"text": "one"}'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(read_documents(tmp_path / name)) == ["one"]


def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr("builtins.open", denied)
    assert refusal(tmp_path / "a.txt").endswith(
        "a.txt: cannot be read: found Permission denied; check the file and its permissions"
    )


# Rows.


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b"{", b'{"body": "x"}', b"[1]", b'{"text": null}', b'{"text": "\xff"}', b"\x00"]
    path.write_bytes(b"\n".join([*bad, LINES.encode()]))
    with caplog.at_level("INFO"):
        assert list(read_documents(path)) == ["one", "zwei 🙂"]
    assert len(caplog.messages) == 1
    note = f"note: {path}: skipped 6 bad rows of 9; the first: {path}: line 1: is not"
    assert caplog.messages[0].startswith(note)
    strict = TextOptions((Source(path),), strict=True)
    assert refusal(strict).startswith(f"{path}: line 1: is not a record: expected {{")


def test_a_text_of_bad_rows_alone_is_refused_before_it_ends() -> None:
    read = 0

    def rows() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield None

    assert refusal(rows()).startswith("document 1: is not a string or a list of messages")
    assert read == MOST_BAD


def test_the_field_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "t", "body": "b", "talk": CHAT}))
    for field, expected in ((None, "t"), ("body", "b"), ("talk", "Hi")):
        options = TextOptions((Source(path),), field=field)
        found = list(read_documents(options, render=lambda chat: chat.messages[0]["content"]))
        assert found == [expected]


def test_errors_hold_no_words_of_python(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line in ("{", "[]", '{"x": 1}', '{"text": 1}', "[" * 100_000):
        path.write_text(line)
        message = refusal(path)
        assert not any(word in message for word in ("Error", "Expecting", "KeyError", "("))


# Iterables and sources.


def test_an_iterator_can_be_read_again() -> None:
    text = TextOptions((Source(str(n) for n in range(5)),))
    first = iter(read_documents(text))
    assert [next(first), next(first)] == ["0", "1"]
    assert list(read_documents(text)) == list("01234")
    assert list(first) == list("234")
    assert list(read_documents(text)) == list("01234")


def test_documents_of_a_list() -> None:
    assert list(read_documents(["a", " ", "b"])) == ["a", "b"]
    assert "the documents: holds no text" in refusal([])
    assert "document 1: has half a character (a lone surrogate)" in refusal(["\ud800"])
    assert "the documents: holds no text" in refusal(["", " \n"])


@pytest.mark.parametrize(
    ("given", "text", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1),
        ("a.jsonl=2", "a.jsonl", 2),
        ("a.jsonl=0.5", "a.jsonl", 0.5),
        ("hub:org/text:en=3", "hub:org/text:en", 3),
        ("x=1.txt", "x=1.txt", 1),
        ("x=1.txt=2", "x=1.txt", 2),
        ("kept=2", "kept=2", 1),
        ("kept=2=4", "kept=2", 4),
        ("=2", "=2", 1),
    ],
)
def test_a_weight_comes_after_the_last_sign(
    given: str, text: str, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept=2").mkdir()
    assert Source.parse(given) == Source(text, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_not_a_share_is_refused(weight: str) -> None:
    with pytest.raises(DataError, match=r"^a\.txt: has a weight that is not a number above 0"):
        Source.parse(f"a.txt={weight}")


@given(
    st.lists(
        st.tuples(
            st.lists(st.text("ab", min_size=1, max_size=4), min_size=1),
            st.sampled_from([0.5, 1.0, 3.0]),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_a_mixture_holds_every_document_in_its_source_order(
    parts: list[tuple[list[str], float]],
) -> None:
    sources = [
        Source([f"{index}{text}" for text in texts], weight)
        for index, (texts, weight) in enumerate(parts)
    ]
    mixed = read_documents(sources)
    assert isinstance(mixed, Mixture)
    found = list(mixed)
    for index, (texts, _) in enumerate(parts):
        assert [text[1:] for text in found if text[0] == str(index)] == texts
    assert len(found) == sum(len(texts) for texts, _ in parts)


def test_a_seed_shuffles_each_source_alone() -> None:
    sources = [Source([f"a{n}" for n in range(30)]), Source([f"b{n}" for n in range(30)], 2)]
    parts = parts_of(read_documents(sources, seed=0))
    for (documents, weight), source in zip(parts, sources, strict=True):
        in_order = list(read_documents(source))
        assert weight == source.weight
        assert list(documents) == list(read_documents(source, 0)) != in_order
        assert sorted(documents) == sorted(in_order)
