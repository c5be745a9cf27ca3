"""A text on its way through the dense model, and what it shows of a layer's channels."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder
from calib.down import Place
from calib.gram import Gram
from calib.norms import weight_norms
from calib.sums import ChannelSums
from calib.tokens import Tokens
from surgery.layout import Layout
from surgery.stats import AxisSums

GATE_EVERY = 8
"""One window in so many decides whether a refitted down_proj is used; the others fit it."""


class Reading:
    """Windows as one vocabulary cuts them; what they show is kept for one layer at a time."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[np.ndarray],
        buckets: tuple[np.ndarray, int],
        *,
        refits: bool,
    ) -> None:
        """Take ``windows`` of ids of the source.

        Args:
            layout: The model.
            windows: Token ids.
            buckets: int64 ``[V]``, the bucket of each token, and how many there are: one, or two
                of which the tokens of the second do not count.
            refits: Whether Gram matrices are taken, too.
        """
        self._layout = layout
        self._buckets = torch.from_numpy(buckets[0])
        self._count = buckets[1]
        self.weights = np.array([1.0, 0.0][: self._count])
        """What the tokens of each bucket count."""
        gate = [w for n, w in enumerate(windows) if refits and n % GATE_EVERY == GATE_EVERY - 1]
        fit = [w for n, w in enumerate(windows) if not refits or n % GATE_EVERY < GATE_EVERY - 1]
        self.streams = [Stream(part) for part in (fit, gate) if part]
        self._refits = refits
        self.sums: dict[str, AxisSums] = {}
        self.grams: list[dict[Place, Gram]] = []
        """For fitting, and for the gate where the text is long enough to have one."""

    def measure(self, decoder: StreamedDecoder, index: int) -> None:
        """Carry the windows through a layer and take ``sums`` and ``grams`` of it."""
        layout, device = self._layout, decoder.reader.device
        norms = weight_norms(decoder.layer(index), decoder.units(index))
        sums = {
            axis: ChannelSums(self._count, experts, layout.channels_of(axis), device)
            for axis, experts in layout.watched[index].items()
        }
        self.grams = []
        for stream in self.streams:
            grams: dict[Place, Gram] = {}
            decoder.run(index, stream, partial(self._see, sums, grams))
            self.grams.append(grams)
        self.sums = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}

    def forget(self) -> None:
        """Free what the layer has shown."""
        self.sums, self.grams = {}, []

    def _see(
        self,
        sums: dict[str, ChannelSums],
        grams: dict[Place, Gram],
        layer: int,
        axis: str,
        expert: int,
        tokens: Tokens,
        act: torch.Tensor,
    ) -> None:
        buckets = self._buckets[tokens.ids]
        sums[axis].add(expert, tokens, buckets, act)
        if not self._refits:
            return
        if self._count > 1:
            act = act[(buckets < self._count - 1).to(act.device)]
        if (axis, expert) not in grams:
            grams[axis, expert] = Gram(act.shape[1], act.device)
        grams[axis, expert].add(act)
