"""A long document in pieces: the tokens are those of the whole."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from calib.text import windows
from tests.support import tiny

PIECE = 400


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PIECE_CHARACTERS", PIECE)
        patch.setattr(windows, "OVERLAPS", (100, 200))
        yield


def sentencepiece_like() -> Tokenizer:
    """A BPE without pre-tokens, with a space put before the text, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(tiny.prose().split("\n"), trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([tiny.prose()], trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level": tiny.tokenizer(bos=True),
    "sentencepiece": sentencepiece_like(),
    "unigram": unigram(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 40_000), size=st.integers(0, 8 * PIECE), words=st.text(max_size=30))
def test_pieces_give_the_tokens_of_the_whole(kind: str, start: int, size: int, words: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = tiny.prose()[start : start + size // 2] + words + tiny.prose()[start:][: size // 2]
    parts = list(windows.token_ids(tokenizer, text))
    assert list(chain(*parts)) == tokenizer.encode(text, add_special_tokens=False).ids
    assert len(parts) == 1 or len(text) > PIECE


def test_text_on_which_pieces_never_agree_loses_nothing() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    text = "".join(chr(0x4E00 + 7 * n % 20_000) for n in range(30)) + "ab" * 5 * PIECE
    parts = list(windows.token_ids(tokenizer, text))
    assert len(parts) > 4
    assert tokenizer.decode(list(chain(*parts))) == text


def test_no_more_pieces_are_encoded_than_asked_for() -> None:
    read = windows.token_ids(TOKENIZERS["byte-level"], tiny.prose())
    assert 0 < len(next(read)) <= PIECE


def test_a_piece_that_never_agrees_keeps_its_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_handover", lambda *_: None)
    tokenizer, text = TOKENIZERS["byte-level"], tiny.prose(3 * PIECE)
    expected = [
        tokenizer.encode(text[start : start + PIECE], add_special_tokens=False).ids
        for start in range(0, 3 * PIECE, PIECE)
    ]
    assert list(windows.token_ids(tokenizer, text)) == expected
