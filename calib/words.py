"""Words of a text, and which of them two vocabularies cut alike."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"\s*\S+|\s+")
"""A word with the white space before it."""


@dataclass(frozen=True, eq=False)
class Words:
    """The tokens of a text, word by word."""

    ids: list[tuple[int, ...]]
    """Per word its tokens, as ids of the source's vocabulary."""
    of_token: np.ndarray
    """int64 ``(tokens,)``: the word in which each token begins."""
    nbytes: np.ndarray
    """int64 ``(words,)``: bytes of UTF-8."""

    @classmethod
    def of(cls, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> "Words":
        """Sort the tokens of ``text`` into words; ``offsets`` are in characters."""
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
        """bool ``(words,)``: which ones ``other``, of the same text, cuts into the same tokens."""
        return np.array([a == b for a, b in zip(self.ids, other.ids, strict=True)], dtype=bool)

    def bits(self, of_tokens: np.ndarray) -> np.ndarray:
        """float64 ``(words,)``: the bits of each word's tokens together."""
        return np.bincount(self.of_token, weights=of_tokens, minlength=len(self.ids))
