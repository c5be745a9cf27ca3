"""Generated tokenizers of every kind, pruned to any size by any order: text tokenizes as before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from surgery.tokenizer.checks import check_tokenizer
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.order import VocabularyChoice, order_rows
from tests.support.generated_tokenizers import byte_level, sentencepiece, unigram, wordpiece

TEXTS = st.lists(st.text(alphabet="abcd eé\nπ🙂", max_size=40), min_size=1, max_size=8)
WHERE = Path("tokenizer.json")


def assert_tokenizes_as_before(
    data: dict[str, Any], texts: list[str], share: float, seed: int
) -> None:
    """Prune ``data`` to some size, by ranks if ``seed`` is even and else by random counts."""
    check_tokenizer(data, WHERE)
    source = TokenizerFile(WHERE, data)
    rows = len(source.token_ids)
    counts = np.random.default_rng(seed).integers(0, 30, rows) if seed % 2 else None
    keep = frozenset({seed % rows})
    rarity = order_rows(source, rows, (), VocabularyChoice(counts=counts, keep=keep))
    size = round(rarity.must_keep + share * (rows - rarity.must_keep))
    ids = rarity.id_map(size)
    pruned = source.rewrite(ids)
    check_tokenizer(pruned, WHERE)
    old, new = (Tokenizer.from_str(json.dumps(part)) for part in (data, pruned))
    assert new.get_vocab() == {
        token: ids.new(id_) for token, id_ in old.get_vocab().items() if ids.new(id_) is not None
    }
    assert new.get_vocab_size() == size
    assert ids.new(seed % rows) is not None
    last = range(max(0, rows - 40), rows)  # bytes come first
    chosen = np.random.default_rng(seed).choice(last, (12, 4)).tolist()
    of_tokens = [old.decode(ids_, skip_special_tokens=False) for ids_ in chosen]
    alone = [old.decode([id_]) for id_ in last]
    for text in [*texts, *of_tokens, *alone, f"<s>{texts[0]}</s>"]:
        assert_same(old, new, ids, text)


def assert_same(old: Tokenizer, new: Tokenizer, ids: IdMap, text: str) -> None:
    before, after = old.encode(text).ids, new.encode(text).ids
    mapped = [ids.new(id_) for id_ in before]
    if None not in mapped:
        assert after == mapped
    assert new.decode(after, skip_special_tokens=False) == old.decode(
        before, skip_special_tokens=False
    )


CASES = {"texts": TEXTS, "share": st.floats(0, 1), "seed": st.integers(0, 2**16)}


@settings(max_examples=1200, deadline=None)
@given(data=byte_level(), **CASES)
def test_byte_level_bpe(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_tokenizes_as_before(data, texts, share, seed)


@settings(max_examples=800, deadline=None)
@given(data=sentencepiece(), **CASES)
def test_sentencepiece_bpe(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_tokenizes_as_before(data, texts, share, seed)


@settings(max_examples=300, deadline=None)
@given(data=unigram(), **CASES)
def test_unigram(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_tokenizes_as_before(data, texts, share, seed)


@settings(max_examples=300, deadline=None)
@given(data=wordpiece(), **CASES)
def test_wordpiece(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_tokenizes_as_before(data, texts, share, seed)


@settings(max_examples=400, deadline=None)
@given(data=st.one_of(byte_level(), sentencepiece(), unigram(), wordpiece()), **CASES)
def test_text_of_the_pruned_tokenizer_means_the_same_in_old_ids(
    data: dict[str, Any], texts: list[str], share: float, seed: int
) -> None:
    source = TokenizerFile(WHERE, data)
    tokens = len(source.token_ids)
    rows = tokens - seed % 3  # the added tokens come last; up to two of them have no row
    rarity = order_rows(source, rows, ())
    ids = rarity.id_map(round(rarity.must_keep + share * (rows - rarity.must_keep)))
    pruned, old_ids = prune_tokenizer(source, ids)
    assert len(old_ids) == ids.new_size + tokens - rows
    before, kept = source.library(), {*ids.kept.tolist(), *range(rows, tokens)}
    for text in [*texts, f"<s>{texts[0]}</s>"]:
        found = old_ids[np.array(pruned.encode(text).ids, dtype=np.int64)].tolist()
        assert kept.issuperset(found)
        assert before.decode(found, skip_special_tokens=False) == before.decode(
            before.encode(text).ids, skip_special_tokens=False
        )


def test_padding_and_truncation_are_left_out(llama: Path) -> None:
    data = TokenizerFile.open(llama).data
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    data["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    tokenizer = TokenizerFile(WHERE, data)
    ids = order_rows(tokenizer, len(tokenizer.token_ids), ()).id_map(400)
    pruned, old_ids = prune_tokenizer(tokenizer, ids)
    text = "The text is longer than four tokens."
    found = old_ids[pruned.encode(text, add_special_tokens=False).ids].tolist()
    assert 3 not in found
    assert tokenizer.library().decode(found) == text
