"""Documents → windows: of tokens for calibration, of bytes for scores."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from surgery.errors import DataError, TokenizerError
from surgery.files.model_files import TOKENIZER_NAME
from surgery.text.documents import interleave, parts_of

PIECE_CHARACTERS = 1 << 18
"""Encoded at a time: their tokens take some 30 MB."""
OVERLAPS = (1 << 12, 1 << 15)
"""Characters of a piece that the next one begins with; the second where the first do not do."""
AGREEING = 16
"""Tokens on which two pieces must agree where one takes over from the other."""

Token = tuple[int, tuple[int, int]]
"""Id, and place in the document in characters."""


def token_ids(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the ids of ``text`` in order, in parts, without what the post-processor adds.

    A text of several pieces is encoded with overlaps. The next piece takes over in the middle of
    tokens on which both agree, so that no border of a piece shows. Only where they never agree,
    such as in one letter repeated for pages, the piece's border stays.
    """
    tokens = _encode(tokenizer, text, 0)
    stop = PIECE_CHARACTERS
    while stop < len(text):
        for overlap in OVERLAPS:
            start = stop - overlap
            following = _encode(tokenizer, text, start)
            meeting = _meeting(tokens, following, start)
            if meeting is not None:
                break
        else:
            start, meeting = stop, (len(tokens), 0)
            following = _encode(tokenizer, text, start)
        yield [token for token, _ in tokens[: meeting[0]]]
        tokens = following[meeting[1] :]
        stop = start + PIECE_CHARACTERS
    yield [token for token, _ in tokens]


def _encode(tokenizer: Tokenizer, text: str, start: int) -> list[Token]:
    encoding = tokenizer.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False)
    return [
        (token, (start + begin, start + end))
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def _meeting(tokens: list[Token], following: list[Token], start: int) -> tuple[int, int] | None:
    """How many of ``tokens`` come first, and how many of ``following`` they replace."""
    first = len(tokens)
    while first and tokens[first - 1][1][0] >= start:
        first -= 1
    places = {token: place for place, token in enumerate(tokens[first:], first)}
    run, before = 0, -2
    for place, token in enumerate(following):
        at = places.get(token)
        run = 0 if at is None else run + 1 if at == before + 1 else 1
        before = -2 if at is None else at
        if run == AGREEING:
            return before + 1 - run // 2, place + 1 - run // 2
    return None


Item = TypeVar("Item")

MOST_SHORT = 64
"""For each window asked for, so many short documents are read in search of longer ones."""


class _Window(NamedTuple):
    source: int
    place: int
    """Among the windows of its source, in the order of the text."""
    ids: list[int]


def token_windows(
    documents: Iterable[str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> list[np.ndarray]:
    """Return at most ``samples`` windows, int64 ``[at most seq_len]`` each, in the text's order.

    A document is cut into full windows and a rest, which is a window of its own length. What the
    tokenizer's post-processor puts around a text goes around every window, within ``seq_len``.

    The windows of documents that fill at least one come first, in order. Only the places that they
    leave go to documents shorter than a window, in order, too. So a short document is used where
    the text has no longer one for its place. Reading ends when there are ``samples`` windows of
    longer documents, with the text, or after ``MOST_SHORT · samples`` short documents.

    Several sources take turns by weight, each by this rule. What one cannot give, the others do.

    Raises:
        DataError: there is no room for text in a window.
    """
    before, after = special_ids(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise DataError(
            "`seq_len`",
            "leaves no room for text",
            expected=f"more than {len(before) + len(after)}",
            found=seq_len,
            fix="choose a longer window",
        )
    sources = [
        (_ranked(source, part, tokenizer, samples, room), weight)
        for source, (part, weight) in enumerate(parts_of(documents))
    ]
    chosen: list[list[_Window]] = [[] for _ in sources]
    for window in islice(interleave(sources, _one), samples):
        chosen[window.source].append(window)
    in_order = [
        (sorted(windows, key=lambda window: window.place), weight)
        for windows, (_, weight) in zip(chosen, sources, strict=True)
    ]
    return [np.array([*before, *window.ids, *after]) for window in interleave(in_order, _one)]


def _ranked(
    source: int, documents: Iterable[str], tokenizer: Tokenizer, samples: int, room: int
) -> Iterator[_Window]:
    """Yield the windows of documents that fill one, then those of at most ``samples`` others."""
    place, passed = 0, 0
    short: list[_Window] = []
    for document in documents:
        windows = _cut(token_ids(tokenizer, document), room)
        first = next(windows, None)
        if first is None:
            continue
        place += 1
        if len(first) == room:
            yield _Window(source, place, first)
            for ids in windows:
                place += 1
                yield _Window(source, place, ids)
            continue
        passed += 1
        if passed <= samples:
            short.append(_Window(source, place, first))
        if passed == MOST_SHORT * samples:
            break
    yield from short


def _cut(parts: Iterable[list[int]], room: int) -> Iterator[list[int]]:
    """Cut one document's ids into windows of ``room``, and a rest."""
    rest: list[int] = []
    for part in parts:
        rest += part
        full = len(rest) // room * room
        for start in range(0, full, room):
            yield rest[start : start + room]
        del rest[:full]
    if rest:
        yield rest


def _one(_: object) -> float:
    return 1.0


def check_windows(windows: Sequence[np.ndarray]) -> None:
    """Refuse a text without a token.

    Raises:
        DataError: that.
    """
    if not windows:
        raise DataError("`data`", "has no text", expected="at least one token", fix="give a text")


def shortfall(windows: Sequence[np.ndarray], samples: int, seq_len: int) -> str | None:
    """Say that the windows have fewer tokens than were asked for, if so."""
    tokens, asked = sum(map(len, windows)), samples * seq_len
    if tokens >= asked:
        return None
    return (
        f"the text gives {tokens:,} tokens in {len(windows):,} windows, "
        f"of {asked:,} asked for ({samples:,} windows of {seq_len:,})"
    )


def byte_windows(documents: Iterable[str], samples: int, window_bytes: int) -> list[str]:
    """Return the first ``samples`` windows of at most ``window_bytes`` bytes of UTF-8.

    Windows end at a character's boundary, never cross a document, and leave nothing out. Several
    sources take turns by weight.

    Raises:
        DataError: no text, or windows shorter than a character can be.
    """
    if window_bytes < 4:
        raise DataError(
            "`window_bytes`",
            "is less than a character can take",
            expected="at least 4",
            found=window_bytes,
            fix="choose a longer window",
        )
    sources = [
        ((text for document in part for text in _cut_bytes(document, window_bytes)), weight)
        for part, weight in parts_of(documents)
    ]
    windows = list(islice(interleave(sources, _one), samples))
    if not windows:
        raise DataError("`data`", "is empty", fix="give a file with text in it")
    return windows


def _cut_bytes(document: str, window_bytes: int) -> Iterator[str]:
    raw, start = document.encode("utf-8"), 0
    while start < len(raw):
        stop = min(start + window_bytes, len(raw))
        while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
            stop -= 1
        yield raw[start:stop].decode("utf-8")
        start = stop


def digest(windows: Iterable[np.ndarray]) -> str:
    """SHA-256 over the windows' token ids and lengths."""
    result = hashlib.sha256()
    for window in windows:
        result.update(len(window).to_bytes(8, "little"))
        result.update(window.astype("<i8").tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class Part:
    """Every ``of``-th window, from the ``number``-th on."""

    number: int
    """1 to ``of``."""
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/4".

        Raises:
            DataError: no such part.
        """
        words = text.split("/")
        if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
            number, of = map(int, words)
            if 1 <= number <= of:
                return cls(number, of)
        raise DataError(
            "`part`", "is no part", expected="K/N with 1 <= K <= N", found=text, fix="correct it"
        )

    def choose(self, windows: Sequence[Item]) -> Sequence[Item]:
        """The windows of this part.

        Raises:
            DataError: there are none.
        """
        chosen = windows[self.number - 1 :: self.of]
        if not chosen:
            raise DataError(
                "`part`",
                "has no window",
                expected=f"at most {len(windows)} parts",
                found=f"{self.number}/{self.of}",
                fix="give more text, a shorter `seq_len` or fewer parts",
            )
        return chosen


def special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after any text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    extra = len(full) - len(plain)
    for place in range(extra + 1):
        if full[place : place + len(plain)] == plain:
            return full[:place], full[place + len(plain) :]
    raise TokenizerError(
        TOKENIZER_NAME,
        "post-processor changes the text's own tokens",
        fix="use a tokenizer whose post-processor only adds tokens",
    )
