"""The map from old token ids to new ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class IdMap:
    """Old id → new id, or None for a removed row. New ids keep the order, without gaps."""

    kept: np.ndarray
    """int64 ``[V']``: old ids of the kept embedding rows, ascending."""
    old_size: int
    """V: rows of the source's embedding."""
    rowless: int = 0
    """Tokens after the last row (Gemma's image token); they come after the last kept row, too."""

    @cached_property
    def new_size(self) -> int:
        """V': rows of the pruned embedding."""
        return len(self.kept)

    @property
    def identity(self) -> bool:
        """Whether every row is kept, so that no id changes."""
        return self.new_size == self.old_size

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(self.old_size + self.rowless, -1, dtype=np.int64)
        table[self.kept] = np.arange(self.new_size)
        table[self.old_size :] = np.arange(self.new_size, self.new_size + self.rowless)
        return table

    def new(self, old: int) -> int | None:
        """New id of ``old``, or None when its row is removed or it never was a token."""
        if not 0 <= old < len(self._table):
            return None
        new = int(self._table[old])
        return new if new >= 0 else None

    def keep_mask(self) -> np.ndarray:
        """bool ``[V]``: whether each row of the source is kept."""
        return self._table[: self.old_size] >= 0


@dataclass(frozen=True, eq=False)
class KeptTokens(Mapping[str, int]):
    """Token → new id of the kept tokens, in their order: a view that takes no memory."""

    old: Mapping[str, int]
    """Token → old id."""
    ids: IdMap

    def __getitem__(self, token: str) -> int:
        """The new id of a kept token."""
        new = self.ids.new(self.old[token])
        if new is None:
            raise KeyError(token)
        return new

    def __iter__(self) -> Iterator[str]:
        """The kept tokens."""
        return (token for token, old in self.old.items() if self.ids.new(old) is not None)

    def __len__(self) -> int:
        """How many tokens are kept."""
        return sum(1 for _ in self)
