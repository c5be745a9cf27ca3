"""Windows of text on their way through the layers, and the tokens shown of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calib.streaming.hidden_states import HiddenStates
from calib.streaming.settings import MICRO_BATCH_VALUES
from calib.streaming.stand_ins import Arguments
from surgery.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Some tokens of the windows that run together."""

    ids: torch.Tensor
    """int64 ``(n,)``, on the CPU."""
    windows: torch.Tensor
    """int64 ``(n,)``: the window of each, of those that run together."""
    count: int
    """Windows that run together."""
    last: bool = True
    """Whether they are the last tokens of these windows that the module will be given."""

    @classmethod
    def at(cls, ids: torch.Tensor, places: torch.Tensor, *, last: bool = True) -> "Tokens":
        """Choose from ``ids`` ``(windows, tokens)``, counted through from the first window on."""
        count, length = ids.shape
        return cls(ids.flatten()[places], places // length, count, last)

    @classmethod
    def of(cls, ids: torch.Tensor, part: slice = slice(None)) -> "Tokens":
        """Take a ``part`` of every window of ``ids`` ``(windows, tokens)``."""
        places = torch.arange(ids.numel()).view(ids.shape)[:, part]
        return cls.at(ids, places.flatten(), last=part.stop in (None, ids.shape[1]))


ChannelHook = Callable[[int, str, int, Tokens, torch.Tensor], torch.Tensor | None]
"""Called with layer, channel axis, expert (0 in a dense FFN), n tokens and their input of down_proj
``(n, I)``; what it returns, if anything, goes into down_proj instead."""

StatesHook = Callable[[int, torch.Tensor, torch.Tensor], object]
"""Called with layer and the hidden states ``(windows, tokens, D)`` before and after it."""


def _see_nothing(*_: object) -> None:
    """Look at nothing, and change nothing."""


@dataclass(frozen=True)
class LayerHooks:
    """What looks on while a layer computes."""

    channels: ChannelHook = _see_nothing
    states: StatesHook = _see_nothing


NO_HOOKS = LayerHooks()


@dataclass
class Batch:
    """Windows of one length and their hidden states."""

    ids: torch.Tensor
    """int64 ``(windows, tokens)``."""
    states: HiddenStates
    """Of these windows and of others."""
    first: int
    """The row of ``states`` with which they begin."""
    arguments: dict[int, list[Arguments]] = field(default_factory=dict)
    """Number of windows that run together → the arguments of each layer."""

    @property
    def hidden(self) -> torch.Tensor:
        """``(windows, tokens, D)``, what goes into the next layer."""
        rows = self.states.before[self.first : self.first + self.ids.numel()]
        return rows.view(*self.ids.shape, -1)


@dataclass
class Stream:
    """A text on its way through the layers, as one vocabulary cuts it."""

    windows: Sequence[np.ndarray]
    """Token ids of the source's vocabulary."""
    states: HiddenStates = field(default_factory=HiddenStates)
    batches: list[Batch] = field(default_factory=list)
    """One for each length of window."""

    @property
    def tokens(self) -> int:
        """Over all windows."""
        return sum(map(len, self.windows))

    def hidden(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield place in ``windows``, ids ``(tokens,)`` and states ``(tokens, D)`` of each."""
        of_length: dict[int, list[int]] = {}
        for place, window in enumerate(self.windows):
            of_length.setdefault(len(window), []).append(place)
        for batch, places in zip(self.batches, of_length.values(), strict=True):
            yield from zip(places, batch.ids, batch.hidden, strict=True)


@dataclass(frozen=True)
class MicroBatch:
    """Some windows of a batch, by view."""

    batch: Batch
    windows: slice

    @property
    def ids(self) -> torch.Tensor:
        """int64 ``(windows, tokens)``."""
        return self.batch.ids[self.windows]

    @property
    def rows(self) -> slice:
        """Their rows of the batch's states."""
        start = self.batch.first + self.windows.start * self.batch.ids.shape[1]
        return slice(start, start + self.ids.numel())

    def read(self) -> torch.Tensor:
        """Return ``(windows, tokens, D)``, what goes into the next layer."""
        return self.batch.states.before[self.rows].view(*self.ids.shape, -1)

    def write(self, hidden: torch.Tensor) -> None:
        """Keep what the layer made of them."""
        self.batch.states.after[self.rows].view(*self.ids.shape, -1).copy_(hidden)


def micro_batches(
    batches: Sequence[Batch], channels: int, values: int = MICRO_BATCH_VALUES
) -> Iterator[MicroBatch]:
    """Take windows together until an FFN activation has ``values``; one at least."""
    for batch in batches:
        windows, tokens = batch.ids.shape
        step = max(1, values // (tokens * channels))
        for start in range(0, windows, step):
            yield MicroBatch(batch, slice(start, min(start + step, windows)))


def tokens_of(streams: Sequence[Stream], vocab_size: int) -> np.ndarray:
    """Ascending ids that occur.

    Raises:
        DataError: there is no token, or one that is not below ``vocab_size``.
    """
    windows = [window for stream in streams for window in stream.windows]
    used = np.unique(np.concatenate(windows)) if windows else np.zeros(0, dtype=np.int64)
    if not len(used) or used[-1] >= vocab_size:
        raise DataError(
            "`data`",
            "has no token, or one without a row in the embedding",
            expected=f"ids below {vocab_size}",
            found=used[-1] if len(used) else "none",
            fix="give other text",
        )
    return used
