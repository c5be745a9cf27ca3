"""down_proj refitted to the channels that are kept, by least squares."""

from collections.abc import Iterator, Sequence

import torch

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import FfnModule, down_matrices, down_name

RIDGE = 1e-3
"""λ in parts of the mean diagonal of G[K, K].

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens) the loss was 18.0 % of the dense model's bits with
1e-3 and with 1e-5, and 33.1 % without refitting.
"""


ROWS = 1024
"""Rows of a matrix that are converted to float64 at a time."""


class GramSums:
    """Sums of outer products over tokens, in float32, a few thousand tokens at a time.

    ``a`` are the activations of a token and ``d`` its drift: what the refitted down_proj should add
    to W a, if anything.
    """

    def __init__(
        self, channels: int, device: torch.device, kept: torch.Tensor | None = None
    ) -> None:
        """Start at zero.

        Args:
            channels: I.
            device: Where the sums are.
            kept: int64 ``(K,)`` where the kept channels are known: only their columns are summed.
        """
        self.kept = kept
        columns = channels if kept is None else len(kept)
        self.act_act = torch.zeros((channels, columns), device=device)
        """G = Σ aᵀa: ``[I, I]``, or G[:, K]: ``[I, K]``."""
        self.drift_act: torch.Tensor | None = None
        """Σ dᵀa: ``[D, I]`` or ``[D, K]``; None without drift."""

    def add(self, act: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add activations ``(tokens, I)`` and their drift ``(tokens, D)``."""
        act = act.float()
        part = act if self.kept is None else act[:, self.kept]
        self.act_act.addmm_(act.T, part)
        if drift is not None:
            if self.drift_act is None:
                self.drift_act = act.new_zeros((drift.shape[1], part.shape[1]))
            self.drift_act.addmm_(drift.float().T, part)

    def columns(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the columns of the sums that stand for the channels ``kept``."""
        return kept if self.kept is None else torch.arange(len(kept), device=kept.device)


def normal_equations(
    weight: torch.Tensor, gram: GramSums, kept: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return G[K, K] + λI, float64 ``[K, K]``, and W_R · G[R, K] + Σ dᵀa_K, ``[D, K]``.

    R are the removed channels. Afterwards the sums of ``gram`` are not needed any more.

    Args:
        weight: W, ``[D, I]``.
        gram: Of ``I`` channels, or of the ``kept`` ones.
        kept: int64 ``(K,)``, ascending.
        ridge: λ over the mean diagonal of G[K, K].
    """
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_removed[kept] = False
    removed, columns = torch.nonzero(is_removed).flatten(), gram.columns(kept)
    wanted = weight[:, removed].float() @ gram.act_act[removed[:, None], columns]
    if gram.drift_act is not None:
        wanted += gram.drift_act[:, columns]
    inner = torch.empty((len(kept), len(kept)), dtype=torch.float64, device=weight.device)
    for into, rows in zip(inner.split(ROWS), kept.split(ROWS), strict=True):
        into.copy_(gram.act_act[rows[:, None], columns])
    diagonal = inner.diagonal()
    diagonal += ridge * diagonal.mean() + torch.finfo(torch.float32).tiny
    return inner, wanted


def solve(
    weight: torch.Tensor, kept: torch.Tensor, inner: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the down_proj W′ ``[D, K]`` whose output on ``kept`` channels is nearest to W a + d.

    It minimizes Σ ‖W a + d − W′ a_K‖² + λ ‖W′ − W_K‖²: W′ = W_K + ``wanted`` · ``inner``⁻¹, both
    from ``normal_equations``.
    """
    factor = torch.linalg.cholesky(inner)
    del inner
    result = weight[:, kept].float()
    for rows, goal in zip(result.split(ROWS), wanted.split(ROWS), strict=True):
        rows += torch.cholesky_solve(goal.double().T, factor).T.float()
    return result


def refit(
    weight: torch.Tensor, gram: GramSums, kept: torch.Tensor, ridge: float = RIDGE
) -> torch.Tensor:
    """Build the ``normal_equations`` and ``solve`` them."""
    return solve(weight, kept, *normal_equations(weight, gram, kept, ridge))


def error(weight: torch.Tensor, pruned: torch.Tensor, kept: torch.Tensor, gram: GramSums) -> float:
    """Return Σ ‖W a + d − W′ a_K‖² − ‖d‖² over the tokens of ``gram``.

    ``weight`` is W ``[D, I]`` and ``pruned`` is W′ ``[D, K]``.
    """
    missing = weight.float().clone()
    missing[:, kept] -= pruned.float()
    total = (missing @ gram.act_act * missing).sum(dtype=torch.float64)
    if gram.drift_act is not None:
        total += 2 * (gram.drift_act * missing).sum(dtype=torch.float64)
    return float(total)


def refit_if_better(
    weight: torch.Tensor, kept: torch.Tensor, grams: Sequence[GramSums], dtype: torch.dtype
) -> torch.Tensor | None:
    """Return ``refit`` by the first of ``grams``, rounded to ``dtype``; None if it does not help.

    Args:
        weight: ``[D, I]``.
        kept: int64 ``(K,)``.
        grams: The sums to fit by, then those of other windows to judge by; a single one does both.
        dtype: The file's dtype.
    """
    fitted = refit(weight, grams[0], kept).to(dtype)
    judge = grams[-1]
    before, after = weight[:, kept], fitted
    helps = error(weight, after, kept, judge) < error(weight, before, kept, judge)
    return fitted if helps else None


PULL = 0.5
"""Share of the residual stream's drift from the dense model that a refitted layer should undo.

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens), 0 gave a loss of 18.0 %, 0.5 gave 15.6 %, and 1
gave 16.6 %. At V' 49,152, I' 1,024 (41k tokens), 0.3 gave 6.1 %, 0.5 gave 5.9 %, and fitting
without a pruned prefix gave 7.7 %.
"""

ADDITIVE = 0.25
"""A layer counts as adding W a to its input if the relative error is at most this for half of the
tokens."""


class PrunedPrefix:
    """Windows that run through the pruned layers, and the same windows in the dense model."""

    def __init__(self, dense: Sequence[Stream]) -> None:
        """Take the windows of ``dense``: first those to fit by, then those to judge by."""
        self.streams = [Stream(stream.windows) for stream in dense]
        self._dense = dense
        self._additive: dict[type[torch.nn.Module], bool] = {}

    def refit(
        self,
        decoder: StreamedDecoder,
        index: int,
        ffn_module: FfnModule,
        kept: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:
        """Return the layer's down_proj ``[D, K]``, rounded to ``dtype``; None if it does not help.

        The layer has one FFN. The dense windows have passed it, these have not. The matrix should
        undo ``PULL`` times the drift of the residual stream from the dense model's, but only where
        the layer adds W a to the stream: not with a norm after the FFN, for example.
        """
        weight = decoder.layer(index).get_parameter(down_name(ffn_module)).data
        (matrix,) = down_matrices(decoder.layer(index), ffn_module, weight)
        kind = type(decoder.layer(index))
        if kind not in self._additive:
            self._additive[kind] = self._adds(decoder, index, ffn_module, matrix)
        pull = PULL if self._additive[kind] else 0.0
        gram = GramSums(matrix.shape[1], matrix.device, kept)
        for act, drift in self._tokens(decoder, index, 0):
            gram.add(act, pull * drift if pull else None)
        inner, wanted = normal_equations(matrix, gram, kept)
        del gram
        fitted = solve(matrix, kept, inner, wanted).to(dtype)
        errors = [0.0, 0.0]
        for act, drift in self._tokens(decoder, index, -1):
            goal, part = act @ matrix.T + pull * drift, act[:, kept]
            for number, candidate in enumerate((matrix[:, kept], fitted.to(matrix.dtype))):
                errors[number] += float((goal - part @ candidate.T).float().square().sum())
        return fitted if errors[1] < errors[0] else None

    def advance(
        self, decoder: StreamedDecoder, index: int, weights: dict[str, torch.Tensor]
    ) -> None:
        """Run the windows through the pruned layer."""
        for stream in self.streams:
            decoder.run(index, stream, weights=weights)

    def _tokens(
        self, decoder: StreamedDecoder, index: int, which: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield activations ``(tokens, I)`` and the drift of the output ``(tokens, D)``.

        The drift is the dense model's output minus that of the pruned layers. ``which`` is the
        stream: 0 to fit by, -1 to judge by.
        """
        dense = self._dense[which].states
        for rows, act, after in decoder.peek(index, self.streams[which]):
            yield act, dense.before[rows].to(after.device) - after
            dense.give_back(rows)

    def _adds(
        self, decoder: StreamedDecoder, index: int, ffn_module: FfnModule, matrix: torch.Tensor
    ) -> bool:
        """Whether the layer's output changes by W a if W becomes zero, tested on some windows."""
        weight = decoder.layer(index).get_parameter(down_name(ffn_module)).data
        zeros = {down_name(ffn_module): torch.zeros_like(weight)}
        _, act, after = next(decoder.peek(index, self.streams[0]))
        _, _, without = next(decoder.peek(index, self.streams[0], zeros))
        expected = act.float() @ matrix.float().T
        missed = (after.float() - without.float() - expected).norm(dim=-1)
        return bool((missed <= ADDITIVE * expected.norm(dim=-1)).float().mean() >= 0.5)
