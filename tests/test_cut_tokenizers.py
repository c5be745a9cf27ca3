"""Generated tokenizers of every kind, cut at any size by any order: text is cut as before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from surgery.cut_tokenizer import cut_tokenizer
from surgery.idmap import IdMap
from surgery.tokenizer import TokenizerFile
from surgery.tokenizer_checks import check_tokenizer
from surgery.vocabulary import VocabularyChoice, order_rows

LETTERS = "abcd"
TEXTS = st.lists(st.text(alphabet="abcd eé\nπ🙂", max_size=40), min_size=1, max_size=8)
WHERE = Path("tokenizer.json")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer_json(model: dict[str, Any], added: list[str], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json; ``added`` tokens lie behind the vocabulary."""
    entries = [
        {
            "id": len(model["vocab"]) + place,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for place, content in enumerate(added)
    ]
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    return {"version": "1.0", **empty, **parts, "added_tokens": entries, "model": model}


@st.composite
def bpe_models(draw: st.DrawFn, base: list[str], space: str) -> dict[str, Any]:
    """Random merges, several for one product among them, ranked at random, as are the ids."""
    tokens, merges = [*LETTERS, space], []
    for _ in range(draw(st.integers(0, 25))):
        pair = [draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))]
        if len("".join(pair)) <= 7 and pair not in merges:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    whole = draw(st.lists(st.text(alphabet=LETTERS, min_size=2, max_size=5), max_size=3))
    names = list(dict.fromkeys([*base, *draw(st.permutations([*tokens, *whole]))]))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": draw(st.booleans()),
        "vocab": {token: id_ for id_, token in enumerate(names)},
        "merges": merges,
    }


@st.composite
def byte_level(draw: st.DrawFn) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {key: level | {"use_regex": True} for key in ("pre_tokenizer", "decoder")}
    # Without some byte characters, as in SmolLM2: such text is dropped by the source, too.
    return tokenizer_json(draw(bpe_models(["e", "Ċ"], "Ġ")), ["<s>", "</s>"], **parts)


@st.composite
def sentencepiece(draw: st.DrawFn) -> dict[str, Any]:
    model = draw(bpe_models(["<unk>", *BYTES], "▁"))
    model |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
    }
    return tokenizer_json(model, ["<s>", "</s>"], normalizer=replace, decoder=decoder)


@st.composite
def unigram(draw: st.DrawFn) -> dict[str, Any]:
    fallback = draw(st.booleans())
    pieces = draw(st.sets(st.text(alphabet="abcd▁", min_size=2, max_size=6), max_size=25))
    names = ["<unk>", *(BYTES if fallback else []), *LETTERS, "▁", *sorted(pieces)]
    seed = draw(st.integers(0, 2**16))
    scores = -np.random.default_rng(seed).random(len(names)) * 10
    vocab = [[name, float(score)] for name, score in zip(names, scores, strict=True)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": fallback}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    decoder = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, space],
    }
    return tokenizer_json(model, ["<s>", "</s>"], pre_tokenizer=space, decoder=decoder)


@st.composite
def wordpiece(draw: st.DrawFn) -> dict[str, Any]:
    words = draw(st.sets(st.text(alphabet=LETTERS, min_size=2, max_size=6), max_size=20))
    names = ["[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    names += [draw(st.sampled_from(["", "##"])) + word for word in sorted(words)]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: id_ for id_, token in enumerate(dict.fromkeys(names))},
    }
    parts = {
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
    }
    return tokenizer_json(model, ["<s>", "</s>"], **parts)


def assert_cut_as_before(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    """Cut ``data`` to some size, by ranks if ``seed`` is even and else by random counts."""
    check_tokenizer(data, WHERE)
    source = TokenizerFile(WHERE, data)
    rows = len(source.token_ids)
    counts = np.random.default_rng(seed).integers(0, 30, rows) if seed % 2 else None
    keep = frozenset({seed % rows})
    rarity = order_rows(source, rows, (), VocabularyChoice(counts=counts, keep=keep))
    size = round(rarity.must_keep + share * (rows - rarity.must_keep))
    ids = rarity.id_map(size)
    cut = source.rewrite(ids)
    check_tokenizer(cut, WHERE)
    old, new = (Tokenizer.from_str(json.dumps(part)) for part in (data, cut))
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
    assert_cut_as_before(data, texts, share, seed)


@settings(max_examples=800, deadline=None)
@given(data=sentencepiece(), **CASES)
def test_sentencepiece_bpe(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_cut_as_before(data, texts, share, seed)


@settings(max_examples=300, deadline=None)
@given(data=unigram(), **CASES)
def test_unigram(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_cut_as_before(data, texts, share, seed)


@settings(max_examples=300, deadline=None)
@given(data=wordpiece(), **CASES)
def test_wordpiece(data: dict[str, Any], texts: list[str], share: float, seed: int) -> None:
    assert_cut_as_before(data, texts, share, seed)


@settings(max_examples=400, deadline=None)
@given(data=st.one_of(byte_level(), sentencepiece(), unigram(), wordpiece()), **CASES)
def test_text_cut_by_the_pruned_tokenizer_means_the_same_in_old_ids(
    data: dict[str, Any], texts: list[str], share: float, seed: int
) -> None:
    source = TokenizerFile(WHERE, data)
    tokens = len(source.token_ids)
    rows = tokens - seed % 3  # the added tokens lie behind; up to two of them have no row
    rarity = order_rows(source, rows, ())
    ids = rarity.id_map(round(rarity.must_keep + share * (rows - rarity.must_keep)))
    pruned, old_ids = cut_tokenizer(source, ids)
    assert len(old_ids) == ids.new_size + tokens - rows
    before, stays = source.library(), {*ids.kept.tolist(), *range(rows, tokens)}
    for text in [*texts, f"<s>{texts[0]}</s>"]:
        found = old_ids[np.array(pruned.encode(text).ids, dtype=np.int64)].tolist()
        assert stays.issuperset(found)
        assert before.decode(found, skip_special_tokens=False) == before.decode(
            before.encode(text).ids, skip_special_tokens=False
        )


def test_what_pads_and_cuts_off_texts_is_left_out(llama: Path) -> None:
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
    pruned, old_ids = cut_tokenizer(tokenizer, ids)
    text = "The text is longer than four tokens."
    found = old_ids[pruned.encode(text, add_special_tokens=False).ids].tolist()
    assert 3 not in found
    assert tokenizer.library().decode(found) == text
