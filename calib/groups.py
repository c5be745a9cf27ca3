"""A text through fewer layers than the model has: some left out, some collapsed into one."""

from collections.abc import Sequence

import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder


class Groups:
    """Which layers a text goes through, and the collapsed weights in the making."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        """Take for each layer that is left the source's layers that it is made of."""
        self._of = {layer: group for group in groups for layer in group}
        self._collapsed: dict[str, torch.Tensor] = {}

    def run(self, decoder: StreamedDecoder, index: int, stream: Stream) -> None:
        """Carry ``stream`` through what layer ``index`` completes, if anything."""
        group = self._of.get(index, ())
        if len(group) > 1:
            self._collapse(decoder, index, len(group), first=index == group[0])
        if group and index == group[-1]:
            decoder.run(index, stream, weights=self._collapsed)
            self._collapsed = {}

    def _collapse(self, decoder: StreamedDecoder, index: int, count: int, *, first: bool) -> None:
        """Add a layer to W + Σ (W_k − W), the sum over the others (LaCo, arXiv 2402.11187)."""
        for name, weight in decoder.layer(index).named_parameters():
            if first:
                self._collapsed[name] = weight.data * (2 - count)
            else:
                self._collapsed[name] += weight.data
