"""Windows of text between two layers, and the hooks that see their tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from calib.streaming.hidden_states import HiddenStates, SpilledStates
from calib.streaming.settings import MICRO_BATCH_VALUES
from calib.streaming.stand_ins import Arguments
from surgery.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a micro-batch."""

    ids: torch.Tensor
    """int64 ``(n,)``, on the CPU."""
    windows: torch.Tensor
    """int64 ``(n,)``: the window of each token, counted within the micro-batch."""
    count: int
    """Windows of the micro-batch."""
    last: bool = True
    """Whether the module gets no more tokens of these windows."""

    @classmethod
    def at(cls, ids: torch.Tensor, positions: torch.Tensor, *, last: bool = True) -> "Tokens":
        """Take ``ids`` ``(windows, tokens)`` at ``positions``, indices into the flattened ids."""
        count, length = ids.shape
        return cls(ids.flatten()[positions], positions // length, count, last)

    @classmethod
    def of(cls, ids: torch.Tensor, part: slice = slice(None)) -> "Tokens":
        """Take the ``part`` of every window of ``ids`` ``(windows, tokens)``."""
        positions = torch.arange(ids.numel()).view(ids.shape)[:, part]
        return cls.at(ids, positions.flatten(), last=part.stop in (None, ids.shape[1]))


ChannelHook = Callable[[int, str, int, Tokens, torch.Tensor], torch.Tensor | None]
"""Called with layer, channel axis, expert (0 in a dense FFN), n tokens, and the input of down_proj
``(n, I)``. A tensor that it returns replaces this input."""


@dataclass(frozen=True)
class Routed:
    """What a routed expert puts out for the n tokens that were sent to it."""

    output: torch.Tensor
    """``(n, D)``: f, before the router's weight multiplies it. Where the weight multiplies the
    expert's input instead, as in Llama 4, f is what is added to the other experts' outputs."""
    gate: torch.Tensor
    """``(n,)``: g, the weight that the router gives the expert, as the model normalizes it."""
    factor: torch.Tensor
    """``(n,)``: what f is multiplied by before it is added: g, or 1 as in Llama 4."""


RoutedHook = Callable[[int, int, Tokens, Routed], object]
"""Called with layer, expert, its n tokens, and what it puts out for them."""

StatesHook = Callable[[int, torch.Tensor, torch.Tensor], object]
"""Called with the layer and the hidden states ``(windows, tokens, D)`` before and after it."""


def _no_hook(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class LayerHooks:
    """Hooks that run while a layer computes."""

    channels: ChannelHook = _no_hook
    states: StatesHook = _no_hook
    routed: RoutedHook | None = None


NO_HOOKS = LayerHooks()


@dataclass(frozen=True)
class Branches:
    """What a window holds: tokens that several texts begin with, then what follows in each."""

    trunk: int
    """Tokens that all texts begin with."""
    lengths: tuple[int, ...] = ()
    """Tokens of each branch, in their order."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 ``(tokens,)``: the place of each token in its own text."""
        after = [torch.arange(self.trunk, self.trunk + length) for length in self.lengths]
        return torch.cat([torch.arange(self.trunk), *after])

    @property
    def numbers(self) -> torch.Tensor:
        """int64 ``(tokens,)``: the branch of each token; −1 in the trunk."""
        after = [torch.full((n,), number) for number, n in enumerate(self.lengths)]
        return torch.cat([torch.full((self.trunk,), -1), *after])


def seen(numbers: torch.Tensor) -> torch.Tensor:
    """Return, from ``Branches.numbers``, whether each token attends to another.

    It does where that one is earlier in its own text: bool ``(…, tokens, tokens)``.
    """
    same = numbers[..., :, None] == numbers[..., None, :]
    return torch.tril((numbers == -1)[..., None, :] | same)


@dataclass
class Batch:
    """Windows of one length and their hidden states."""

    ids: torch.Tensor
    """int64 ``(windows, tokens)``."""
    states: HiddenStates
    """Of all windows of the stream."""
    first: int
    """The first row of ``states`` that belongs to these windows."""
    arguments: dict[int, list[Arguments]] = field(default_factory=dict)
    """Windows of a micro-batch → the arguments of each layer."""
    passed_on: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """First window of a micro-batch → what the last layer returned beside its hidden states; of an
    encoder with a decoder, the windows of a micro-batch →."""
    branches: Sequence[Branches] = ()
    """As in ``Stream``."""

    @property
    def hidden(self) -> torch.Tensor:
        """The input of the next layer, ``(windows, tokens, D)``."""
        rows = self.states.before[self.first : self.first + self.ids.numel()]
        return rows.view(*self.ids.shape, -1)


@dataclass
class Stream:
    """A text that passes through the layers, tokenized by one vocabulary."""

    windows: Sequence[np.ndarray]
    """Token ids of the source's vocabulary."""
    states: HiddenStates = field(default_factory=HiddenStates)
    batches: list[Batch] = field(default_factory=list)
    """One for each window length."""
    branches: Sequence[Branches] = ()
    """What each window holds, where windows hold several texts."""

    @property
    def tokens(self) -> int:
        """Over all windows."""
        return sum(map(len, self.windows))

    def hidden(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield of each window its index, its ids ``(tokens,)`` and states ``(tokens, D)``."""
        of_length: dict[int, list[int]] = {}
        for index, window in enumerate(self.windows):
            of_length.setdefault(len(window), []).append(index)
        for batch, indices in zip(self.batches, of_length.values(), strict=True):
            yield from zip(indices, batch.ids, batch.hidden, strict=True)


@contextmanager
def spilled(streams: Sequence[Stream], spill: Path | None) -> Iterator[None]:
    """Keep the hidden states of ``streams`` in files in ``spill``; in memory where it is None."""
    if spill is None:
        yield
        return
    with TemporaryDirectory(".hidden", "trials.", spill) as folder:
        for number, stream in enumerate(streams):
            directory = Path(folder) / str(number)
            directory.mkdir()
            stream.states = SpilledStates(directory)
        yield


@dataclass(frozen=True)
class MicroBatch:
    """Windows of a batch that run together; its tensors are views."""

    batch: Batch
    windows: slice

    @property
    def ids(self) -> torch.Tensor:
        """int64 ``(windows, tokens)``."""
        return self.batch.ids[self.windows]

    @property
    def rows(self) -> slice:
        """The rows of the batch's states that belong to these windows."""
        start = self.batch.first + self.windows.start * self.batch.ids.shape[1]
        return slice(start, start + self.ids.numel())

    def read(self) -> torch.Tensor:
        """Return the input of the next layer, ``(windows, tokens, D)``."""
        return self.batch.states.before[self.rows].view(*self.ids.shape, -1)

    def write(self, hidden: torch.Tensor) -> None:
        """Store the output of the layer, ``(windows, tokens, D)``."""
        self.batch.states.after[self.rows].view(*self.ids.shape, -1).copy_(hidden)


def micro_batches(
    batches: Sequence[Batch], channels: int, values: int = MICRO_BATCH_VALUES
) -> Iterator[MicroBatch]:
    """Group windows so that an FFN activation has at most ``values``; one window at least."""
    for batch in batches:
        windows, tokens = batch.ids.shape
        step = max(1, values // (tokens * channels))
        for start in range(0, windows, step):
            yield MicroBatch(batch, slice(start, min(start + step, windows)))


def tokens_of(streams: Sequence[Stream], vocab_size: int) -> np.ndarray:
    """Return the ids that occur, ascending.

    Raises:
        DataError: there is no token, or an id is not below ``vocab_size``.
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
