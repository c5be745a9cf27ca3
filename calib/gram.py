"""Least squares into down_proj: what the channels that go had to say, said by those that stay."""

from collections.abc import Sequence

import torch

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
