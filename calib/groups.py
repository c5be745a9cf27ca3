"""A text through fewer layers than the model has: some left out, some collapsed into one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from calib.batches import Stream
from calib.collapsed import Collapsed
from calib.decoder import StreamedDecoder

Weights = Callable[[StreamedDecoder, int, nn.Module], Mapping[str, torch.Tensor]]
"""Given a layer's number in the output and the layer, the parameters that are others than its."""


def as_they_are(*_: object) -> dict[str, torch.Tensor]:
    """Change no weights."""
    return {}


class Groups:
    """The layers that a text goes through, and the one that is being collapsed.

    Layers that go are passed by; several that become one take three layers' memory.
    """

    def __init__(self, groups: Sequence[Sequence[int]], weights: Weights = as_they_are) -> None:
        """Take for each layer of the output the source's layers that it is made of."""
        self._of = {n: (number, group) for number, group in enumerate(groups) for n in group}
        self._weights = weights
        self._collapsed: Collapsed | None = None

    def run(self, decoder: StreamedDecoder, index: int, stream: Stream) -> None:
        """Carry ``stream`` through what layer ``index`` completes, if anything."""
        if index not in self._of:
            return
        number, group = self._of[index]
        layer = decoder.layer(index)
        if len(group) > 1 and index == group[0]:
            self._collapsed = Collapsed(layer, decoder.dtypes(index))
        elif self._collapsed is not None:
            self._collapsed.add(layer)
        if index == group[-1]:
            if self._collapsed is not None:
                self._collapsed.round()
                layer, self._collapsed = self._collapsed.layer, None
            weights = self._weights(decoder, number, layer)
            decoder.run(group[0], stream, weights=weights, layer=layer)
