"""The text of a recovery: windows to train on, and held-out text that judges the result."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from tokenizers import Tokenizer

from calib.text.heldout import EVERY, split_documents
from calib.text.windows import byte_windows, scored_windows, token_ids
from surgery.errors import DataError

WINDOW_BYTES = 2048
"""Bytes of a window of held-out text."""


def hold_out(documents: Iterable[str], windows: int) -> tuple[Iterable[str], list[str]]:
    """Return documents to train on, and at most ``windows`` windows of held-out text.

    Every fourth block of the text is held out until there is enough of it. The rest is read as it
    is used, so that a text may be larger than memory.
    """
    rest, head, wanted = iter(documents), list[str](), EVERY * windows * WINDOW_BYTES
    while wanted > 0 and (document := next(rest, None)) is not None:
        head.append(document)
        wanted -= len(document)
    kept, held = split_documents(head)
    return chain(kept, rest), byte_windows(held, windows, WINDOW_BYTES)


def training_windows(
    documents: Iterable[str], tokenizer: Tokenizer, first: int, seq_len: int, most: int | None
) -> np.ndarray:
    """Return int32 ``[windows, seq_len]``: the documents' tokens, packed one after the other.

    Each window begins with the id ``first``, as held-out text does when it is scored, and so does
    each document. Tokens at the end of the text that fill no window are left out.

    Args:
        documents: Read only as far as needed.
        tokenizer: Of the model that is trained.
        first: Id that begins each window.
        seq_len: Tokens of a window.
        most: Most windows; None takes all of the text.

    Raises:
        DataError: the text does not fill one window.
    """
    found = list(islice(_packed(documents, tokenizer, first, seq_len), most))
    if not found:
        raise DataError(
            "`data`",
            "does not fill one window",
            expected=f"at least {seq_len:,} tokens beside the held-out text",
            fix="give more text, or a smaller `seq_len`",
        )
    return np.stack(found)


def _packed(
    documents: Iterable[str], tokenizer: Tokenizer, first: int, seq_len: int
) -> Iterator[np.ndarray]:
    waiting: list[int] = []
    for document in documents:
        waiting.append(first)
        for ids in token_ids(tokenizer, document):
            waiting += ids
            while len(waiting) >= seq_len:
                begins = waiting[0] == first
                used = seq_len if begins else seq_len - 1
                window = waiting[:used] if begins else [first, *waiting[:used]]
                yield np.array(window, dtype=np.int32)
                del waiting[:used]


def encode_heldout(
    texts: Sequence[str], tokenizer: Tokenizer, first: int, positions: int | None
) -> list[list[int]]:
    """Return the ids of held-out windows, each preceded by ``first``.

    A window with more tokens than the model has ``positions`` becomes several, as in a score.
    """
    encoded = (np.array(tokenizer.encode(t, add_special_tokens=False).ids, int) for t in texts)
    return [each.tolist() for ids in encoded for each in scored_windows(first, ids, positions)]
