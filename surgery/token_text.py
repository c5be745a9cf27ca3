"""What a token of each kind of vocabulary stands for, as text."""

_SPACE = "\u2581"  # ▁


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's rule: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in sorted(printable)}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_CHARACTERS = _byte_level_alphabet()
"""Character of GPT-2's byte-level alphabet → the byte it stands for, all 256."""

_BYTE_PIECES = {f"<0x{byte:02X}>": chr(byte) if byte < 0x80 else None for byte in range(256)}


def byte_level_text(token: str) -> str | None:
    """Return the text of a byte-level token such as ``"Ġthe"``.

    None if its bytes are not whole UTF-8 characters, or a character is not of the alphabet (as in
    many added tokens, which stand for themselves).
    """
    try:
        return bytes([BYTE_CHARACTERS[char] for char in token]).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def sentencepiece_text(piece: str) -> str | None:
    """Return the text of a SentencePiece piece such as ``"▁the"`` or ``"<0x0A>"``.

    None for the pieces of the bytes from 0x80, which are no whole character.
    """
    if piece in _BYTE_PIECES:
        return _BYTE_PIECES[piece]
    return piece.replace(_SPACE, " ")


def wordpiece_text(token: str) -> str:
    """Return the text of a WordPiece token: ``"##ing"`` is "ing"."""
    return token.removeprefix("##")
