"""tokenizer.model keeps up with tokenizer.json: same pieces, mapped ids."""

import json
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from surgery.errors import TokenizerError
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.sentencepiece_model import is_sentencepiece, prune_sentencepiece
from tests.support.sentencepiece_models import (
    MODEL,
    SPACE,
    Source,
    bpe,
    cut_half,
    half,
    keep,
    lines,
    load,
    parse,
    selection,
    source,
    train,
    unigram,
)

KINDS = ("bpe", "unigram", "unigram-unk")
"""BPE and Unigram with byte fallback; Unigram without, with its own normalizer."""


def pruned_json(made: Source, ids: IdMap) -> Tokenizer:
    """Tokenizer.json without the removed pieces, written independently of surgery/."""
    data = json.loads(made.tokenizer.to_str())
    model = data["model"]
    if model["type"] == "BPE":
        kept = {token for token, old in model["vocab"].items() if ids.new(old) is not None}
        model["vocab"] = {token: ids.new(model["vocab"][token]) for token in kept}
        model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= kept]
    else:
        model["vocab"] = [model["vocab"][old] for old in ids.kept]
        model["unk_id"] = ids.new(model["unk_id"])
    return Tokenizer.from_str(json.dumps(data))


def with_specials(**changes: int) -> Source:
    """A BPE model with <pad> in front, so that the other special pieces can move."""
    specials = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3} | changes
    data = train(
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        **specials,
    )
    return Source(data, bpe(parse(data)))


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_kept_pieces_tokenizes_as_before(kind: str) -> None:
    made, ids = source(kind), half(kind)
    old, new, tokenizer = load(made.data), load(cut_half(kind)), pruned_json(made, ids)
    kept = 0
    for line in lines():
        for text in (line, *line.split()):
            before = old.encode(text)
            mapped = [ids.new(i) for i in before]
            after = new.encode(text)
            assert new.decode(after) == old.decode(before)
            assert after == tokenizer.encode(text).ids
            if None not in mapped:
                kept += 1
                assert after == mapped
                assert new.encode(text, out_type=str) == old.encode(text, out_type=str)
    assert kept > 1000
    assert len(made.pieces) - new.vocab_size() > 100


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_decodes_as_before(kind: str, text: str) -> None:
    old, new = load(source(kind).data), load(cut_half(kind))
    assert new.decode(new.encode(text)) == old.decode(old.encode(text))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_kept_pieces_in_any_order_tokenize_as_before(kind: str, data: st.DataObject) -> None:
    kept = sorted(token for token in selection(kind) if not token.startswith("<"))
    text = "".join(data.draw(st.lists(st.sampled_from(kept), max_size=12))).replace(SPACE, " ")
    ids = half(kind)
    mapped = [ids.new(i) for i in load(source(kind).data).encode(text)]
    assume(None not in mapped)
    assert load(cut_half(kind)).encode(text) == mapped


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_removed_and_nothing_else_changes(kind: str) -> None:
    made, cut = parse(source(kind).data), parse(cut_half(kind))
    kept = [piece for piece in made.pieces if piece.piece in selection(kind)]
    assert list(cut.pieces) == kept
    assert cut.trainer_spec.vocab_size == len(kept) < made.trainer_spec.vocab_size
    assert cut.normalizer_spec == made.normalizer_spec
    cut.trainer_spec.vocab_size = made.trainer_spec.vocab_size
    assert cut.trainer_spec == made.trainer_spec


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_remove_returns_the_file(kind: str) -> None:
    made = source(kind)
    assert made.cut(made.without()) is made.data
    assert (
        made.cut(made.without(rows=len(made.pieces) + 28)) is made.data
    )  # padding rows are removed
    tokens = {**made.tokens, "<added>": len(made.pieces)}
    ids = keep(made.tokens, tokens)  # a token that is not a piece is removed
    assert prune_sentencepiece(made.data, MODEL, tokens, ids) is made.data


def test_a_whole_vocabulary_is_not_even_read() -> None:
    ids = keep(["a"], {"a": 0})
    assert prune_sentencepiece(b"anything", MODEL, {"a": 0}, ids) == b"anything"


def number(field: int, value: int) -> bytes:
    """A field with a number, as protobuf writes it; ``field`` is 16 to 2047."""
    key = field << 3
    return bytes([key & 127 | 128, key >> 7, value])


def test_unknown_fields_are_kept() -> None:
    made = source("bpe")
    model = parse(made.data)
    model.pieces[5].MergeFromString(number(400, 1))
    model.trainer_spec.MergeFromString(number(401, 2))
    model.normalizer_spec.MergeFromString(number(402, 3))
    group = bytes([0xC3, 0x19]) + b"\x0a\x02no" + number(500, 5) + bytes([0xC4, 0x19])  # 408
    fixed = bytes([0xC9, 0x19]) + b"8 bytes." + bytes([0xCD, 0x19]) + b"four"  # field 409
    unknown = number(403, 4) + group + fixed
    data = model.SerializeToString()
    first = 2 + data[1]  # end of the first piece
    data = data[:first] + unknown + data[first:] + unknown
    cut = prune_sentencepiece(data, MODEL, made.tokens, half("bpe"))
    assert cut[first:].startswith(unknown)
    assert cut.endswith(unknown)
    after = parse(cut)
    assert model.pieces[5].piece == after.pieces[5].piece
    assert number(400, 1) in after.pieces[5].SerializeToString()
    assert number(401, 2) in after.trainer_spec.SerializeToString()
    assert number(402, 3) in after.normalizer_spec.SerializeToString()
    names = [piece.piece for piece in parse(cut_half("bpe")).pieces]
    assert [piece.piece for piece in after.pieces] == names
    assert load(cut).vocab_size() == len(names)


def test_self_test_data_of_the_whole_vocabulary_is_removed() -> None:
    made = source("bpe")
    self_test = b"\x0a\x06\x0a\x01a\x12\x01a"  # samples = [input "a", expected "a"]
    data = made.data + b"\x22" + bytes([len(self_test)]) + self_test
    assert prune_sentencepiece(data, MODEL, made.tokens, half("bpe")) == cut_half("bpe")


def test_a_trainer_spec_in_parts_is_written_whole() -> None:
    made = source("bpe")
    data = made.data + b"\x12\x04" + number(100, 7)[:2] + b"\x87\x01"  # field 100 is 135
    cut = parse(prune_sentencepiece(data, MODEL, made.tokens, half("bpe")))
    spec = parse(cut_half("bpe")).trainer_spec.SerializeToString()
    assert cut.trainer_spec.SerializeToString() == spec + number(100, 7)[:2] + b"\x87\x01"


def test_special_ids_follow_their_pieces() -> None:
    made = with_specials()
    cut = made.cut(made.without("<pad>"))
    spec = parse(cut).trainer_spec
    assert (spec.pad_id, spec.unk_id, spec.bos_id, spec.eos_id) == (-1, 0, 1, 2)
    assert all(spec.HasField(name) for name in ("pad_id", "unk_id", "bos_id", "eos_id"))
    processor = load(cut)
    assert processor.pad_id() == -1
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id()] == [0, 1, 2]


def test_implicit_special_ids_are_written_when_they_move() -> None:
    made = with_specials(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    model = parse(made.data)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        model.trainer_spec.ClearField(name)
    cut = prune_sentencepiece(model.SerializeToString(), MODEL, made.tokens, made.without("<s>"))
    spec = parse(cut).trainer_spec
    assert [spec.HasField(name) for name in ("unk_id", "bos_id", "eos_id", "pad_id")] == [
        False,
        True,
        True,
        False,
    ]
    assert (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id) == (0, -1, 1, -1)
    assert load(cut).bos_id() == -1
    assert load(cut).eos_id() == 1


def test_a_missing_trainer_spec_is_written() -> None:
    model = parse(source("unigram-unk").data)
    model.ClearField("trainer_spec")
    made = source("unigram-unk")
    cut = prune_sentencepiece(model.SerializeToString(), MODEL, made.tokens, half("unigram-unk"))
    assert parse(cut).trainer_spec.vocab_size == half("unigram-unk").new_size


def fairseq(made: Source) -> dict[str, int]:
    """XLM-R's token ids: control pieces in another order, the others after a <pad>, a <mask>."""
    front = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    tokens = {piece.piece: i + 1 for i, piece in enumerate(made.pieces)} | front
    return tokens | {"<mask>": len(made.pieces) + 1}


@cache
def without_pad() -> Source:
    data = train(vocab_size=600, model_type="unigram")
    return Source(data, unigram(parse(data)))


def test_ids_shifted_like_fairseq_s_are_matched_by_text() -> None:
    made = without_pad()
    tokens = fairseq(made)
    removed = [piece.piece for piece in made.pieces[3:] if len(piece.piece) > 3]
    ids = keep(set(tokens) - set(removed), tokens)
    cut = prune_sentencepiece(made.data, MODEL, tokens, ids)
    after = [piece.piece for piece in parse(cut).pieces]
    assert after == [piece.piece for piece in made.pieces if piece.piece not in removed]
    assert after[:3] == ["<unk>", "<s>", "</s>"]
    assert [ids.new(tokens[token]) for token in after[3:]] == list(range(4, len(after) + 1))


def test_ids_in_an_order_of_their_own_are_matched_by_text() -> None:
    made = without_pad()
    names = [piece.piece for piece in made.pieces]
    tokens = {token: i for i, token in enumerate(reversed(names))}
    ids = keep(names[:300] + names[400:], tokens)
    cut = prune_sentencepiece(made.data, MODEL, tokens, ids)
    assert [piece.piece for piece in parse(cut).pieces] == names[:300] + names[400:]


def unused(kind: str) -> tuple[bytes, dict[str, int], str]:
    """A model with an UNUSED piece in the middle that tokenizer.json leaves out."""
    made = source(kind)
    model = parse(made.data)
    index = next(
        i for i, piece in enumerate(model.pieces) if i > 400 and piece.piece in selection(kind)
    )
    model.pieces[index].type = model.pieces[index].UNUSED
    name = model.pieces[index].piece
    return model.SerializeToString(), made.tokens, name


def test_unused_pieces_without_a_token_are_removed_from_unigram() -> None:
    data, tokens, name = unused("unigram")
    others = {token: i for token, i in tokens.items() if token != name}
    ids = keep(others, others)
    cut = prune_sentencepiece(data, MODEL, others, ids)
    old, new = load(data), load(cut)
    assert new.vocab_size() == old.vocab_size() - 1
    for line in lines():
        assert new.encode(line, out_type=str) == old.encode(line, out_type=str)
        assert new.encode(line) == [ids.new(i) for i in old.encode(line)]


def test_unused_pieces_need_a_token_in_bpe() -> None:
    data, tokens, name = unused("bpe")
    others = {token: i for token, i in tokens.items() if token != name}
    with pytest.raises(TokenizerError, match="contradicts tokenizer"):
        prune_sentencepiece(data, MODEL, others, keep(others, others))
    removed = next(piece.piece for piece in reversed(source("bpe").pieces) if len(piece.piece) > 3)
    cut = parse(prune_sentencepiece(data, MODEL, tokens, source("bpe").without(removed)))
    assert [piece.piece for piece in cut.pieces if piece.type == piece.UNUSED] == [name]


def test_bpe_merges_through_unused_pieces() -> None:
    """Why they may not be removed: the text would tokenize differently."""
    data, tokens, name = unused("bpe")
    model = parse(data)
    index = tokens[name]
    del model.pieces[index]
    before, after = load(data), load(model.SerializeToString())
    assert any(
        before.encode(line, out_type=str) != after.encode(line, out_type=str) for line in lines()
    )


def test_gemma_s_tab_is_the_byte_piece() -> None:
    made = source("bpe")
    tokens = {"\t" if token == "<0x09>" else token: i for token, i in made.tokens.items()}
    assert prune_sentencepiece(made.data, MODEL, tokens, half("bpe")) == cut_half("bpe")
    model = parse(made.data)
    model.pieces[-1].piece = "\t"
    del tokens[made.pieces[-1].piece]
    with pytest.raises(TokenizerError, match="piece '<0x09>': contradicts"):
        prune_sentencepiece(model.SerializeToString(), MODEL, tokens, keep(["<unk>"], tokens))


def message(error: pytest.ExceptionInfo[TokenizerError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_piece_that_is_not_a_token_is_named() -> None:
    made = source("bpe")
    tokens = {token: i for token, i in made.tokens.items() if i != 500}
    name = made.pieces[500].piece
    with pytest.raises(TokenizerError) as error:
        prune_sentencepiece(made.data, MODEL, tokens, half("bpe"))
    assert message(error) == (
        f"tokenizer.model: piece {name!r}: contradicts tokenizer.json: expected a token of this "
        "text, found piece 500 without a token; take both files from one model, or delete "
        "tokenizer.model if your software does not need it"
    )


@pytest.mark.parametrize(
    ("kind", "removed"), [("bpe", "<unk>"), ("bpe", "<0x41>"), ("unigram-unk", "<unk>")]
)
def test_unk_and_bytes_must_be_kept(kind: str, removed: str) -> None:
    made = source(kind)
    with pytest.raises(TokenizerError) as error:
        made.cut(made.without(removed))
    assert message(error) == (
        f"tokenizer.model: piece {removed!r}: must be kept for text that has no pieces of its own: "
        "expected its token among the kept ones, found it among the removed ones; keep the "
        "token, or delete tokenizer.model if your software does not need it"
    )


def test_the_piece_that_the_trainer_spec_calls_unk_must_be_kept() -> None:
    made = source("bpe")
    model = parse(made.data)
    model.trainer_spec.unk_id = 500
    for removed in (made.pieces[500].piece, "<unk>"):  # <unk> is one by its type
        with pytest.raises(TokenizerError, match=f"piece '{removed}': must be kept for text"):
            prune_sentencepiece(
                model.SerializeToString(), MODEL, made.tokens, made.without(removed)
            )
    assert parse(made.cut(made.without(made.pieces[500].piece))).trainer_spec.unk_id == 0


def test_bytes_may_be_removed_where_nothing_falls_back_to_them() -> None:
    made = source("bpe")
    model = parse(made.data)
    model.trainer_spec.byte_fallback = False
    cut = prune_sentencepiece(model.SerializeToString(), MODEL, made.tokens, made.without("<0x41>"))
    assert "<0x41>" not in [piece.piece for piece in parse(cut).pieces]


def test_a_token_between_the_pieces_is_refused() -> None:
    data, tokens, name = unused("unigram")
    index = tokens[name]
    others = {"<image>" if token == name else token: i for token, i in tokens.items()}
    ids = keep(set(others) - {source("unigram").pieces[-1].piece}, others)
    with pytest.raises(TokenizerError) as error:
        prune_sentencepiece(data, MODEL, others, ids)
    following = source("unigram").pieces[index + 1].piece
    assert message(error) == (
        f"tokenizer.model: piece {following!r}: would be taken for another token, because tokens "
        f"without a piece are kept or removed: expected its new token id {index + 1}, found "
        f"id {index} by its position; delete tokenizer.model if your software does not need it"
    )


def test_fairseq_s_shift_is_kept_or_refused() -> None:
    made = without_pad()
    tokens = fairseq(made)
    with pytest.raises(TokenizerError, match="expected its new token id 2, found id 3"):
        prune_sentencepiece(made.data, MODEL, tokens, keep(set(tokens) - {"<pad>"}, tokens))


def test_damaged_files_are_refused() -> None:
    made = source("bpe")
    for data in (made.data[:-1], made.data[:3000], b"", b"IQ== 0\nIg== 1\n"):
        with pytest.raises(TokenizerError) as error:
            prune_sentencepiece(data, MODEL, made.tokens, half("bpe"))
        assert message(error) == (
            "tokenizer.model: cannot be read: expected a SentencePiece model, found "
            f"{len(data):,} bytes that end early, are damaged or of another format; download it "
            "again, or delete it if your software does not need it"
        )


def test_a_piece_that_is_not_text_is_refused() -> None:
    made = source("bpe")
    data = made.data + b"\x0a\x05\x0a\x03\xff\xfea"
    with pytest.raises(TokenizerError, match="contradicts tokenizer"):
        prune_sentencepiece(data, MODEL, made.tokens, half("bpe"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_pruned_or_refused(data: st.DataObject) -> None:
    made = source("unigram-unk")
    damaged = bytearray(made.data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        cut = prune_sentencepiece(bytes(damaged), MODEL, made.tokens, half("unigram-unk"))
    except TokenizerError:
        return
    assert [piece.piece for piece in parse(cut).pieces] == [
        piece.piece
        for piece in parse(bytes(damaged)).pieces
        if piece.piece in selection("unigram-unk")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_recognized(kind: str) -> None:
    assert is_sentencepiece(source(kind).data)
    assert is_sentencepiece(source(kind).data[:1000])  # damaged, but no other format


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\n\x00",
        b"\n" + b"\xff" * 100,
        b"\n\x05hello",
        b"\n" * 100,
        b"\n \n" + b" " * 100,
        b"IQ== 0\nIg== 1\n",
        b"\nIQ== 0\nIg== 1\n" * 50,
        b"GGUF\x03\x00\x00\x00" + b"\x00" * 100,
        b'{"version": "1.0", "model": {}}',
        b'\n{\n  "version": "1.0"\n}' * 20,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    ],
)
def test_other_formats_are_recognized(data: bytes) -> None:
    assert not is_sentencepiece(data)


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, surgery.tokenizer.sentencepiece_model; "
        "print({'sentencepiece', 'google.protobuf', 'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
