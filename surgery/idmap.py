"""The one map from old token ids to new ones."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class IdMap:
    """Old id → new id or gone. Kept ids stay in order and become compact."""

    kept: np.ndarray
    """int64 ``[V']``: old ids of the embedding rows that stay, ascending."""
    old_size: int
    """V: rows of the source's embedding."""
    rowless: int = 0
    """Tokens behind the last row (Gemma's image token); they stay behind the last row."""

    @cached_property
    def new_size(self) -> int:
        """V': rows of the pruned embedding."""
        return len(self.kept)

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
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

    def new_ids(self, old: np.ndarray) -> np.ndarray:
        """New ids of rows that stay."""
        return self._table[old]

    def keep_mask(self) -> np.ndarray:
        """bool ``[V]``: whether each row of the source stays."""
        return self._table[: self.old_size] >= 0
