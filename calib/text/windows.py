"""Split documents into windows: of tokens for calibration, of bytes for scores."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from surgery.errors import DataError, TokenizerError
from surgery.files.model_files import TOKENIZER_NAME
from surgery.text.documents import interleave, parts_of

LOG = logging.getLogger(__name__)

PIECE_CHARACTERS = 1 << 18
"""Characters that are encoded at a time; their tokens take some 30 MB."""
OVERLAPS = (1 << 12, 1 << 15)
"""Characters that two pieces share. The second number is used where the first is too small."""
AGREEING = 16
"""Consecutive tokens on which two pieces must agree where one takes over from the other."""

TokenSpan = tuple[int, tuple[int, int]]
"""Id, and start and end in the document, in characters."""


def token_ids(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the ids of ``text`` in order, in parts, without the post-processor's special tokens.

    A text of several pieces is encoded with overlaps. The next piece takes over in the middle of
    tokens on which both agree, so that the ids are those of the whole text. Where they never agree,
    such as in one letter repeated for pages, a token ends at the piece's border.
    """
    tokens = _encode(tokenizer, text, 0)
    stop = PIECE_CHARACTERS
    while stop < len(text):
        for overlap in OVERLAPS:
            start = stop - overlap
            following = _encode(tokenizer, text, start)
            handover = _handover(tokens, following, start)
            if handover is not None:
                break
        else:
            start, handover = stop, (len(tokens), 0)
            following = _encode(tokenizer, text, start)
        yield [token for token, _ in tokens[: handover[0]]]
        tokens = following[handover[1] :]
        stop = start + PIECE_CHARACTERS
    yield [token for token, _ in tokens]


def _encode(tokenizer: Tokenizer, text: str, start: int) -> list[TokenSpan]:
    encoding = tokenizer.encode(text[start : start + PIECE_CHARACTERS], add_special_tokens=False)
    return [
        (token, (start + begin, start + end))
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def _handover(
    tokens: list[TokenSpan], following: list[TokenSpan], start: int
) -> tuple[int, int] | None:
    """Return how many of ``tokens`` to use, and how many of ``following`` to skip; None if the two
    do not agree."""
    first = len(tokens)
    while first and tokens[first - 1][1][0] >= start:
        first -= 1
    index_of = {token: index for index, token in enumerate(tokens[first:], first)}
    run, before = 0, -2
    for index, token in enumerate(following):
        at = index_of.get(token)
        run = 0 if at is None else run + 1 if at == before + 1 else 1
        before = -2 if at is None else at
        if run == AGREEING:
            return before + 1 - run // 2, index + 1 - run // 2
    return None


Item = TypeVar("Item")

MOST_SHORT = 64
"""Short documents that are read per requested window, in search of longer ones."""


class _Window(NamedTuple):
    source: int
    position: int
    """Its position among the windows of its source, in the order of the text."""
    ids: list[int]


def token_windows(
    documents: Iterable[str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> list[np.ndarray]:
    """Return at most ``samples`` windows, int64 ``[at most seq_len]`` each, in the text's order.

    A document is split into full windows and a rest, which is a shorter window. The special tokens
    that the tokenizer's post-processor adds to a text are added to every window, within
    ``seq_len``.

    Documents that fill at least one window are used first, in order. Shorter documents are used, in
    order, only if the longer ones give fewer than ``samples`` windows. Reading ends after
    ``samples`` windows of longer documents, after ``MOST_SHORT · samples`` short documents, or with
    the text.

    Several sources take turns by weight, each by this rule. If one has too little text, the others
    give more.

    Raises:
        DataError: a window has no room for text.
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
        (sorted(windows, key=lambda window: window.position), weight)
        for windows, (_, weight) in zip(chosen, sources, strict=True)
    ]
    return [np.array([*before, *window.ids, *after]) for window in interleave(in_order, _one)]


def _ranked(
    source: int, documents: Iterable[str], tokenizer: Tokenizer, samples: int, room: int
) -> Iterator[_Window]:
    """Yield the windows of documents that fill one, then at most ``samples`` short documents."""
    position, passed = 0, 0
    short: list[_Window] = []
    for document in documents:
        windows = _split_tokens(token_ids(tokenizer, document), room)
        first = next(windows, None)
        if first is None:
            continue
        position += 1
        if len(first) == room:
            yield _Window(source, position, first)
            for ids in windows:
                position += 1
                yield _Window(source, position, ids)
            continue
        passed += 1
        if passed <= samples:
            short.append(_Window(source, position, first))
        if passed == MOST_SHORT * samples:
            break
    yield from short


def _split_tokens(parts: Iterable[list[int]], room: int) -> Iterator[list[int]]:
    """Split one document's ids into windows of ``room`` tokens and a rest."""
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
        DataError: there is no window.
    """
    if not windows:
        raise DataError("`data`", "has no text", expected="at least one token", fix="give a text")


def shortfall(windows: Sequence[np.ndarray], samples: int, seq_len: int) -> str | None:
    """Return a note if the windows have fewer tokens than ``samples`` × ``seq_len``."""
    tokens, asked = sum(map(len, windows)), samples * seq_len
    if tokens >= asked:
        return None
    return (
        f"the text gives {tokens:,} tokens in {len(windows):,} windows, "
        f"of {asked:,} asked for ({samples:,} windows of {seq_len:,})"
    )


def within_positions(seq_len: int, positions: int | None) -> int:
    """Return ``seq_len``, or the model's ``positions`` where those are fewer, and say so."""
    if positions is None or seq_len <= positions:
        return seq_len
    LOG.info(
        "note: the model has %s positions, so windows have as many tokens instead of %s",
        f"{positions:,}",
        f"{seq_len:,}",
    )
    return positions


def scored_windows(first: int, ids: np.ndarray, positions: int | None) -> list[np.ndarray]:
    """Return ``ids``, a text to score, as windows that begin with ``first``.

    It is one window, or several where the model has too few ``positions`` for that.
    """
    room = max(1, (positions or len(ids) + 1) - 1)
    parts = [ids[start : start + room] for start in range(0, len(ids), room)]
    return [np.concatenate([[first], part]) for part in parts]


def byte_windows(documents: Iterable[str], samples: int, window_bytes: int) -> list[str]:
    """Return the first ``samples`` windows of at most ``window_bytes`` bytes of UTF-8.

    Windows end between characters, never cross a document, and leave nothing out. Several sources
    take turns by weight.

    Raises:
        DataError: there is no text, or a window is too short for one character.
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
        ((text for document in part for text in _split_bytes(document, window_bytes)), weight)
        for part, weight in parts_of(documents)
    ]
    windows = list(islice(interleave(sources, _one), samples))
    if not windows:
        raise DataError("`data`", "is empty", fix="give a file with text in it")
    return windows


def _split_bytes(document: str, window_bytes: int) -> Iterator[str]:
    raw, start = document.encode("utf-8"), 0
    while start < len(raw):
        stop = min(start + window_bytes, len(raw))
        while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
            stop -= 1
        yield raw[start:stop].decode("utf-8")
        start = stop


def digest(windows: Iterable[np.ndarray]) -> str:
    """Return the SHA-256 of the windows' token ids and lengths."""
    result = hashlib.sha256()
    for window in windows:
        result.update(len(window).to_bytes(8, "little"))
        result.update(window.astype("<i8").tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class Part:
    """Every ``of``-th window, starting with the ``number``-th."""

    number: int
    """1 to ``of``."""
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/4".

        Raises:
            DataError: ``text`` is no part.
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
        """Return the windows of this part.

        Raises:
            DataError: it has no windows.
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
    """Return the ids that the post-processor adds before and after any text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    extra = len(full) - len(plain)
    for start in range(extra + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise TokenizerError(
        TOKENIZER_NAME,
        "post-processor changes the text's own tokens",
        fix="use a tokenizer whose post-processor only adds tokens",
    )
