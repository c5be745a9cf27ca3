"""Temporary replacements for decoder layers, alone or in their list, or for their weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a layer besides the hidden states: masks, rotary tables."""


@dataclass(frozen=True)
class PassedOn:
    """Stands for what a layer returns beside the hidden states, and the next one takes."""

    place: int
    """Its index in what the layer returns."""


class Encoded:
    """Stands for the states that an encoder makes of the text, and a decoder's layer takes."""


ENCODED = Encoded()


class Ids:
    """Stands for the tokens that a layer runs on, where it looks them up in a table of its own."""


IDS = Ids()


class Mask:
    """Stands for the mask of windows that hold several texts: of all windows it would be large."""


MASK = Mask()


class CaptureDone(Exception):
    """Ends a forward pass once the last layer's arguments are known."""


class StandIn(nn.Module):
    """Replaces a layer; all attributes that it lacks are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule, so that it has no weights

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as attention_type.
        return getattr(self.__dict__["_layer"], name)


class ArgumentCapture(StandIn):
    """Replaces a layer and keeps the arguments that the model passes to it."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """Return as many ``outputs`` as the model takes apart; 0: hidden states in no tuple."""
        super().__init__(layer)
        self.last, self._outputs = False, outputs
        self._passed_on = tuple(PassedOn(place) for place in range(1, outputs))

    def forward(self, *positional: Any, **named: Any) -> torch.Tensor | tuple[Any, ...]:
        """Keep hidden states and arguments. A tuple also works in most models without one."""
        hidden = positional[0] if positional else named.pop("hidden_states")
        self.hidden: torch.Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        self.arguments: Arguments = (positional[1:], named)
        if self.last:
            raise CaptureDone
        return (self.hidden, *self._passed_on) if self._outputs else self.hidden


class ReplayHidden(StandIn):
    """Replaces all layers when the output of the last one is known."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """Return as many ``outputs`` as the layer does; 1 is a tensor alone."""
        super().__init__(layer)
        self.hidden = torch.empty(0)
        self._nothing = (None,) * (outputs - 1)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return ``hidden`` as the library's layers return theirs."""
        return (self.hidden, *self._nothing) if self._nothing else self.hidden


class Stack:
    """A list of layers that run one after the other, in the module that runs them."""

    def __init__(self, model: Any, paths: Sequence[str], outputs: int) -> None:
        """Take the layers at ``paths``, of which the model takes apart ``outputs`` values each."""
        parent, _, self._name = paths[0].rpartition(".")[0].rpartition(".")
        self.parent: Any = model.get_submodule(parent)
        """The module that has the list; of an encoder with a decoder, one of these."""
        self.layers: list[nn.Module] = list(getattr(self.parent, self._name))
        self._captures = [ArgumentCapture(layer, outputs) for layer in self.layers]
        self._captures[-1].last = True
        self._put(self._captures)

    def _put(self, layers: Sequence[nn.Module]) -> None:
        setattr(self.parent, self._name, nn.ModuleList(layers))

    def capture(self, forward: Callable[[], object]) -> tuple[torch.Tensor, list[Arguments]]:
        """Run ``forward`` up to the last layer.

        Returns:
            The hidden states before the first layer, and the arguments of each.
        """
        with suppress(CaptureDone):
            forward()
        return self._captures[0].hidden, [capture.arguments for capture in self._captures]

    def replay(self, hidden: torch.Tensor, outputs: int, forward: Callable[[], Any]) -> Any:
        """Run ``forward`` with ``hidden`` as what the last layer gives, among its ``outputs``."""
        replay = ReplayHidden(self.layers[0], outputs)
        replay.hidden = hidden
        self._put([replay])
        try:
            return forward()
        finally:
            self._put(self._captures)


def with_values(arguments: Arguments, find: Callable[[Any], Any]) -> Arguments:
    """Return ``arguments`` with what ``find`` makes of each."""
    positional, named = arguments
    return tuple(map(find, positional)), {key: find(value) for key, value in named.items()}


def has_value(arguments: Arguments, wanted: Any) -> bool:
    """Whether ``wanted`` itself is one of the ``arguments``."""
    positional, named = arguments
    return any(value is wanted for value in (*positional, *named.values()))


def takes_passed(arguments: Arguments) -> bool:
    """Whether a layer takes what the layer before returns beside the hidden states."""
    positional, named = arguments
    return any(isinstance(value, PassedOn) for value in (*positional, *named.values()))


@contextmanager
def swapped(layer: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace tensors of ``layer``, by name, until the block ends."""
    own = {name: held_tensor(layer, name).data for name in weights}
    for name, value in weights.items():
        held_tensor(layer, name).data = value
    try:
        yield
    finally:
        for name, value in own.items():
            held_tensor(layer, name).data = value


def held_tensor(layer: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter or buffer ``name`` of a layer."""
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(layer.get_submodule(path), leaf)
    return tensor


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Let a module put out zeros until the block ends."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _MaskedLinear(TorchFunctionMode):
    """Lets every linear map give −inf at some positions of its output."""

    def __init__(self, masked: torch.Tensor) -> None:
        super().__init__()
        self._masked = masked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        return result.index_fill(-1, self._masked.to(result.device), -torch.inf)


@contextmanager
def masked_router(
    layer: nn.Module, routers: Mapping[str, int], removed: torch.Tensor
) -> Iterator[None]:
    """Let the router of a layer choose none of the experts ``removed`` until the block ends.

    Their logits are −inf, and so are their entries in biases, which are added to logits or to the
    scores of the choice. This is how a model without them chooses, whatever its router computes.

    Args:
        layer: The library's decoder layer.
        routers: Name of each tensor of the router → its dimension that counts experts.
        removed: int64 ``(n,)``.
    """
    biases, modules = {}, []
    for name, dim in routers.items():
        tensor = held_tensor(layer, name)
        if name.endswith(".weight"):
            modules.append(layer.get_submodule(name.removesuffix(".weight")))
        else:
            at = removed.to(tensor.device)
            biases[name] = tensor.data.index_fill(dim, at, -torch.inf)

    def masked(forward: Any) -> Any:
        def run(*positional: Any, **named: Any) -> Any:
            with _MaskedLinear(removed):
                return forward(*positional, **named)

        return run

    with swapped(layer, biases):
        for module in modules:
            module.forward = masked(module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward
