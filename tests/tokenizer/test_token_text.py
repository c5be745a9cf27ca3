"""Tokens as text, against the decoders of the `tokenizers` library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from surgery.tokenizer.kinds import (
    BYTE_CHARACTERS,
    byte_level_text,
    sentencepiece_text,
    wordpiece_text,
)


def as_byte_level(raw: bytes) -> str:
    chars = {byte: char for char, byte in BYTE_CHARACTERS.items()}
    return "".join(chars[byte] for byte in raw)


def test_the_alphabet_is_that_of_tokenizers() -> None:
    assert set(BYTE_CHARACTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_CHARACTERS.values()) == list(range(256))


@pytest.mark.parametrize(
    ("char", "byte"), [("Ġ", 0x20), ("Ċ", 0x0A), ("Ā", 0), ("!", 0x21), ("ÿ", 0xFF), ("Ń", 0xAD)]
)
def test_some_characters_of_the_alphabet(char: str, byte: int) -> None:
    assert BYTE_CHARACTERS[char] == byte


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_byte_level_text_reads_what_tokenizers_writes(text: str) -> None:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((token, _),) = pre_tokenizer.pre_tokenize_str(text)
    assert byte_level_text(token) == text


@given(st.binary(max_size=6))
def test_byte_level_text_is_none_for_parts_of_characters(raw: bytes) -> None:
    text = byte_level_text(as_byte_level(raw))
    decoded = decoders.ByteLevel().decode([as_byte_level(raw)])
    if text is None:
        assert "\ufffd" in decoded
    else:
        assert text.encode() == raw
        assert text == decoded


@pytest.mark.parametrize("token", ["two words", "▁the", "中", "a\n", "\xa0", "\xad", "<|é\x7f|>"])
def test_characters_outside_the_alphabet_give_none(token: str) -> None:
    assert byte_level_text(token) is None


@pytest.mark.parametrize(
    ("token", "text"), [("", ""), ("Ġthe", " the"), ("ä¸Ń", "中"), ("ä¸", None), ("Ń", None)]
)
def test_byte_level_tokens(token: str, text: str | None) -> None:
    assert byte_level_text(token) == text


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        ("▁the", " the"),
        ("▁▁", "  "),
        ("a▁b", "a b"),
        ("中", "中"),
        ("", ""),
        ("<0x0A>", "\n"),
        ("<0x00>", "\x00"),
        ("<0x7F>", "\x7f"),
        ("<0x80>", None),
        ("<0xFF>", None),
        ("<0xG0>", "<0xG0>"),
        ("<0x+1>", "<0x+1>"),
        ("<0x0A", "<0x0A"),
        ("▁<0x0A>", " <0x0A>"),
    ],
)
def test_sentencepiece_pieces(piece: str, text: str | None) -> None:
    assert sentencepiece_text(piece) == text


@pytest.mark.parametrize("byte", range(256))
def test_byte_pieces_decode_as_tokenizers_does(byte: int) -> None:
    piece = f"<0x{byte:02X}>"
    decoded = decoders.ByteFallback().decode([piece])
    assert (sentencepiece_text(piece) or "\ufffd") == decoded


@given(st.text())
def test_only_spaces_change_in_ordinary_pieces(text: str) -> None:
    assert sentencepiece_text(text.replace(" ", "▁")) == text.replace("▁", " ")


@pytest.mark.parametrize(
    ("token", "text"),
    [("##ing", "ing"), ("the", "the"), ("#", "#"), ("####", "##"), ("a##", "a##")],
)
def test_wordpiece_tokens(token: str, text: str) -> None:
    assert wordpiece_text(token) == text
    assert decoders.WordPiece(cleanup=False).decode(["x", token]).split("x", 1)[1].strip() == text
