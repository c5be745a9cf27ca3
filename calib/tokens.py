"""The tokens whose activations are shown together."""

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
