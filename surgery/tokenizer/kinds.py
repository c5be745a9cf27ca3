"""Kinds of tokenizer that can be pruned: what each must keep, how it spells and splits text."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError, TokenizerError
from surgery.files.strict_json import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PRE_TOKENIZERS = Path(__file__).with_name("pre_tokenizers.json")
"""llama.cpp's table of pre-tokenizers (MIT): a check text, and name → hashes of its ids."""

_SPACE = "\u2581"  # ▁

VISIBLE_SPACE = "\u2423"  # ␣
_ESCAPES = {" ": VISIBLE_SPACE, "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


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

    None if its bytes are not whole UTF-8 characters, or if a character is not in the alphabet.
    Many added tokens have such characters: they stand for themselves.
    """
    try:
        return bytes([BYTE_CHARACTERS[char] for char in token]).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def sentencepiece_text(piece: str) -> str | None:
    """Return the text of a SentencePiece piece such as ``"▁the"`` or ``"<0x0A>"``.

    None for the pieces of the bytes from 0x80 on, which are not whole characters.
    """
    if piece in _BYTE_PIECES:
        return _BYTE_PIECES[piece]
    return piece.replace(_SPACE, " ")


def wordpiece_text(token: str) -> str:
    """Return the text of a WordPiece token: ``"##ing"`` is "ing"."""
    return token.removeprefix("##")


@dataclass(frozen=True, eq=False)
class Kind:
    """How a kind of tokenizer spells its tokens."""

    text: Callable[[str], str | None]
    """Token → the text it stands for; None for bytes that are not whole characters."""
    whitespace: frozenset[str]
    """Spellings of space, newline, tab and carriage return."""


BYTE_LEVEL = Kind(byte_level_text, frozenset("ĠĊĉč"))
SENTENCEPIECE = Kind(sentencepiece_text, frozenset("▁\n\t\r"))
UNIGRAM = Kind(sentencepiece_text, frozenset("▁\n\t\r"))
WORDPIECE = Kind(wordpiece_text, frozenset())


def readable(token: str, kind: Kind) -> str:
    """Return a token as people read it, on one line that is safe for a terminal.

    A space is ␣, a newline is ``\\n``, a byte that is part of a character is ``<0xE4>``, and what
    cannot be printed is a number such as ``\\u200b``. WordPiece keeps its ``##``.
    """
    text = token if kind is WORDPIECE else kind.text(token)
    if text is None and kind is BYTE_LEVEL and all(char in BYTE_CHARACTERS for char in token):
        raw = bytes(BYTE_CHARACTERS[char] for char in token)
        text = raw.decode("utf-8", "surrogateescape")
    return "".join(map(_readable_character, token if text is None else text))


def _readable_character(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how ``surrogateescape`` keeps a byte
        return f"<0x{code - 0xDC00:02X}>"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


MODEL_KEYS = {
    "BPE": ("continuing_subword_prefix", "end_of_word_suffix", "dropout"),
    "Unigram": (),
    "WordPiece": (),
}
"""Type of model → keys of it that pruning does not support."""


def kind_of(data: dict[str, Any], path: Path) -> Kind:
    """Return the kind of a parsed tokenizer.json.

    Raises:
        TokenizerError: this kind cannot be pruned; the message names it.
    """
    model = data.get("model")
    type_ = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(type_, str) or type_ not in MODEL_KEYS:
        raise _refusal(path, f"{type_} model")
    for key in MODEL_KEYS[type_]:
        if model.get(key):
            raise _refusal(path, f"BPE with {key} {model[key]!r}")
    if type_ == "Unigram":
        return UNIGRAM
    if type_ == "WordPiece":
        if model.get("continuing_subword_prefix", "##") != "##":
            prefix = model["continuing_subword_prefix"]
            raise _refusal(path, f"WordPiece with continuing_subword_prefix {prefix!r}")
        return WORDPIECE
    parts = _component_types(data.get("pre_tokenizer")) | _component_types(data.get("decoder"))
    if "ByteLevel" in parts and not model.get("byte_fallback"):
        return BYTE_LEVEL
    if model.get("byte_fallback") or "Metaspace" in parts:
        return SENTENCEPIECE
    raise _refusal(path, "BPE without a byte-level or SentencePiece-style alphabet")


def alphabet(kind: Kind, vocab: Mapping[str, int], *, byte_fallback: bool) -> set[int]:
    """Ids to keep so that any text can still be written, and those of runs of white space.

    These are all bytes: the byte-level characters, or ``<0xXX>``. Where a character has no bytes
    to fall back to, they are all single characters: ``c`` and ``##c``; and all pieces that have a
    character which is not among these. ``▁`` is kept even where bytes exist: decoders turn it into
    a space before they join bytes.
    """
    if kind is WORDPIECE:
        return {id_ for token, id_ in vocab.items() if not _spelled_by_others(token, vocab)}
    if kind is SENTENCEPIECE or kind is UNIGRAM:
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if byte_fallback else set()
        return {
            id_
            for token, id_ in vocab.items()
            if token in bytes_
            or kind.whitespace.issuperset(token)
            or (len(token) == 1 and not byte_fallback)
            or (kind is UNIGRAM and not byte_fallback and not all(c in vocab for c in token))
        }
    return {
        id_ for token, id_ in vocab.items() if len(token) == 1 or kind.whitespace.issuperset(token)
    }


def _spelled_by_others(token: str, vocab: Mapping[str, int]) -> bool:
    """Whether a WordPiece token is longer than a character, each of which is a token of its own."""
    first, inside = ("##", token[2:]) if token.startswith("##") else ("", token)
    characters = [f"{first}{inside[:1]}", *(f"##{char}" for char in inside[1:])]
    return len(inside) > 1 and all(character in vocab for character in characters)


def _refusal(path: Path, found: str) -> TokenizerError:
    return TokenizerError(
        path,
        "this kind of vocabulary cannot be pruned",
        expected="BPE on bytes or with SentencePiece's alphabet, Unigram, or WordPiece",
        found=found,
        fix="keep the vocabulary whole with `vocab_size` and prune channels only",
    )


def _component_types(part: Any) -> set[str]:
    if not isinstance(part, dict):
        return set()
    lists = (part.get("pretokenizers"), part.get("decoders"))
    inner = [child for children in lists if isinstance(children, list) for child in children]
    return {str(part.get("type"))}.union(*(_component_types(child) for child in inner))


def pre_tokenizer_name(tokenizer: "Tokenizer") -> str | None:
    """Return llama.cpp's name for the way that text is split before BPE; None where it has none.

    Its converter knows a tokenizer by the ids of a check text. So it knows no pruned one.
    """
    table = read_json(PRE_TOKENIZERS)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(table["text"]).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    return next((name for name, known in table["names"].items() if digest in known), None)


def check_pre_tokenizer(option: str, name: str) -> None:
    """Refuse a name that llama.cpp's table of pre-tokenizers does not have.

    Raises:
        OptionError: it names the option, and names like ``name``.
    """
    from difflib import get_close_matches

    names = read_json(PRE_TOKENIZERS)["names"]
    if name in names:
        return
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    raise OptionError(
        f"`{option}`",
        "is none of llama.cpp's names for pre-tokenizers",
        found=repr(name[:40]),
        fix=(f"did you mean {' or '.join(close)}? " if close else "")
        + "name the one that its converter finds for the source, such as llama-bpe, qwen2, smollm",
    )
