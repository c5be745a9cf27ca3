"""From text to windows: documents by format, windows in order, no byte lost."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from calib.text.heldout import split_documents
from calib.text.windows import byte_windows, check_windows, digest, shortfall, token_windows
from surgery.errors import DataError, TokenizerError
from surgery.text.documents import interleave, mixture, parts_of, read_documents
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import tiny

BOS, EOS = 1, 2
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
DOCUMENTS = st.lists(TEXT, max_size=5)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return tiny.tokenizer(bos=False)


@pytest.fixture(scope="module")
def prose() -> str:
    return tiny.prose(4_000)


def documents(path: Path, content: str, seed: int | None = None) -> list[str]:
    path.write_text(content, encoding="utf-8", newline="")
    return list(read_documents(str(path), seed))


def joined(windows: list[np.ndarray]) -> list[int]:
    return [int(i) for window in windows for i in window]


# Documents.


def test_a_blank_line_ends_a_document(tmp_path: Path) -> None:
    found = documents(tmp_path / "a.txt", "one\ntwo\n\n\n \t\nthree\n\nfour")
    assert found == ["one\ntwo\n", "three\n", "four"]


def test_line_ends_and_indentation_stay(tmp_path: Path) -> None:
    assert documents(tmp_path / "a.txt", "one\r\n  two\r\n\r\nthree") == [
        "one\r\n  two\r\n",
        "three",
    ]


@settings(deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), max_size=9)))
def test_documents_lose_only_blank_lines(
    lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    if not any(lines):
        lines = [*lines, "end"]
    found = documents(path, "\n".join(lines))
    assert "".join(found).split("\n") == [line for line in lines if line] + [""] * (not lines[-1])


def test_jsonl_documents_are_the_text_fields(tmp_path: Path) -> None:
    texts = ["a\n\nb", "", "Ünï 🙂\u2028x"]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    found = documents(tmp_path / "a.jsonl", "\n\n".join(lines) + "\n")
    assert found == ["a\n\nb", "Ünï 🙂\u2028x"]


def test_a_directory_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in {"c.txt": "3", "b/x.jsonl": '{"text": "2"}', "a.txt": "1"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "notes.md").write_text("no text of ours")
    assert list(read_documents(str(tmp_path))) == ["1", "2", "3"]


def test_a_seed_shuffles_documents_reproducibly(tmp_path: Path) -> None:
    content = "\n\n".join(map(str, range(50)))
    in_order = documents(tmp_path / "a.txt", content)
    first, again, other = (documents(tmp_path / "a.txt", content, seed) for seed in (0, 0, 1))
    assert in_order == [*(f"{i}\n" for i in range(49)), "49"]
    assert first == again
    assert len({tuple(order) for order in (in_order, first, other)}) == 3
    assert sorted(first) == sorted(other) == sorted(in_order)


# Windows of tokens.


def test_sample_n_is_the_nth_window(plain: Tokenizer, prose: str) -> None:
    ids = plain.encode(prose).ids
    windows = token_windows([prose], plain, samples=5, seq_len=16)
    assert [window.tolist() for window in windows] == [ids[16 * n : 16 * n + 16] for n in range(5)]
    assert all(window.dtype == np.int64 for window in windows)


def test_the_rest_of_a_document_is_a_window_of_its_own_length(plain: Tokenizer, prose: str) -> None:
    ids = plain.encode(prose).ids
    windows = token_windows([prose], plain, samples=10**6, seq_len=len(ids) - 3)
    assert [len(window) for window in windows] == [len(ids) - 3, 3]
    assert joined(windows) == ids


def test_an_empty_document_gives_no_window(plain: Tokenizer, prose: str) -> None:
    windows = token_windows(["", prose, ""], plain, samples=10**6, seq_len=64)
    assert all(len(window) for window in windows)
    assert joined(windows) == plain.encode(prose).ids


@settings(deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=5), seq_len=st.integers(2, 40))
def test_windows_never_cross_a_document(texts: list[str], seq_len: int) -> None:
    tokenizer = tiny.tokenizer(bos=False)
    full = tiny.prose(200)
    windows = token_windows([full, *texts], tokenizer, samples=10**6, seq_len=seq_len)
    expected = []
    for text in [full, *texts]:
        ids = tokenizer.encode(text).ids
        expected += [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    assert [window.tolist() for window in windows] == expected


def test_fewer_samples_are_a_prefix(plain: Tokenizer, prose: str) -> None:
    texts = [prose[:700], prose[700:1500], prose[1500:]]
    everything = token_windows(texts, plain, samples=10**6, seq_len=32)
    for samples in range(1, len(everything)):
        some = token_windows(texts, plain, samples, seq_len=32)
        assert len(some) == samples
        assert joined(some) == joined(everything[:samples])


def test_no_more_documents_are_read_than_needed(plain: Tokenizer, prose: str) -> None:
    def endless() -> object:
        while True:
            yield prose

    assert len(token_windows(endless(), plain, samples=3, seq_len=16)) == 3  # type: ignore[arg-type]


def test_every_window_begins_with_the_bos_that_the_post_processor_adds(prose: str) -> None:
    tokenizer = tiny.tokenizer(bos=True)
    windows = token_windows([prose], tokenizer, samples=10**6, seq_len=16)
    assert {int(window[0]) for window in windows} == {BOS}
    assert {len(window) for window in windows[:-1]} == {16}
    text_ids = joined([window[1:] for window in windows])
    assert text_ids == tokenizer.encode(prose, add_special_tokens=False).ids


def test_special_tokens_on_both_sides_count_within_seq_len(prose: str) -> None:
    tokenizer = tiny.tokenizer(bos=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    windows = token_windows([prose], tokenizer, samples=4, seq_len=16)
    assert [(len(w), int(w[0]), int(w[-1])) for w in windows] == [(16, BOS, EOS)] * 4
    with pytest.raises(DataError, match=r"`seq_len`: leaves no room .* more than 2, found 2"):
        token_windows([prose], tokenizer, samples=4, seq_len=2)


def test_only_a_text_without_a_token_is_refused(plain: Tokenizer) -> None:
    windows = token_windows(["short", "texts"], plain, samples=4, seq_len=64)
    check_windows(windows)
    assert [window.tolist() for window in windows] == [
        plain.encode(text).ids for text in ("short", "texts")
    ]
    with pytest.raises(DataError, match="has no text: expected at least one token; give"):
        check_windows(token_windows([""], plain, samples=4, seq_len=64))


def windows_by_hand(
    texts: list[str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> list[list[int]]:
    """The rule of ``token_windows`` in other words: make all windows, then choose among them."""
    windows: list[tuple[bool, list[int]]] = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        parts = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        windows += [(len(ids) < seq_len, window) for window in parts]
    first = sorted(range(len(windows)), key=lambda index: windows[index][0])[:samples]
    return [windows[index][1] for index in sorted(first)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=8),
    samples=st.integers(1, 12),
    seq_len=st.integers(2, 40),
)
def test_short_documents_only_fill_what_is_left(
    sizes: list[int], samples: int, seq_len: int
) -> None:
    tokenizer = tiny.tokenizer(bos=False)
    texts = [tiny.prose(size) for size in sizes]
    windows = token_windows(texts, tokenizer, samples, seq_len)
    found = [window.tolist() for window in windows]
    assert found == windows_by_hand(texts, tokenizer, samples, seq_len)
    long = [text for text in texts if len(tokenizer.encode(text).ids) >= seq_len]
    of_long = [w.tolist() for w in token_windows(long, tokenizer, samples, seq_len)]
    rest = iter(found)
    assert all(window in rest for window in of_long)  # in this order, all of them


def test_short_rows_first_do_not_end_the_search(plain: Tokenizer, prose: str) -> None:
    ids = plain.encode(prose).ids
    windows = token_windows(["a", "b", "c", prose], plain, samples=2, seq_len=16)
    assert [window.tolist() for window in windows] == [ids[:16], ids[16:32]]


def test_the_search_for_longer_documents_has_an_end(plain: Tokenizer) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "short"

    assert len(token_windows(endless(), plain, samples=3, seq_len=16)) == 3


def test_fewer_tokens_than_asked_for_are_reported(plain: Tokenizer, prose: str) -> None:
    windows = token_windows(["short"], plain, samples=4, seq_len=64)
    tokens = len(plain.encode("short").ids)
    assert shortfall(windows, 4, 64) == (
        f"the text gives {tokens} tokens in 1 windows, of 256 asked for (4 windows of 64)"
    )
    assert shortfall(token_windows([prose], plain, 4, 64), 4, 64) is None


# Several sources.

WEIGHTS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 7.5]), min_size=1, max_size=4)


@given(weights=WEIGHTS, count=st.integers(1, 200))
def test_sources_give_their_shares(weights: list[float], count: int) -> None:
    streams = [(repeat(index), weight) for index, weight in enumerate(weights)]
    taken = Counter(islice(interleave(streams, lambda _: 1.0), count))
    for index, weight in enumerate(weights):
        assert abs(taken[index] - count * weight / sum(weights)) <= len(weights)


def test_a_source_that_ends_leaves_its_share_to_the_others() -> None:
    mixed = list(interleave([("ab", 1.0), ("xyzuvw", 1.0)], lambda _: 1.0))
    assert mixed == list("axbyzuvw")


def test_windows_of_several_sources_come_by_weight(plain: Tokenizer, prose: str) -> None:
    parts: list[tuple[list[str], float]] = [([prose], 2.0), (["short"] * 9, 1.0), ([], 5.0)]
    windows = token_windows(mixture(parts), plain, samples=9, seq_len=16)
    assert Counter(map(len, windows)) == {16: 6, len(plain.encode("short").ids): 3}
    heavier = token_windows(mixture([parts[0], (parts[1][0], 2.0)]), plain, 9, 16)
    assert digest(heavier) != digest(windows)
    assert byte_windows(mixture(parts), 3, 8) == [prose[:8], "short", prose[8:16]]


def test_one_source_of_any_weight_gives_the_same_windows(plain: Tokenizer, prose: str) -> None:
    documents = [prose[:300], "short", prose[300:]]
    alone = token_windows(documents, plain, 12, 16)
    weighted = token_windows(mixture([(documents, 7.0)]), plain, 12, 16)
    assert digest(alone) == digest(weighted)


def test_held_out_text_of_several_sources_keeps_their_weights() -> None:
    parts: list[tuple[list[str], float]] = [(["a" * 800], 1.0), (["b" * 800], 3.0)]
    for half in split_documents(mixture(parts)):
        assert [weight for _, weight in parts_of(half)] == [1.0, 3.0]
        assert [set("".join(part)) for part, _ in parts_of(half)] == [{"a"}, {"b"}]


def test_truncation_and_padding_of_the_tokenizer_do_not_count(tmp_path: Path, prose: str) -> None:
    tokenizer = tiny.tokenizer(bos=False)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512, pad_id=3, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    windows = token_windows([prose], load_tokenizer(tmp_path), samples=10**6, seq_len=64)
    assert joined(windows) == tiny.tokenizer(bos=False).encode(prose).ids


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be loaded"):
        load_tokenizer(tmp_path)


# Windows of bytes.


@given(DOCUMENTS, st.integers(4, 40))
def test_byte_windows_give_back_the_text(texts: list[str], window_bytes: int) -> None:
    if not "".join(texts):
        return
    windows = byte_windows(texts, 10**6, window_bytes)
    rest = iter(windows)
    for text in texts:
        read = ""
        while len(read) < len(text):
            read += next(rest)
        assert read == text
    assert next(rest, None) is None


@given(TEXT.filter(bool), st.integers(4, 40))
def test_byte_windows_are_as_full_as_characters_allow(text: str, window_bytes: int) -> None:
    windows = byte_windows([text], 10**6, window_bytes)
    sizes = [len(window.encode()) for window in windows]
    assert 0 < min(sizes) <= max(sizes) <= window_bytes
    assert all(
        size + len(following[0].encode()) > window_bytes
        for size, following in zip(sizes, windows[1:], strict=False)
    )


def test_byte_windows_stop_at_the_samples() -> None:
    assert byte_windows(["abcdef", "ghijkl"], 3, 4) == ["abcd", "ef", "ghij"]


@pytest.mark.parametrize(("texts", "size", "message"), [([""], 8, "empty"), (["a"], 3, "least 4")])
def test_byte_windows_refuse(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        byte_windows(texts, 1, size)


# Digest.


def test_the_digest_changes_with_content_and_with_borders() -> None:
    variants = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]], [[3], [1, 2]], []]
    digests = [digest([np.array(window) for window in windows]) for windows in variants]
    assert len(set(digests)) == len(variants)
    assert digest([np.array([1, 2], dtype=np.int32), np.array([3])]) == digests[0]


# Data sets of the hub; test_hub.py reads one through the real library where that is installed.


def pretend(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[Any]:
    """Put a stand-in for the datasets library in place; return the list of calls it will see."""
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        return rows

    module = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("spec", "call", "documents"),
    [
        ("hub:org/text", ("org/text", None, "train", True), ["t"]),
        ("hub:org/text:en", ("org/text", "en", "train", True), ["t"]),
        ("hub:org/text:en:test", ("org/text", "en", "test", True), ["t"]),
        ("hub:org/text::test:body", ("org/text", None, "test", True), ["b"]),
    ],
)
def test_a_hub_data_set_by_config_split_and_field(
    spec: str, call: object, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pretend(monkeypatch, [{"text": "t", "body": "b"}, {"text": "", "body": ""}])
    assert list(read_documents(spec)) == documents
    assert calls == [call]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:org/text:::title", "title.*text, body"),
        ("hub:org/text:::body", "body.*not a string"),
        ("hub:org/text:a:b:c:d", "hub:name"),
        ("hub:", "hub:name"),
    ],
)
def test_a_hub_data_set_is_refused(
    spec: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, [{"text": "t", "body": None}])
    with pytest.raises(DataError, match=rf"^{spec}: .*{message}"):
        list(read_documents(spec))


def test_a_hub_data_set_without_the_library_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^hub:org/text: needs the datasets library; pip install"):
        list(read_documents("hub:org/text"))
