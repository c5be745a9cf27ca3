"""Which tokens are kept, and that text made of them tokenizes as before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import BudgetError, TokenizerError
from surgery.layout.build import read_layout
from surgery.tokenizer.checks import check_tokenizer
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import BYTE_CHARACTERS
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.cost import vocabulary_cost
from surgery.vocabulary.order import Rarity, VocabularyOptions, order_rows, rarity_of
from surgery.vocabulary.scripts import characters_with, lost_text
from tests.support import tiny
from tools.synthetic_tokenizer import trained_tokenizer


def byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(lines: list[str], vocab_size: int) -> Tokenizer:
    return trained_tokenizer(lines, vocab_size, ["<s>", "</s>"])


def as_file(tokenizer: Tokenizer, directory: Path = Path("x")) -> TokenizerFile:
    return TokenizerFile(directory / "tokenizer.json", json.loads(tokenizer.to_str()))


def prune(source: TokenizerFile, rarity: Rarity, size: int) -> tuple[Tokenizer, IdMap]:
    ids = rarity.id_map(size)
    return Tokenizer.from_str(json.dumps(source.rewrite(ids))), ids


def assert_same_segments(old: Tokenizer, new: Tokenizer, ids: IdMap, text: str) -> bool:
    """Check one text; return whether all of its source tokens are kept."""
    before = old.encode(text).ids
    mapped = [ids.new(i) for i in before]
    after = new.encode(text).ids
    assert new.decode(after, skip_special_tokens=False) == old.decode(
        before, skip_special_tokens=False
    )
    if None in mapped:
        return False
    assert after == mapped
    return True


TRAINING = st.lists(st.text(alphabet="abcde é\n", min_size=5, max_size=60), min_size=5, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    lines=TRAINING,
    texts=st.lists(st.text(alphabet="abcde é\nπ🙂", max_size=60), min_size=1, max_size=20),
    share=st.floats(0, 1),
)
def test_text_of_kept_tokens_tokenizes_as_before(
    lines: list[str], texts: list[str], share: float
) -> None:
    old = train(lines, 400)
    source = as_file(old)
    rarity = order_rows(source, old.get_vocab_size(), ())
    size = round(rarity.must_keep + share * (len(rarity.order) - rarity.must_keep))
    new, ids = prune(source, rarity, size)
    for text in [*lines, *texts, "<s>" + texts[0] + "</s>"]:
        assert_same_segments(old, new, ids, text)
    assert new.get_vocab_size() == size
    for token in ("<s>", "</s>"):
        assert len(new.encode(f"a{token}b").ids) == 3


def test_half_of_a_real_vocabulary_keeps_most_words(tmp_path: Path) -> None:
    old = tiny.tokenizer()
    source = as_file(old)
    rarity = order_rows(source, tiny.VOCAB_SIZE, ())
    new, ids = prune(source, rarity, 480)
    same = [assert_same_segments(old, new, ids, word) for word in tiny.prose(9_000).split()]
    assert 0.5 < sum(same) / len(same) < 1


def test_the_tail_of_the_merge_list_is_removed_first() -> None:
    source = as_file(tiny.tokenizer())
    rarity = order_rows(source, tiny.VOCAB_SIZE, ())
    products = source.merges[:, 2].tolist()
    later = [i for i in rarity.order.tolist() if i in set(products[5:])]
    runs_of_space = set(products) & set(rarity.order[: rarity.must_keep].tolist())
    expected = [i for i in products if i not in runs_of_space and i in set(later)]
    assert [i for i in later if i not in runs_of_space] == expected


def test_padding_rows_are_removed_before_any_token() -> None:
    rarity = order_rows(as_file(tiny.tokenizer()), tiny.VOCAB_SIZE, ())
    assert rarity.tokens == tiny.TOKENS
    assert rarity.order[tiny.TOKENS :].tolist() == list(range(tiny.TOKENS, tiny.VOCAB_SIZE))


def test_bytes_special_tokens_references_and_white_space_are_kept() -> None:
    tokenizer = tiny.tokenizer(special_first=False)
    source = as_file(tokenizer)
    referenced = tokenizer.get_vocab().get("Ġunion", 600)
    rarity = order_rows(source, tiny.VOCAB_SIZE, [referenced])
    kept = rarity.id_map(rarity.must_keep)
    must = [*pre_tokenizers.ByteLevel.alphabet(), *tiny.SPECIAL]
    assert all(kept.new(tokenizer.get_vocab()[token]) is not None for token in must)
    assert kept.new(referenced) is not None
    new = Tokenizer.from_str(json.dumps(source.rewrite(kept)))
    assert new.encode(tokenizer.decode([referenced])).ids[-1] == kept.new(referenced)
    with pytest.raises(BudgetError, match="`vocab_size`: is out of reach"):
        rarity.id_map(rarity.must_keep - 1)


def hand_made(vocab: list[str], merges: list[list[str]], **model: Any) -> Tokenizer:
    data = json.loads(byte_level(Tokenizer(models.BPE())).to_str())
    ids = {token: i for i, token in enumerate(vocab)}
    data["model"] |= {"vocab": ids, "merges": merges, **model}
    return Tokenizer.from_str(json.dumps(data))


def test_parents_that_rank_after_their_product_are_kept_with_it() -> None:
    """Two merges make "abc": the first in the list is never the one that BPE ends with.

    BPE on "abc" joins "bc" (rank 0) first, so the last merge is (a, bc), rank 3; the pair
    (ab, c), rank 1, never happens. In Llama 3.1 this is so for thousands of tokens.
    """
    merges = [["b", "c"], ["ab", "c"], ["a", "b"], ["a", "bc"], ["d", "e"]]
    old = hand_made(["a", "b", "c", "d", "e", "bc", "abc", "ab", "de"], merges)
    source = as_file(old)
    rarity = order_rows(source, 9, ())
    for size in range(rarity.must_keep, 10):
        new, ids = prune(source, rarity, size)
        for text in ("abc", "ab", "bcde", "abcabc", "deabc"):
            assert_same_segments(old, new, ids, text)


def test_a_token_is_raised_to_the_rank_of_its_canonical_parents() -> None:
    merges = [["x", "yz"], ["a", "b"], ["y", "z"]]  # "xyz" ranks before its parent "yz"
    source = as_file(hand_made(["x", "y", "z", "a", "b", "xyz", "ab", "yz"], merges))
    order = order_rows(source, 8, ()).order.tolist()
    assert order.index(7) < order.index(5)
    assert order.index(6) < order.index(5)


def test_dead_tokens_are_removed_before_living_ones() -> None:
    tokenizer = hand_made(["a", "b", "dead", "ab"], [["a", "b"]])
    assert order_rows(as_file(tokenizer), 4, ()).order.tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("form", ["pairs", "strings"])
def test_merges_keep_their_form(form: str) -> None:
    source = as_file(tiny.tokenizer())
    if form == "strings":
        merges = source.data["model"]["merges"]
        source.data["model"]["merges"] = ["#version: 0.2", *(" ".join(m) for m in merges)]
    pruned = source.rewrite(order_rows(source, tiny.VOCAB_SIZE, ()).id_map(480))["model"]["merges"]
    assert pruned
    assert all(isinstance(merge, str if form == "strings" else list) for merge in pruned)
    assert not any("#version" in merge for merge in pruned)


def test_a_token_after_the_last_row_stays_after_the_last_row(tmp_path: Path) -> None:
    """Gemma 3's image token has an id but no row."""
    path = tiny.save(
        tmp_path / "model", special_first=False, vocab_size=tiny.TOKENS - 1, pad_token_id=None
    )
    layout = read_layout(Checkpoint.open(path))
    rarity = rarity_of(layout)
    ids = rarity.id_map(500)
    assert rarity.rowless == 1
    assert ids.new(tiny.TOKENS - 1) == 500
    pruned = TokenizerFile.open(path).rewrite(ids)
    new = Tokenizer.from_str(json.dumps(pruned))
    assert new.token_to_id(tiny.SPECIAL[-1]) == 500


def test_tokens_beyond_the_rows_are_refused(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model", vocab_size=tiny.TOKENS - 5)
    with pytest.raises(TokenizerError, match="without a row in the embedding"):
        rarity_of(read_layout(Checkpoint.open(path)))


@given(size=st.integers(1, 200), rowless=st.integers(0, 3), data=st.data())
def test_ids_stay_in_order_and_become_compact(size: int, rowless: int, data: st.DataObject) -> None:
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    ids = IdMap(kept, size, rowless)
    new = [ids.new(old) for old in range(size + rowless)]
    assert [n for n in new if n is not None] == list(range(len(kept) + rowless))
    assert [old for old in range(size) if new[old] is not None] == kept.tolist()
    assert ids.new(-1) is None
    assert ids.new(size + rowless) is None
    assert np.array_equal(np.flatnonzero(ids.keep_mask()), kept)


def test_an_id_gap_becomes_compact() -> None:
    """Row 3 belongs to no token: it is a padding row, and is removed first."""
    data = json.loads(hand_made(["a", "b", "ab"], [["a", "b"]]).to_str())
    data["model"]["vocab"] = {"a": 0, "b": 1, "ab": 4}
    data["model"]["merges"] = [["a", "b"]]
    source = TokenizerFile(Path("x"), data)
    rarity = order_rows(source, 5, ())
    assert rarity.order[3:].tolist() == [2, 3]
    assert source.rewrite(rarity.id_map(3))["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2}


def test_an_added_token_without_content_is_removed() -> None:
    source = as_file(tiny.tokenizer())
    empty = dict(source.data["added_tokens"][0], content="", id=7)
    source.data["added_tokens"].insert(2, empty)
    check_tokenizer(source.data, source.path)
    pruned = source.rewrite(order_rows(source, tiny.VOCAB_SIZE, ()).id_map(480))
    assert [token["content"] for token in pruned["added_tokens"]] == list(tiny.SPECIAL)


def test_of_a_pair_given_twice_the_last_merge_counts() -> None:
    """As in the library: (a, b) ranks after (b, c), so that "abc" is a + bc."""
    merges = [["a", "b"], ["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]
    old = hand_made(["a", "b", "c", "ab", "bc", "abc"], merges)
    source = as_file(old)
    source.data["model"]["merges"] = merges
    rarity = order_rows(source, 6, ())
    for size in range(rarity.must_keep, 7):
        new, ids = prune(source, rarity, size)
        for text in ("abc", "ab", "bc", "cab"):
            assert_same_segments(old, new, ids, text)


def test_missing_bytes_are_named(tmp_path: Path) -> None:
    source = as_file(tiny.tokenizer())
    assert source.missing_bytes == []
    for byte in (0xFF, 0xD0):
        character = next(c for c, b in BYTE_CHARACTERS.items() if b == byte)
        source.data["model"]["vocab"].pop(character)
    lossy = TokenizerFile(source.path, source.data)
    rarity = order_rows(lossy, tiny.VOCAB_SIZE, ())
    assert lossy.missing_bytes == [0xD0, 0xFF]
    warnings = vocabulary_cost(lossy, rarity, 480, VocabularyOptions()).warnings()
    assert (
        warnings
        == lost_text([0xD0, 0xFF])
        == [
            "the source's tokenizer loses some characters, with or without this cut, for its "
            "vocabulary lacks 2 of the 256 bytes: characters (Cyrillic) U+0400-U+043F"
        ]
    )


@given(st.integers(0, 255))
def test_the_characters_that_need_a_byte_are_those_of_utf_8(byte: int) -> None:
    spans = characters_with([byte])
    named = {code for first, last in spans for code in (first, (first + last) // 2, last)}
    if 0x80 <= byte <= 0xBF:
        assert spans == [(0x80, 0x10FFFF)]
        return
    for code in named - set(range(0xD800, 0xE000)):
        assert byte in chr(code).encode(), hex(code)
    for first, last in spans:
        for code in {max(first - 1, 0), min(last + 1, 0x10FFFF)} - named:
            assert byte not in chr(code).encode("utf-8", "surrogatepass"), hex(code)
    assert bool(spans) == (byte not in (0xC0, 0xC1, *range(0xF5, 0x100)))


def test_bytes_of_no_text_lose_none() -> None:
    assert lost_text([0xC0, 0xC1, 0xF5, 0xFF]) == []
    (line,) = lost_text([0x04, 0x13, 0x14, 0x41, 0xC0, 0xF1])
    assert "lacks 6 of the 256 bytes: control characters U+0004, U+0013-U+0014; " in line
    assert "characters (Latin) U+0041; unassigned or private characters U+40000-U+7FFFF" in line
