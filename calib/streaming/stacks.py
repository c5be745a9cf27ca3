"""The lists of layers in the library's model: one, or an encoder's and a decoder's."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from calib.streaming.stand_ins import (
    ENCODED,
    ArgumentCapture,
    Arguments,
    CaptureDone,
    ReplayHidden,
    with_values,
)


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


def shifted(ids: torch.Tensor, start: int | None) -> torch.Tensor:
    """Return what a decoder reads of windows that its encoder reads, int64 ``(windows, tokens)``.

    It is the same text one token later, after the token that begins every output. Where config.json
    names none, the last token of the window begins it, as in mBART's own training.
    """
    first = ids[:, -1:] if start is None else torch.full_like(ids[:, :1], start)
    return torch.cat([first, ids[:, :-1]], dim=1)


def capture_both(
    encoder: Stack, decoder: Stack, *, given: Sequence[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, list[Arguments]]:
    """Capture hidden states and arguments of both stacks; ``given`` is what each is run on.

    Returns:
        Hidden states ``(windows, tokens, D)`` before the encoder's first layer, and before the
        decoder's. Arguments of all layers, in which ENCODED stands for what the encoder makes of
        the text.
    """
    of_encoder, first = encoder.capture(lambda: encoder.parent(**given[0]))
    encoded = torch.zeros_like(of_encoder)
    of_decoder, others = decoder.capture(
        lambda: decoder.parent(**given[1], encoder_hidden_states=encoded, use_cache=False)
    )
    crossing = [with_values(each, lambda v: ENCODED if v is encoded else v) for each in others]
    return of_encoder, of_decoder, [*first, *crossing]
