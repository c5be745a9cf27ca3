"""A pruned FFN trained alone towards what the dense one puts out, from least squares on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn

from calib.refit import Examples
from calib.streaming.ffn import FfnModule, ffn_above

EPOCHS = 2
"""How often each token is seen."""

BATCH = 64
"""Tokens of a step."""

RATES = (0.016, 0.005)
"""Adam's rates in the first step, in parts of a matrix's root mean square.

They fall to zero as half a cosine. The first FFN that training helps tries all, and the rate that
serves it best trains the others.

The drift from the dense model that least squares leaves, and what training from there leaves:
4.02 % after two layers of SmolLM2-135M, then 3.47 % with 0.015, 3.51 with 0.01, 3.64 with 0.005;
1.59 % after one layer of Gemma 3 270M, then 1.37 with 0.015, 1.03 with 0.007, 1.00 with 0.005;
3.48 % after one layer of Qwen2.5-Coder-1.5B, then 2.02 with 0.007. A rate of 3e-3, whatever the
weights' size, is SmolLM2's best, whose weights are ten times as large, and helps no layer of the
others.
"""

BETAS = (0.9, 0.95)

SHORT = 1e-3
"""A target counts as no shorter than this, in parts of the mean square."""

JUDGED = 1024
"""Tokens that are judged together."""


@dataclass(frozen=True)
class Trained:
    """An FFN whose training helps."""

    weights: dict[str, torch.Tensor]
    """By their names in the layer, rounded to the file's dtype."""
    rate: float
    """The one of the rates that served best."""


def reconstruct(
    layer: nn.Module,
    ffn_module: FfnModule,
    weights: Mapping[str, torch.Tensor],
    examples: Sequence[Examples],
    dtype: torch.dtype,
    rates: Sequence[float],
) -> Trained | None:
    """Train an FFN with each of ``rates`` and return the best; None if none helps.

    Adam minimizes the mean of ‖y − f(x)‖² / ‖y‖² over the first tokens. The weights help if that of
    the last ones falls. The order of the tokens is the same every time.

    Args:
        layer: The library's.
        ffn_module: Of the layer; a module of its own.
        weights: The pruned ones to begin with, by their names in the layer.
        examples: Tokens to train on, then others to judge by.
        dtype: The file's dtype.
        rates: In parts of a matrix's root mean square.
    """
    prefix = ffn_module.path.rpartition(".")[0] + "."
    begin = {name.removeprefix(prefix): value.float() for name, value in weights.items()}
    ffn = ffn_above(layer, ffn_module)
    judged = _Shares(ffn, examples[-1])
    best, found = judged.total(begin), None
    for rate in rates:
        trained = _trained(_Shares(ffn, examples[0]), begin, rate)
        made = {name: value.to(dtype) for name, value in trained.items()}
        missed = judged.total(made)
        if missed < best:
            named = {prefix + name: value for name, value in made.items()}
            best, found = missed, Trained(named, rate)
    return found


def _trained(
    shares: "_Shares", begin: Mapping[str, torch.Tensor], rate: float
) -> dict[str, torch.Tensor]:
    """Minimize ``shares`` from ``begin`` on, and return the last weights."""
    trained = {name: nn.Parameter(value.clone()) for name, value in begin.items()}
    sizes = {name: float(each.square().mean().sqrt()) for name, each in begin.items()}
    matrices = mean(size for name, size in sizes.items() if begin[name].ndim > 1)
    groups = [  # a bias takes the steps of the matrices
        {"params": [each], "lr": rate * (sizes[name] if each.ndim > 1 else matrices)}
        for name, each in trained.items()
    ]
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(shares.tokens, generator=rng) for _ in range(EPOCHS)]
    steps = [rows for order in orders for rows in order.split(BATCH)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    with torch.enable_grad():
        for rows in steps:
            optimizer.zero_grad()
            shares(trained, rows).backward()
            optimizer.step()
            schedule.step()
    return {name: value.data for name, value in trained.items()}


class _Shares:
    """The mean share of a target's energy that an FFN misses."""

    def __init__(self, ffn: nn.Module, examples: Examples) -> None:
        self._ffn, self._examples = ffn, examples
        self.tokens = len(examples.hidden)
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
        rows = torch.arange(self.tokens).split(JUDGED)
        return sum(float(self(wide, each)) * len(each) for each in rows)
