"""How often tokens occur in text, by the tokenizer's own library."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 18
"""Text encoded at a time: its tokens take some 30 MB."""


def count_tokens(tokenizer: "Tokenizer", documents: Iterable[str], size: int) -> np.ndarray:
    """int64 ``[size]``: occurrences of every id below ``size`` in ``documents``.

    Special tokens that the post-processor adds are not counted.

    Raises:
        DataError: there is no token at all.
    """
    counts = np.zeros(size, dtype=np.int64)
    for ids in encoded(tokenizer, documents):
        counts += np.bincount(ids, minlength=size)[:size]
    if not counts.any():
        raise DataError("`data`", "has no text to count tokens in", fix="give a text")
    return counts


def encoded(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the ids of ``texts``, a batch at a time, without the post-processor's tokens."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for batch in _batches(texts):
        found = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield np.concatenate([np.array(part.ids, dtype=np.int64) for part in found])


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    """Gather short texts and cut long ones, at line ends where there are any."""
    batch: list[str] = []
    size = 0
    for text in texts:
        for part in _parts(text):
            batch.append(part)
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        cut = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1
        stop = cut or start + BATCH_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
