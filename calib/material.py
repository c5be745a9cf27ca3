"""The text that all cuts of a study share: what they are chosen by, and what they are scored on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calib.chat import documents_of
from calib.corpus import byte_windows, token_windows
from calib.documents import TextOptions
from calib.heldout import Encoded, split_documents
from calib.reading import Reading
from calib.score import first_token
from surgery.choices import SizeChoice
from surgery.cut_tokenizer import cut_tokenizer
from surgery.idmap import IdMap
from surgery.layout import Layout
from surgery.rarity import Rarity
from surgery.tokenizer import TokenizerFile, load_tokenizer

WINDOW_BYTES = 2048
"""Of a window of held-out text."""


@dataclass(frozen=True, eq=False)
class Material:
    """Text in two parts, cut by whichever vocabulary is asked for."""

    layout: Layout
    rarity: Rarity
    tokenizer: TokenizerFile | None
    """None where the vocabulary stays whole."""
    calibration: Iterable[str]
    """Documents."""
    heldout: Sequence[str]
    """Windows of text."""
    samples: int
    """Windows of calibration text, at most."""
    seq_len: int
    _cut: dict[int, tuple[Any, np.ndarray]] = field(default_factory=dict, init=False)
    _heldout: dict[int, Encoded] = field(default_factory=dict, init=False)

    @classmethod
    def split(
        cls,
        layout: Layout,
        choice: SizeChoice,
        text: TextOptions,
    ) -> "Material":
        """Hold out every fourth block of ``text``, at most ``text.windows`` windows of it.

        Raises:
            DataError: the text is too short for that.
        """
        kept, held = split_documents(documents_of(layout, text))
        texts = byte_windows(held, text.windows, WINDOW_BYTES)
        rarity, tokenizer = choice.rarity, choice.tokenizer
        return cls(layout, rarity, tokenizer, kept, texts, text.samples, text.seq_len)

    def ids(self, vocab_size: int) -> IdMap:
        """The map to the ``vocab_size`` most common tokens."""
        return self.rarity.id_map(vocab_size)

    def encoded(self, vocab_size: int) -> Encoded:
        """The held-out text as a vocabulary of this size cuts it."""
        if vocab_size not in self._heldout:
            tokenizer, old_ids = self._tokenizer(vocab_size)
            first = first_token(self.layout)
            self._heldout[vocab_size] = Encoded.of(self.heldout, tokenizer, old_ids, first)
        return self._heldout[vocab_size]

    def reading(
        self,
        vocab_size: int,
        samples: int | None = None,
        *,
        edges: Sequence[int] = (),
        refits: bool = False,
    ) -> Reading:
        """The calibration text as a vocabulary of this size cuts it, at most ``samples`` windows.

        ``edges`` are sizes V' for which the source's own tokens are counted apart (paper eq. 5).
        """
        tokenizer, old_ids = self._tokenizer(vocab_size)
        count = min(samples or self.samples, self.samples)
        windows = token_windows(self.calibration, tokenizer, count, self.seq_len)
        ranks = sorted({*edges, self.layout.vocab_size})
        buckets = self.rarity.buckets(ranks)
        return Reading(self.layout, [old_ids[w] for w in windows], buckets, ranks, refits=refits)

    def _tokenizer(self, vocab_size: int) -> tuple[Any, np.ndarray]:
        """The library's tokenizer and the source's id of each of its ids."""
        if vocab_size not in self._cut:
            ids = self.ids(vocab_size)
            if self.tokenizer is None or ids.identity:
                every = np.arange(self.layout.vocab_size + self.rarity.rowless)
                self._cut[vocab_size] = load_tokenizer(self.layout.checkpoint.path), every
            else:
                self._cut[vocab_size] = cut_tokenizer(self.tokenizer, ids)
        return self._cut[vocab_size]
