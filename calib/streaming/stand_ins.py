"""Temporary replacements for decoder layers, or for their weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a layer besides the hidden states: masks, rotary tables."""


class CaptureDone(Exception):
    """Ends a forward pass once the last layer's arguments are known."""


class ArgumentCapture(nn.Module):
    """Replaces a layer and keeps the arguments that the model passes to it.

    All other attributes are the layer's.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule, so that it has no weights
        self.last = False

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as attention_type.
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *positional: Any, **named: Any) -> tuple[torch.Tensor]:
        """Keep hidden states and arguments. A tuple also works in models that expect a tensor."""
        hidden = positional[0] if positional else named.pop("hidden_states")
        self.hidden: torch.Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        self.arguments: Arguments = (positional[1:], named)
        if self.last:
            raise CaptureDone
        return (self.hidden,)


class ReplayHidden(nn.Module):
    """Replaces all layers when the output of the last one is known."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self._returns_tuple = returns_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return ``hidden`` as the library's layers return theirs."""
        return (self.hidden,) if self._returns_tuple else self.hidden


@contextmanager
def swapped(layer: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace parameters of ``layer``, by name and with equal shapes, until the block ends."""
    own = {name: layer.get_parameter(name).data for name in weights}
    for name, value in weights.items():
        layer.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in own.items():
            layer.get_parameter(name).data = value
