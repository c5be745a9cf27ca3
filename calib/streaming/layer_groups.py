"""Run a text through fewer layers: some are removed, some collapsed into one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import torch
from torch import nn

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.weights import TORCH_DTYPE


class CollapsedLayer:
    """W + Σ (W_k − W) over the other layers (LaCo, arXiv 2402.11187), in the layers' dtype."""

    def __init__(self, first: nn.Module, dtypes: Mapping[str, str]) -> None:
        """Start with the first layer.

        Args:
            first: The layer that the others are added to; it is copied.
            dtypes: Parameter → safetensors dtype in the file. Other parameters remain unchanged.
        """
        self.layer = deepcopy(first)
        state = self.layer.state_dict()
        self._dtypes = {name: dtype for name, dtype in dtypes.items() if name in state}
        self._first = {name: state[name].clone() for name in self._dtypes}

    @torch.no_grad()
    def add(self, other: nn.Module) -> None:
        """Add the difference between another layer and the first."""
        total, terms = self.layer.state_dict(), other.state_dict()
        for name, first in self._first.items():
            total[name] += terms[name] - first

    @torch.no_grad()
    def round(self) -> None:
        """Round once to the file's dtype, to nearest even."""
        total = self.layer.state_dict()
        for name, dtype in self._dtypes.items():
            total[name].copy_(total[name].to(TORCH_DTYPE[dtype]))


Change = Callable[[StreamedDecoder, int, nn.Module], AbstractContextManager[object]]
"""Called with the decoder, a layer's index in the output, and the layer, which it changes while the
layer runs."""


def unchanged(*_: object) -> AbstractContextManager[None]:
    """Change nothing."""
    return nullcontext()


class LayerGroups:
    """Runs a text through the kept layers of a model, and collapses the groups among them.

    Removed layers are skipped. Collapsing takes the memory of three layers.
    """

    def __init__(self, groups: Sequence[Sequence[int]], change: Change = unchanged) -> None:
        """Take, for each layer of the output, the source's layers that it is made of."""
        self._group_of = {n: (number, group) for number, group in enumerate(groups) for n in group}
        self._change = change
        self._collapsed: CollapsedLayer | None = None

    def run(self, decoder: StreamedDecoder, index: int, *streams: Stream) -> None:
        """Run texts through the output layer that source layer ``index`` completes, if any."""
        if index not in self._group_of:
            return
        number, group = self._group_of[index]
        layer = decoder.layer(index)
        if len(group) > 1 and index == group[0]:
            self._collapsed = CollapsedLayer(layer, decoder.dtypes(index))
        elif self._collapsed is not None:
            self._collapsed.add(layer)
        if index == group[-1]:
            if self._collapsed is not None:
                self._collapsed.round()
                layer, self._collapsed = self._collapsed.layer, None
            with self._change(decoder, number, layer):
                for stream in streams:
                    decoder.run(group[0], stream, layer=layer)
