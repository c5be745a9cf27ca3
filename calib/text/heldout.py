"""Split a text into a calibration part and a held-out part, and tokenize the latter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from calib.text.windows import scored_windows
from surgery.text.documents import mixture, parts_of

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
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        split = [scored_windows(first, old_ids[np.array(ids, int)], positions) for ids in encoded]
        return cls([window for windows in split for window in windows], list(map(len, split)))

    def by_text(self, bits: Iterable[np.ndarray]) -> list[float]:
        """Return the bits of each text from those of each window's tokens."""
        left = iter(bits)
        return [float(sum(part.sum() for part in islice(left, n))) for n in self.counts]
