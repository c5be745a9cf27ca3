"""The tokens whose activations are shown together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


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
