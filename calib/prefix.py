"""Calibration text through what the layers so far have become, to refit the next one on."""

from collections.abc import Iterator, Sequence

import torch

from calib.batches import Stream
from calib.decoder import StreamedDecoder
from calib.down import down_matrices, down_name
from calib.ffn import Unit
from calib.gram import Gram, equations, solve

PULL = 0.5
"""How much of the way back to the dense model's residual stream a refitted layer is asked to go.

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens): 0 gave a loss of 18.0 %, 0.5 15.6 %, 1 16.6 %; at
V' 49,152, I' 1,024 (41k tokens): 0.3 6.1 %, 0.5 5.9 %, without a pruned prefix 7.7 %.
"""

ADDITIVE = 0.25
"""Largest relative error, for half of the tokens, at which a layer still adds W a to its input."""


class Prefix:
    """Windows that go through the pruned layers, beside the same ones in the dense model."""

    def __init__(self, dense: Sequence[Stream]) -> None:
        """Take the windows of ``dense``: those that fit, then those that judge."""
        self.streams = [Stream(stream.windows) for stream in dense]
        self._dense = dense

    def refit(
        self,
        decoder: StreamedDecoder,
        index: int,
        unit: Unit,
        kept: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """Return the only FFN's down_proj ``[D, K]``, rounded to ``dtype``, or None for no gain.

        The dense model has passed the layer, this has not yet. What is wanted beside W a is
        ``PULL`` times what the residual stream has drifted from the dense model's, where the layer
        adds W a to it: not behind a norm, for example.
        """
        weight = decoder.layer(index).get_parameter(down_name(unit)).data
        (matrix,) = down_matrices(decoder.layer(index), unit, weight)
        pull = PULL if self._adds(decoder, index, unit, matrix) else 0.0
        gram = Gram(matrix.shape[1], matrix.device)
        for act, drift in self._tokens(decoder, index, 0):
            gram.add(act, pull * drift if pull else None)
        inner, wanted = equations(matrix, gram, kept)
        del gram
        fitted = solve(matrix, kept, inner, wanted).to(dtype)
        errors = [0.0, 0.0]
        for act, drift in self._tokens(decoder, index, -1):
            goal, part = act @ matrix.T + pull * drift, act[:, kept]
            for place, candidate in enumerate((matrix[:, kept], fitted.to(matrix.dtype))):
                errors[place] += float((goal - part @ candidate.T).float().square().sum())
        return fitted if errors[1] < errors[0] else None

    def advance(
        self, decoder: StreamedDecoder, index: int, weights: dict[str, torch.Tensor]
    ) -> None:
        """Carry the windows through the layer as the cut leaves it."""
        for stream in self.streams:
            decoder.run(index, stream, weights=weights)

    def _tokens(
        self, decoder: StreamedDecoder, index: int, which: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield activations ``(tokens, I)`` and how far the layer's results lie from the dense
        model's ``(tokens, D)``: of the windows that fit, or of those that judge."""
        dense = self._dense[which].states
        for rows, act, after in decoder.peek(index, self.streams[which]):
            yield act, dense.before[rows].to(after.device) - after
            dense.give_back(rows)

    def _adds(self, decoder: StreamedDecoder, index: int, unit: Unit, matrix: torch.Tensor) -> bool:
        """Whether a layer's result changes by W a where W becomes zero, on some windows."""
        weight = decoder.layer(index).get_parameter(down_name(unit)).data
        nothing = {down_name(unit): torch.zeros_like(weight)}
        _, act, after = next(decoder.peek(index, self.streams[0]))
        _, _, without = next(decoder.peek(index, self.streams[0], nothing))
        expected = act.float() @ matrix.float().T
        missed = (after.float() - without.float() - expected).norm(dim=-1)
        return bool((missed <= ADDITIVE * expected.norm(dim=-1)).float().mean() >= 0.5)
