"""What stands in for decoder layers: to learn what they are given, or when they are done."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What the model passes to a layer beside the hidden states: masks, rotary tables."""


class Recorded(Exception):
    """Ends a forward once the last layer's arguments are known."""


class Recorder(nn.Module):
    """Stands in for a layer and keeps what the model passes to it; else it is that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: the recorder has no weights
        self.last = False

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for things such as attention_type.
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *positional: Any, **named: Any) -> tuple[torch.Tensor]:
        """Keep hidden states and arguments; a tuple serves models that expect one, too."""
        hidden = positional[0] if positional else named.pop("hidden_states")
        self.hidden: torch.Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        self.arguments: Arguments = (positional[1:], named)
        if self.last:
            raise Recorded
        return (self.hidden,)


class Finished(nn.Module):
    """Stands in for all layers when what leaves the last one is known."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self._returns_tuple = returns_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return ``hidden`` as the library's layers return theirs."""
        return (self.hidden,) if self._returns_tuple else self.hidden
