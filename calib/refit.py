"""down_proj refitted to the channels that are kept, by least squares."""

from collections.abc import Iterator, Sequence

import torch

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import FfnModule, down_matrices, down_name

RIDGE = 1e-3
"""λ in parts of the mean diagonal of G[K, K].

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens) the loss was 18.0 % of the dense model's bits with
1e-3 and with 1e-5, 33.1 % without refitting.
"""


ROWS = 1024
"""Rows of matrices that go through float64 at a time."""


class Gram:
    """Sums over tokens, float32, added up a few thousand tokens at a time."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.inner = torch.zeros((channels, channels), device=device)
        """G = Σ aᵀa: ``[I, I]``."""
        self.drift: torch.Tensor | None = None
        """Σ dᵀa: ``[D, I]`` of what is wanted beside W a, if anything is."""

    def add(self, act: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Add activations ``(tokens, I)`` and what is wanted beside W a ``(tokens, D)``."""
        act = act.float()
        self.inner.addmm_(act.T, act)
        if wanted is not None:
            if self.drift is None:
                self.drift = act.new_zeros((wanted.shape[1], act.shape[1]))
            self.drift.addmm_(wanted.float().T, act)


def equations(
    weight: torch.Tensor, gram: Gram, kept: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G[K, K] + λI, float64 ``[K, K]``, and W_R · G[R, K] + Σ dᵀa_K, ``[D, K]``.

    R are the channels that go. Behind this the sums are not needed any more.

    Args:
        weight: W, ``[D, I]``.
        gram: Of ``I`` channels.
        kept: int64 ``(K,)``, ascending.
        ridge: λ over the mean diagonal of G[K, K].
    """
    goes = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    goes[kept] = False
    gone = torch.nonzero(goes).flatten()
    wanted = weight[:, gone].float() @ gram.inner[gone[:, None], kept]
    if gram.drift is not None:
        wanted += gram.drift[:, kept]
    inner = torch.empty((len(kept), len(kept)), dtype=torch.float64, device=weight.device)
    for into, rows in zip(inner.split(ROWS), kept.split(ROWS), strict=True):
        into.copy_(gram.inner[rows[:, None], kept])
    diagonal = inner.diagonal()
    diagonal += ridge * diagonal.mean() + torch.finfo(torch.float32).tiny
    return inner, wanted


def solve(
    weight: torch.Tensor, kept: torch.Tensor, inner: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the down_proj ``[D, K]`` that does on ``kept`` channels what is wanted of all.

    It minimizes Σ ‖W a + d − W′ a_K‖² + λ ‖W′ − W_K‖²: W′ = W_K + ``wanted`` · ``inner``⁻¹, both
    from ``equations``.
    """
    factor = torch.linalg.cholesky(inner)
    del inner
    result = weight[:, kept].float()
    for rows, goal in zip(result.split(ROWS), wanted.split(ROWS), strict=True):
        rows += torch.cholesky_solve(goal.double().T, factor).T.float()
    return result


def refit(
    weight: torch.Tensor, gram: Gram, kept: torch.Tensor, ridge: float = RIDGE
) -> torch.Tensor:
    """``solve`` the ``equations``."""
    return solve(weight, kept, *equations(weight, gram, kept, ridge))


def error(weight: torch.Tensor, cut: torch.Tensor, kept: torch.Tensor, gram: Gram) -> float:
    """Σ ‖W a + d − W′ a_K‖² − ‖d‖² over the tokens of ``gram``; shapes as for ``refit``."""
    missing = weight.float().clone()
    missing[:, kept] -= cut.float()
    total = (missing @ gram.inner * missing).sum(dtype=torch.float64)
    if gram.drift is not None:
        total += 2 * (gram.drift * missing).sum(dtype=torch.float64)
    return float(total)


def refit_if_better(
    weight: torch.Tensor, kept: torch.Tensor, grams: Sequence[Gram], dtype: torch.dtype
) -> torch.Tensor | None:
    """Return ``refit`` by the first of ``grams``, rounded to ``dtype``; None where that is no gain.

    Args:
        weight: ``[D, I]``.
        kept: int64 ``(K,)``.
        grams: For fitting, and of other windows to judge by; with one alone it judges itself.
        dtype: What the file can hold.
    """
    fitted = refit(weight, grams[0], kept).to(dtype)
    judge = grams[-1]
    before, after = weight[:, kept], fitted
    helps = error(weight, after, kept, judge) < error(weight, before, kept, judge)
    return fitted if helps else None


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
        ffn_module: FfnModule,
        kept: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """Return the only FFN's down_proj ``[D, K]``, rounded to ``dtype``, or None for no gain.

        The dense model has passed the layer, this has not yet. What is wanted beside W a is
        ``PULL`` times what the residual stream has drifted from the dense model's, where the layer
        adds W a to it: not behind a norm, for example.
        """
        weight = decoder.layer(index).get_parameter(down_name(ffn_module)).data
        (matrix,) = down_matrices(decoder.layer(index), ffn_module, weight)
        pull = PULL if self._adds(decoder, index, ffn_module, matrix) else 0.0
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

    def _adds(
        self, decoder: StreamedDecoder, index: int, ffn_module: FfnModule, matrix: torch.Tensor
    ) -> bool:
        """Whether a layer's result changes by W a where W becomes zero, on some windows."""
        weight = decoder.layer(index).get_parameter(down_name(ffn_module)).data
        nothing = {down_name(ffn_module): torch.zeros_like(weight)}
        _, act, after = next(decoder.peek(index, self.streams[0]))
        _, _, without = next(decoder.peek(index, self.streams[0], nothing))
        expected = act.float() @ matrix.float().T
        missed = (after.float() - without.float() - expected).norm(dim=-1)
        return bool((missed <= ADDITIVE * expected.norm(dim=-1)).float().mean() >= 0.5)
