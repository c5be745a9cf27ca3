"""Documents → windows: of tokens for calibration, of bytes for scores."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from surgery.errors import DataError, TokenizerError
from surgery.model_files import TOKENIZER_NAME

Item = TypeVar("Item")


def token_windows(
    documents: Iterable[str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> list[np.ndarray]:
    """Return the first ``samples`` windows, int64 ``[at most seq_len]`` each.

    A document is cut into full windows and a rest. What the tokenizer's post-processor puts
    around a text goes around every window, within ``seq_len``.

    Raises:
        DataError: there is no room for text in a window.
    """
    before, after = _special_ids(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise DataError(
            "`seq_len`",
            "leaves no room for text",
            expected=f"more than {len(before) + len(after)}",
            found=seq_len,
            fix="choose a longer window",
        )
    windows: list[np.ndarray] = []
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        for start in range(0, len(ids), room):
            windows.append(np.array([*before, *ids[start : start + room], *after]))
            if len(windows) == samples:
                break
        if len(windows) == samples:
            break
    return windows


def check_windows(windows: Sequence[np.ndarray], seq_len: int) -> None:
    """Refuse a text without a single window of ``seq_len`` tokens.

    Raises:
        DataError: that.
    """
    longest = max(map(len, windows), default=0)
    if longest < seq_len:
        raise DataError(
            "`data`",
            "has no full window",
            expected=f"a document of {seq_len} tokens",
            found=f"at most {longest}",
            fix="give longer documents or a smaller `seq_len`",
        )


def byte_windows(documents: Iterable[str], samples: int, window_bytes: int) -> list[str]:
    """Return the first ``samples`` windows of at most ``window_bytes`` bytes of UTF-8.

    Windows end at a character's boundary, never cross a document, and leave nothing out.

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
    windows: list[str] = []
    for document in documents:
        raw, start = document.encode("utf-8"), 0
        while start < len(raw) and len(windows) < samples:
            stop = min(start + window_bytes, len(raw))
            while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
                stop -= 1
            windows.append(raw[start:stop].decode("utf-8"))
            start = stop
    if not windows:
        raise DataError("`data`", "is empty", fix="give a file with text in it")
    return windows


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


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
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
