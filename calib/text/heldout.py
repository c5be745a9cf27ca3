"""Split a text into a calibration part and a held-out part, and tokens into words."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from calib.text.windows import scored_windows
from surgery.text.documents import mixture, parts_of

WORD = re.compile(r"\s*\S+|\s+")
"""A word and the white space before it."""


@dataclass(frozen=True, eq=False)
class Words:
    """The tokens of a text, word by word."""

    ids: list[tuple[int, ...]]
    """The tokens of each word, as ids of the source's vocabulary."""
    of_token: np.ndarray
    """int64 ``(tokens,)``: index of the word in which each token begins."""
    nbytes: np.ndarray
    """int64 ``(words,)``: UTF-8 bytes of each word."""

    @classmethod
    def of(cls, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> "Words":
        """Assign the tokens of ``text`` to words; ``offsets`` are in characters."""
        spans = [match.span() for match in WORD.finditer(text)]
        starts = np.array([start for start, _ in spans], dtype=np.int64)
        begins = np.array([begin for begin, _ in offsets], dtype=np.int64)
        of_token = np.searchsorted(starts, begins, side="right") - 1
        found: list[list[int]] = [[] for _ in spans]
        for word, token in zip(of_token.tolist(), ids, strict=True):
            found[word].append(token)
        nbytes = [len(text[start:stop].encode("utf-8")) for start, stop in spans]
        return cls([tuple(word) for word in found], of_token, np.array(nbytes, dtype=np.int64))

    def alike(self, other: "Words") -> np.ndarray:
        """Return bool ``(words,)``: whether ``other``, of the same text, has the same tokens."""
        return np.array([a == b for a, b in zip(self.ids, other.ids, strict=True)], dtype=bool)

    def bits(self, of_tokens: np.ndarray) -> np.ndarray:
        """Return float64 ``(words,)``: the sum of the bits of each word's tokens."""
        return np.bincount(self.of_token, weights=of_tokens, minlength=len(self.ids))


BLOCK_CHARACTERS = 1 << 14
"""Characters of a block. Blocks are long, so that calibration still finds long windows."""

EVERY = 4
"""One of so many blocks is held out."""

LEAST_BLOCKS = 8
"""A text has at least so many blocks; a short text has shorter blocks."""


def split_documents(documents: Iterable[str]) -> tuple[Iterable[str], Iterable[str]]:
    """Return documents to calibrate on, and held-out documents: every fourth block of the text.

    The blocks of a document between two held-out ones stay one document. Each of several sources is
    divided, and both results keep the sources' weights.
    """
    parts = [(list(part), weight) for part, weight in parts_of(documents)]
    total = sum(len(document) for whole, _ in parts for document in whole)
    length = max(1, min(BLOCK_CHARACTERS, total // LEAST_BLOCKS))
    halves = [(_split(whole, length), weight) for whole, weight in parts]
    kept = mixture([(kept, weight) for (kept, _), weight in halves])
    held = mixture([(held, weight) for (_, held), weight in halves])
    return kept, held


def _split(whole: Sequence[str], length: int) -> tuple[list[str], list[str]]:
    kept: list[str] = []
    held: list[str] = []
    number = 0
    for document in whole:
        run = ""
        for start in range(0, len(document), length):
            block = document[start : start + length]
            number += 1
            if number % EVERY:
                run += block
                continue
            held.append(block)
            if run:
                kept.append(run)
            run = ""
        if run:
            kept.append(run)
    return kept, held


@dataclass(frozen=True, eq=False)
class Encoded:
    """Texts tokenized by one vocabulary."""

    windows: list[np.ndarray]
    """int64 ids of the source's vocabulary; each window begins with the first token."""
    words: list[Words]
    """One for each text."""
    counts: list[int]
    """Windows of each text: 1, or more where the model has too few positions for it."""

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        old_ids: np.ndarray,
        first: int,
        positions: int | None = None,
    ) -> "Encoded":
        """Tokenize ``texts``.

        Args:
            texts: One for each window.
            tokenizer: Of the vocabulary.
            old_ids: int64, the tokenizer's id → the source's id.
            first: Id that begins each window, such as bos.
            positions: Most tokens of a window; a longer text becomes several.
        """
        windows, words, counts = [], [], []
        for text in texts:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            ids = old_ids[np.array(encoding.ids, dtype=np.int64)]
            of_text = scored_windows(first, ids, positions)
            windows += of_text
            counts.append(len(of_text))
            words.append(Words.of(text, ids.tolist(), encoding.offsets))
        return cls(windows, words, counts)

    def by_text(self, bits: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the bits of each text's tokens from those of each window's."""
        left = iter(bits)
        return [np.concatenate([np.zeros(0), *islice(left, count)]) for count in self.counts]
