"""Texts that begin alike, as an item's choices after its context, in one window of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from calib.streaming.batches import Branches, Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.settings import PassSettings
from calib.streaming.stand_ins import MASK, has_value
from calib.streaming.weights import WeightReader
from surgery.errors import SurgeryError
from surgery.families.schema import DECODER
from surgery.layout.layout import Layout

AGREE = 1e-3
"""Most difference of a layer's output, over its largest number: rounding is far smaller."""

LIMITS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
"""Keys of the library's config that limit how far back a layer's tokens attend."""

TRUNK, BRANCHES = 5, (3, 4)
"""Tokens of the texts by which a model is tried."""


@dataclass(frozen=True, eq=False)
class Joined:
    """Several texts in one window."""

    window: np.ndarray
    """int64 ids: what all texts begin with, then the rest of each."""
    branches: Branches
    places: Sequence[np.ndarray]
    """Per text, where its last tokens are, as many as asked for."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.branches.positions.max()) + 1


def joined(texts: Sequence[np.ndarray], last: Sequence[int]) -> Joined:
    """Join ``texts``; of each, the place of so many ``last`` tokens is returned."""
    least = min(map(len, texts))
    same = np.all([text[:least] == texts[0][:least] for text in texts], axis=0)
    trunk = least if same.all() else int(np.argmin(same))
    rests = [text[trunk:] for text in texts]
    starts = np.cumsum([0, *map(len, rests)])
    places = []
    for text, count, start in zip(texts, last, starts, strict=False):
        own = np.arange(len(text) - count, len(text))
        places.append(np.where(own < trunk, own, own + start))
    lengths = tuple(map(len, rests))
    return Joined(np.concatenate([texts[0][:trunk], *rests]), Branches(trunk, lengths), places)


def most_shared(layout: Layout, settings: PassSettings) -> int:
    """Return how long texts may be that share a window; 0 where the model must have each alone.

    It must take a mask and positions in every layer, and its first layer must then give what it
    gives for each text alone. So layers that pass on a state, as linear attention does, share none.
    """
    if layout.family.kind != DECODER:
        return 0
    ids = np.arange(TRUNK + sum(BRANCHES)) % layout.vocab_size
    ends = np.cumsum([TRUNK, *BRANCHES])
    texts = [np.concatenate([ids[:TRUNK], ids[a:b]]) for a, b in pairwise(ends)]
    both = joined(texts, list(map(len, texts)))
    together, alone = Stream([both.window], branches=[both.branches]), Stream(texts)
    try:
        with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
            decoder = StreamedDecoder(layout, reader, settings)
            decoder.embed([together, alone])
            (arguments,) = together.batches[0].arguments.values()
            if not all(has_value(each, MASK) for each in arguments):
                return 0
            limits = [getattr(decoder.config, key, None) for key in LIMITS]
            for index in decoder.layers():
                decoder.run(index, together)
                decoder.run(index, alone)
                break
    except SurgeryError:  # the library's class takes no such mask
        return 0
    (_, _, states), found = next(together.hidden()), list(alone.hidden())
    expected = torch.cat([each for _, _, each in sorted(found, key=lambda each: each[0])])
    error = (states[np.concatenate(both.places)] - expected).abs().max()
    if not bool(error <= AGREE * expected.abs().max()):
        return 0
    return min((each for each in limits if isinstance(each, int) and each > 0), default=1 << 30)
