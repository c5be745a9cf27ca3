"""The vocabulary of a calibration: which one cuts its text, and for which its sums are exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.budget import candidate_vocab_sizes
from surgery.cut_tokenizer import cut_tokenizer
from surgery.layout import Layout
from surgery.rarity import Rarity
from surgery.tokenizer import load_tokenizer
from surgery.vocabulary import open_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextVocabulary:
    """A vocabulary in order of rarity, and how much of it a calibration uses."""

    rarity: Rarity
    size: int | None = None
    """V' whose tokenizer cuts the text; None is the source's own."""
    exact: Sequence[int] = ()
    """Sizes V' for which the sums are to be exact; without any ``size``, or the usual ratios'."""

    def pruned_size(self, layout: Layout) -> int | None:
        """``size`` where it is not all of the vocabulary."""
        return None if self.size == layout.vocab_size else self.size

    def edges(self, layout: Layout) -> list[int]:
        """Ranks of rarity at which buckets of tokens end."""
        pruned = self.pruned_size(layout)
        usual = [pruned] if pruned else candidate_vocab_sizes(layout, self.rarity.must_keep)
        return sorted({*(self.exact or usual), layout.vocab_size})

    def tokenizer(self, layout: Layout) -> tuple["Tokenizer", np.ndarray | None]:
        """What cuts the text, and the source's id of each of its ids; None where it is the same.

        Raises:
            TokenizerError: the vocabulary cannot be cut.
            BudgetError: nor to this size.
        """
        pruned = self.pruned_size(layout)
        if pruned is None:
            return load_tokenizer(layout.checkpoint.path), None
        return cut_tokenizer(open_vocabulary(layout), self.rarity.id_map(pruned))
