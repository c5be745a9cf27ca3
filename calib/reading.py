"""A text on its way through the dense model, and what it shows of a layer's channels."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder
from calib.down import Place
from calib.ffn import Unit
from calib.gram import Gram
from calib.influence import cosine_sum
from calib.norms import weight_norms
from calib.sums import ChannelSums
from calib.tokens import ChannelHook, LayerHooks, Tokens
from surgery.layout import Layout
from surgery.stats import AxisSums

GATE_EVERY = 8
"""One window in so many decides whether a refitted down_proj is used; the others fit it."""


def has_one_ffn(units: Sequence[Unit]) -> bool:
    """Whether a layer has one FFN that all tokens see.

    Such a layer is refitted on what the layers before it have become; experts, and FFNs beside one
    another, on what the dense model gives them.
    """
    return len(units) == 1 and not units[0].routed


class Reading:
    """Windows as one vocabulary cuts them; what they show is kept for one layer at a time."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[np.ndarray],
        bucket_of: np.ndarray,
        edges: Sequence[int],
        *,
        refits: bool = False,
    ) -> None:
        """Take ``windows`` of ids of the source.

        Args:
            layout: The model.
            windows: Token ids.
            bucket_of: int64 ``[V]``, the bucket of each token.
            edges: Ranks of rarity at which buckets end, ascending; the last is V.
            refits: Whether some windows are to judge refitted matrices, and Gram matrices are
                taken in layers that do not have one FFN.
        """
        self._layout = layout
        self._buckets = torch.from_numpy(bucket_of)
        self._edges = np.array(edges)
        gate = [w for n, w in enumerate(windows) if refits and n % GATE_EVERY == GATE_EVERY - 1]
        fit = [w for n, w in enumerate(windows) if not refits or n % GATE_EVERY < GATE_EVERY - 1]
        self.streams = [Stream(part) for part in (fit, gate) if part]
        self._refits = refits
        self.sums: dict[str, AxisSums] = {}
        self.cosines: list[float] = []
        """Per layer passed, Σ cos(x_in, x_out) over the tokens."""
        self.grams: list[dict[Place, Gram]] = []
        """For fitting, and for the gate where the text is long enough to have one."""

    def weights(self, vocab_size: int) -> np.ndarray:
        """float64 ``[buckets]``: 1 for tokens that stay at V' (paper eq. 5), one of the edges."""
        if len(self._edges) == 1:  # all tokens that there are stay
            return np.ones(1)
        return (self._edges <= vocab_size).astype(np.float64)

    def measure(self, decoder: StreamedDecoder, index: int) -> None:
        """Carry the windows through a layer and take ``sums`` and ``grams`` of it."""
        layout, device = self._layout, decoder.reader.device
        norms = weight_norms(decoder.layer(index), decoder.units(index))
        sums = {
            axis: ChannelSums(len(self._edges), experts, layout.channels_of(axis), device)
            for axis, experts in layout.watched[index].items()
        }
        needed = self._refits and not has_one_ffn(decoder.units(index))
        self.grams = [{} for _ in self.streams if needed]
        self.cosines.append(0.0)
        for stream, grams in zip_longest(self.streams, self.grams):
            hooks = LayerHooks(self._hook(sums, grams), self._compare)
            decoder.run(index, stream, hooks)
        self.sums = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}

    def forget(self) -> None:
        """Free what the layer has shown."""
        self.sums, self.grams = {}, []

    @property
    def block_influence(self) -> np.ndarray:
        """float64 ``[L]``: 1 − mean cosine (ShortGPT, arXiv 2403.03853)."""
        return 1 - np.array(self.cosines) / sum(stream.tokens for stream in self.streams)

    def _compare(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.cosines[-1] += cosine_sum(before, after)

    def _hook(self, sums: dict[str, ChannelSums], grams: dict[Place, Gram] | None) -> ChannelHook:
        """What adds up activations to ``sums``, and to ``grams`` where there are some."""

        def see(layer: int, axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
            sums[axis].add(expert, tokens, self._buckets[tokens.ids], act)
            if grams is None:
                return
            if (axis, expert) not in grams:
                grams[axis, expert] = Gram(act.shape[1], act.device)
            grams[axis, expert].add(act)

        return see
