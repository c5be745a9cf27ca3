"""A pruned FFN fitted to what the dense one puts out, by least squares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import FfnModule, down_matrices, down_name
from calib.streaming.hidden_states import SwappedStates

RIDGE = 1e-3
"""λ in parts of the mean diagonal of G[K, K].

On SmolLM2-135M (V' 32,768, I' 864, 28k tokens) the loss was 18.0 % of the dense model's bits with
1e-3 and with 1e-5, and 33.1 % without refitting.
"""


ROWS = 1024
"""Rows of a matrix that are copied or solved for at a time."""

BLOCK = 256
"""Rows of a symmetric matrix that are summed together, up to the diagonal."""


class GramSums:
    """G = Σ aᵀa, ``[I, I]``, over the activations a of tokens, in float32."""

    def __init__(self, channels: int, device: torch.device) -> None:
        """Start at zero."""
        self.act_act = torch.zeros((channels, channels), device=device)

    def add(self, act: torch.Tensor) -> None:
        """Add activations ``(tokens, I)``."""
        act = act.float()
        self.act_act.addmm_(act.T, act)

    def normal_equations(self, weight: torch.Tensor, kept: torch.Tensor) -> "NormalEquations":
        """Return the equations of W′ whose output is nearest to W a. W is ``[D, I]``."""
        removed = others(kept, weight.shape[1])
        sums = NormalEquations(len(kept), weight.shape[0], weight.device)
        for into, rows in zip(sums.inner.split(ROWS), kept.split(ROWS), strict=True):
            into.copy_(self.act_act[rows[:, None], kept])
        columns = self.act_act[removed[:, None], kept]
        torch.matmul(weight[:, removed].float(), columns, out=sums.wanted)
        return sums


def others(kept: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the channels that are not ``kept``, ascending."""
    is_removed = torch.ones(channels, dtype=torch.bool, device=kept.device)
    is_removed[kept] = False
    return torch.nonzero(is_removed).flatten()


class NormalEquations:
    """Sums over tokens from which a refitted down_proj follows, in float32.

    a_K are the kept activations of a token, and m what the kept columns of W lack: W_K a_K + m is
    what the refitted matrix should put out.
    """

    def __init__(self, kept: int, width: int, device: torch.device) -> None:
        """Start at zero.

        Args:
            kept: K.
            width: D.
            device: Where the sums are.
        """
        self.inner = torch.zeros((kept, kept), device=device)
        """Σ a_Kᵀa_K, ``[K, K]``; only its lower triangle is summed."""
        self.wanted = torch.zeros((width, kept), device=device)
        """Σ mᵀa_K, ``[D, K]``."""

    def add(self, part: torch.Tensor, missing: torch.Tensor) -> None:
        """Add a_K ``(tokens, K)`` and m ``(tokens, D)``."""
        part = part.float()
        for start in range(0, part.shape[1], BLOCK):
            stop = start + BLOCK
            self.inner[start:stop, :stop].addmm_(part[:, start:stop].T, part[:, :stop])
        self.wanted.addmm_(missing.float().T, part)

    def solve(self, weight: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
        """Return W′ ``[D, K]``, given W_K; the sums are not needed any more.

        It minimizes Σ ‖W_K a_K + m − W′ a_K‖² + λ ‖W′ − W_K‖²: W′ = W_K + ``wanted`` ·
        (``inner`` + λI)⁻¹.

        Args:
            weight: W_K.
            ridge: λ over the mean diagonal of ``inner``.
        """
        factor = self.inner.double()
        self.inner = torch.empty(0)
        diagonal = factor.diagonal()
        diagonal += ridge * diagonal.mean() + torch.finfo(torch.float32).tiny
        factor = torch.linalg.cholesky(factor)
        result = weight.float().clone()
        for rows, goal in zip(result.split(ROWS), self.wanted.split(ROWS), strict=True):
            rows += torch.cholesky_solve(goal.double().T, factor).T.float()
        return result


def error(weight: torch.Tensor, pruned: torch.Tensor, kept: torch.Tensor, gram: GramSums) -> float:
    """Return Σ ‖W a − W′ a_K‖² over the tokens of ``gram``. W is ``[D, I]`` and W′ ``[D, K]``."""
    missing = weight.float().clone()
    missing[:, kept] -= pruned.float()
    return float((missing @ gram.act_act * missing).sum(dtype=torch.float64))


def refit_if_better(
    weight: torch.Tensor, kept: torch.Tensor, grams: Sequence[GramSums], dtype: torch.dtype
) -> torch.Tensor | None:
    """Refit by the first of ``grams`` and round to ``dtype``; return None if it does not help.

    Args:
        weight: ``[D, I]``.
        kept: int64 ``(K,)``.
        grams: The sums to fit by, then those of other windows to judge by; a single one does both.
        dtype: The file's dtype.
    """
    fitted = grams[0].normal_equations(weight, kept).solve(weight[:, kept]).to(dtype)
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


EXACT = 1e-3
"""Relative error below which an output is the sum, rounded in float32."""


@dataclass(frozen=True)
class Examples:
    """Tokens in an FFN: its input in the pruned layers, and what it should put out there."""

    hidden: torch.Tensor
    """``(tokens, D)``."""
    target: torch.Tensor
    """``(tokens, D)``: what the dense FFN makes of the input, and the drift that it undoes."""


class PrunedPrefix:
    """Windows that run through the pruned layers, and the same windows in the dense model."""

    def __init__(self, dense: Sequence[Stream], *, collects: bool = False) -> None:
        """Take the windows of ``dense``: first those to fit by, then those to judge by.

        With ``collects``, ``refit`` leaves ``examples``.
        """
        self._collects = collects
        self.examples: list[Examples] = []
        """Of the layer that was refitted last, by streams; empty if its FFN is no module."""
        self.streams = [Stream(stream.windows, SwappedStates()) for stream in dense]
        self._dense = dense
        self._kinds: dict[tuple[type[nn.Module], FfnModule], _Adds] = {}
        self.split: int | None = None
        """The layer whose attention the windows have passed, and not yet its FFN."""

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
        kind = type(decoder.layer(index)), ffn_module
        if kind not in self._kinds:
            self._kinds[kind] = _adds(decoder, index, ffn_module, matrix, self.streams[0])
        adds, own = self._kinds[kind], matrix[:, kept]
        self.split = index if adds.exactly else None
        sums = NormalEquations(len(kept), len(matrix), matrix.device)
        self.examples = []
        pull = PULL if adds.nearly else 0.0
        for part, missing in self._tokens(decoder, index, 0, matrix, kept, pull):
            sums.add(part, missing)
        fitted = sums.solve(own).to(dtype)
        del sums
        change, errors = fitted.to(matrix.dtype) - own, [0.0, 0.0]
        for part, missing in self._tokens(decoder, index, -1, matrix, kept, pull):
            errors[0] += float(missing.float().square().sum())
            errors[1] += float((missing - part @ change.T).float().square().sum())
        return fitted if errors[1] < errors[0] else None

    def advance(
        self, decoder: StreamedDecoder, index: int, weights: dict[str, torch.Tensor]
    ) -> None:
        """Run the windows through the pruned layer, or through the part that is left of it."""
        for stream in self.streams:
            if self.split == index:
                decoder.run_ffn(index, stream, weights)
            else:
                decoder.run(index, stream, weights=weights)

    def _tokens(
        self,
        decoder: StreamedDecoder,
        index: int,
        which: int,
        matrix: torch.Tensor,
        kept: torch.Tensor,
        pull: float,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield kept activations ``(tokens, K)`` and what is missing in the output ``(tokens, D)``.

        That is the output of the removed channels, and ``pull`` times the drift: the dense model's
        output minus that of the pruned layers. ``which`` is the stream: 0 to fit by, -1 to judge
        by. When it is seen for the last time, its states are prepared for ``run_ffn``.
        """
        dense, stream = self._dense[which].states, self.streams[which]
        last = which == -1 or len(self.streams) > 1
        removed = others(kept, matrix.shape[1])
        lost = matrix[:, removed]
        hidden, target = [], []
        for seen in decoder.peek(index, stream):
            missing = seen.act[:, removed] @ lost.T
            drift = torch.zeros_like(missing)
            if pull:
                drift = pull * (dense.before[seen.rows].to(seen.after.device) - seen.after)
                dense.give_back(seen.rows)
            missing += drift
            if self._collects and seen.ffn is not None:
                hidden.append(seen.ffn.hidden)
                target.append(seen.ffn.output + drift)
            if last and self.split == index:
                assert seen.ffn is not None
                stream.states.before[seen.rows].copy_(seen.ffn.hidden)
                stream.states.after[seen.rows].copy_(seen.after - seen.ffn.output)
            yield seen.act[:, kept], missing
        if hidden:
            self.examples.append(Examples(torch.cat(hidden), torch.cat(target)))


@dataclass(frozen=True)
class _Adds:
    """How a kind of layer adds W a to its input."""

    nearly: bool
    """With a relative error of at most ``ADDITIVE``."""
    exactly: bool
    """Its FFN is a module of its own, whose output it adds unchanged. Once its attention has run,
    the FFN may then run alone: a fifth of a repair's time less on SmolLM2-135M."""


def _adds(
    decoder: StreamedDecoder,
    index: int,
    ffn_module: FfnModule,
    matrix: torch.Tensor,
    stream: Stream,
) -> _Adds:
    """See on some windows how a layer's output changes if W becomes zero."""
    weight = decoder.layer(index).get_parameter(down_name(ffn_module)).data
    zeros = {down_name(ffn_module): torch.zeros_like(weight)}
    seen, without = (next(decoder.peek(index, stream, each)) for each in ({}, zeros))
    expected = seen.act.float() @ matrix.float().T
    changed = seen.after.float() - without.after.float()

    def agrees(share: float) -> bool:
        missed = (changed - expected).norm(dim=-1)
        return bool((missed <= share * expected.norm(dim=-1)).float().mean() >= 0.5)

    exactly = False
    if seen.ffn is not None and without.ffn is not None:
        given = seen.ffn.output.float() - without.ffn.output.float()
        exactly = bool((given - expected).norm() <= EXACT * expected.norm())
    return _Adds(agrees(ADDITIVE), exactly and agrees(EXACT))
