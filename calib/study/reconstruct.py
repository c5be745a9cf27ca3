"""A pruned FFN trained alone towards what the dense one puts out, from least squares on."""

from collections.abc import Mapping

import torch
from torch import nn

from calib.refit import Examples
from calib.streaming.ffn import FfnModule, ffn_above

EPOCHS = 2
"""How often each token is seen."""

BATCH = 64
"""Tokens of a step."""

RATE = 3e-3
"""Adam's rate in the first step; it falls to zero as half a cosine.

On layers 8 and 18 of SmolLM2-135M (I' 896, 7,879 tokens), least squares left 31.2 and 34.4 % of the
output's energy per token. Two epochs of 256 tokens a step left 30.7 % of the first with 3e-4, 30.2
with 1e-3, 29.6 and 34.0 with 3e-3; with 1e-2, 29.8 and nothing better than least squares. Two
epochs of 64 tokens with 3e-3 left 29.2 and 33.9 %; six of 256 with 2e-3, 29.0 and 33.8.
"""

BETAS = (0.9, 0.95)

SHORT = 1e-3
"""A target counts as no shorter than this, in parts of the mean square."""

JUDGED = 1024
"""Tokens that are judged together."""


def reconstruct(
    layer: nn.Module,
    ffn_module: FfnModule,
    weights: Mapping[str, torch.Tensor],
    fit: Examples,
    judge: Examples,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor] | None:
    """Return trained weights, rounded to ``dtype``; None if they do not help.

    Adam minimizes the mean of ‖y − f(x)‖² / ‖y‖² over the tokens of ``fit``. The weights help if
    that of ``judge`` falls. The order of the tokens is the same every time.

    Args:
        layer: The library's.
        ffn_module: Of the layer; a module of its own.
        weights: The pruned ones to begin with, by their names in the layer.
        fit: Tokens to train on.
        judge: Tokens to judge by.
        dtype: The file's dtype.
    """
    prefix = ffn_module.path.rpartition(".")[0] + "."
    begin = {name.removeprefix(prefix): value.float() for name, value in weights.items()}
    ffn = ffn_above(layer, ffn_module)
    trained = {name: nn.Parameter(value.clone()) for name, value in begin.items()}
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(fit.hidden), generator=rng) for _ in range(EPOCHS)]
    steps = [rows for order in orders for rows in order.split(BATCH)]
    optimizer = torch.optim.Adam(trained.values(), lr=RATE, betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    with torch.enable_grad():
        shares = _Shares(ffn, fit)
        for rows in steps:
            optimizer.zero_grad()
            shares(trained, rows).backward()
            optimizer.step()
            schedule.step()
    made = {name: value.data.to(dtype) for name, value in trained.items()}
    judged = _Shares(ffn, judge)
    if not judged.total(made) < judged.total(begin):
        return None
    return {prefix + name: value for name, value in made.items()}


class _Shares:
    """The mean share of a target's energy that an FFN misses."""

    def __init__(self, ffn: nn.Module, examples: Examples) -> None:
        self._ffn, self._examples = ffn, examples
        energy = examples.target.float().square().sum(-1)
        least = SHORT * energy.mean() + torch.finfo(torch.float32).tiny
        self._scale = 1 / energy.clamp_min(least)

    def __call__(self, weights: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Return it for the tokens ``rows``."""
        hidden, target = (
            each[rows].float() for each in (self._examples.hidden, self._examples.target)
        )
        found = torch.func.functional_call(self._ffn, dict(weights), (hidden,))
        return ((found - target).square().sum(-1) * self._scale[rows]).mean()

    @torch.no_grad()
    def total(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Return the sum over all tokens, in tokens."""
        wide = {name: value.float() for name, value in weights.items()}
        rows = torch.arange(len(self._scale)).split(JUDGED)
        return sum(float(self(wide, each)) * len(each) for each in rows)
