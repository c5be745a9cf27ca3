"""The rows of an embedding in order of rarity, and what follows from the order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import BudgetError
from surgery.idmap import IdMap


@dataclass(frozen=True, eq=False)
class Rarity:
    """The rows of the embedding from the most to the least common."""

    order: np.ndarray
    """int64 ``[V]``: row ids. Any prefix that holds ``must_keep`` is closed under merges."""
    must_keep: int
    """How many rows at the front have to stay."""
    tokens: int
    """Tokens that have a row; the rest of ``order`` are padding rows."""
    rowless: int
    """Added tokens behind the last row."""

    def id_map(self, vocab_size: int) -> IdMap:
        """Keep the ``vocab_size`` most common rows.

        Raises:
            BudgetError: ``vocab_size`` is above V or below what must stay.
        """
        if not self.must_keep <= vocab_size <= len(self.order):
            raise BudgetError(
                "`vocab_size`",
                "is out of reach",
                expected=f"{self.must_keep} (bytes, special, referenced and asked-for tokens, "
                f"white space) to {len(self.order)} (the source's rows)",
                found=vocab_size,
                fix="choose a size in this range",
            )
        return IdMap(np.sort(self.order[:vocab_size]), len(self.order), self.rowless)

    def buckets(self, edges: Sequence[int]) -> np.ndarray:
        """int64 ``[V]``: for each row the first bucket whose edge lies beyond its rank."""
        buckets = np.empty(len(self.order), dtype=np.int64)
        buckets[self.order] = np.searchsorted(edges, np.arange(len(self.order)), side="right")
        return buckets


def identity_rarity(rows: int) -> Rarity:
    """The order of a vocabulary that is not cut: every row must stay."""
    return Rarity(np.arange(rows), must_keep=rows, tokens=rows, rowless=0)
