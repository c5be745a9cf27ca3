"""Calibration text through what the layers so far have become, to refit the next one on."""

import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder
from calib.down import down_matrices, down_name
from calib.ffn import Unit
from calib.gram import Gram
from calib.reading import Reading

PULL = 0.5
"""How much of the way back to the dense model's residual stream a refitted layer is asked to go.

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens): 0 gave a loss of 18.0 %, 0.5 15.6 %, 1 16.6 %; at
V' 49,152, I' 1,024 (41k tokens): 0.3 6.1 %, 0.5 5.9 %, without a pruned prefix 7.7 %.
"""

ADDITIVE = 0.25
"""Largest relative error, for half of the tokens, at which a layer still adds W a to its input."""


class Prefix:
    """The windows of a reading, which shows the dense model's states of the same tokens."""

    def __init__(self, reading: Reading) -> None:
        self.streams = [Stream(stream.windows) for stream in reading.streams]
        self._dense = [stream.states for stream in reading.streams]

    def grams(self, decoder: StreamedDecoder, index: int, unit: Unit) -> list[Gram]:
        """Sums for fitting and for the gate, the reading having passed the layer, this not yet.

        What is wanted beside W a is ``PULL`` times what the residual stream has drifted from the
        dense model's, where the layer adds W a to it: not behind a norm, for example.
        """
        additive = self._adds(decoder, index, unit)
        found = []
        for stream, dense in zip(self.streams, self._dense, strict=True):
            gram = None
            for rows, act, after in decoder.peek(index, stream):
                gram = gram or Gram(act.shape[1], act.device)
                drift = PULL * (dense.before[rows].to(after.device) - after) if additive else None
                dense.give_back(rows)
                gram.add(act, drift)
            if gram is not None:
                found.append(gram)
        return found

    def advance(
        self, decoder: StreamedDecoder, index: int, weights: dict[str, torch.Tensor]
    ) -> None:
        """Carry the windows through the layer as the cut leaves it."""
        for stream in self.streams:
            decoder.run(index, stream, weights=weights)

    def _adds(self, decoder: StreamedDecoder, index: int, unit: Unit) -> bool:
        """Whether a layer's result changes by W a where W becomes zero, on some windows."""
        weight = decoder.layer(index).get_parameter(down_name(unit)).data
        nothing = {down_name(unit): torch.zeros_like(weight)}
        _, act, after = next(decoder.peek(index, self.streams[0]))
        _, _, without = next(decoder.peek(index, self.streams[0], nothing))
        (matrix,) = down_matrices(decoder.layer(index), unit, weight)
        expected = act.float() @ matrix.float().T
        missed = (after.float() - without.float() - expected).norm(dim=-1)
        return bool((missed <= ADDITIVE * expected.norm(dim=-1)).float().mean() >= 0.5)
