"""Sums of activations by bucket of token rarity, column norms of weights, block influence."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from calib.streaming.batches import Routed, Tokens
from calib.streaming.ffn import FfnModule, down_matrices, down_name
from calib.streaming.weights import pages
from surgery.stats.channel_stats import ROUTED_PARTS, AxisSums, RoutedSums

CACHED_VALUES = 1 << 18
"""Values of activations, states or weights in float64 at a time on a CPU, 2 MiB.

By themselves, calls take a third more time at a quarter of this, and a tenth more at the double. In
a calibration, the sums of activations take a tenth more at a quarter.
"""


def cosine_sum(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return Σ cos(x_in, x_out) over the tokens of states ``(windows, tokens, D)``.

    Each cosine is computed in float64 where the device has it, some tokens at a time. A zero state
    has no direction and counts 0.
    """
    device = before.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    values = CACHED_VALUES if device.type == "cpu" else CHUNK_VALUES
    rows = max(1, values // before.shape[-1])
    found = torch.empty((3, before.shape[:-1].numel()), dtype=wide, device=device)
    states = (each.flatten(0, -2).split(rows) for each in (before, after))
    for one, other, part in zip(*states, found.split(rows, dim=1), strict=True):
        one, other = one.to(wide), other.to(wide)
        for pair, dots in zip(((one, other), (one, one), (other, other)), part, strict=True):
            _dots(*pair, dots)
    dots, *squares = found
    lengths = squares[0].sqrt() * squares[1].sqrt()
    cosines = torch.where(lengths > 0, dots / lengths, 0.0)
    return float(cosines.cpu().double().sum())


def _dots(one: torch.Tensor, other: torch.Tensor, dots: torch.Tensor) -> None:
    """Write the dot product of each row of ``one`` and of ``other``, ``(rows, D)``, to ``dots``.

    On a CPU, numpy's batched product takes half the time of torch's ``vecdot``.
    """
    if dots.device.type == "cpu":
        rows, columns = one.numpy()[:, None], other.numpy()[:, :, None]
        with np.errstate(over="ignore", invalid="ignore"):  # NaN is looked for after the layer
            np.matmul(rows, columns, out=dots.numpy()[:, None, None])
    else:
        dots.copy_(torch.linalg.vecdot(one, other))


def weight_norms(layer: nn.Module, ffn_modules: Sequence[FfnModule]) -> dict[str, torch.Tensor]:
    """Return channel axis → float64 ``(experts, I)`` on the CPU: ||W[:, k]||₂ of each channel."""
    found = {}
    for ffn_module in ffn_modules:
        weight = layer.get_parameter(down_name(ffn_module)).data
        norms = [_column_norms(matrix) for matrix in down_matrices(layer, ffn_module, weight)]
        found[ffn_module.axis] = torch.stack(norms)
    return found


def _column_norms(matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 norms ``(I,)`` of ``[D, I]``, by blocks of rows: six times as fast."""
    wide = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=wide)
    values = CACHED_VALUES if matrix.device.type == "cpu" else CHUNK_VALUES
    for part in matrix.split(max(1, values // matrix.shape[1])):
        total += part.to(wide, torch.float64).square_().sum(0)
    return total.sqrt_().cpu()


CHUNK_VALUES = 1 << 20
"""Activations in float64 at a time: 8 MiB."""

FEW_TOKENS = 64
"""Tokens whose activations are summed in plain float32 at a time, where there is no float64."""


class Sum:
    """A running sum; in float32 it uses Kahan's compensation."""

    def __init__(self, total: torch.Tensor) -> None:
        """Take a tensor of zeros, which becomes the sum."""
        self.total = total
        self._lost = torch.zeros_like(total) if total.dtype == torch.float32 else None

    def add(self, part: torch.Tensor, expert: int | None = None) -> None:
        """Add ``part`` ``(…, I)`` to the sum, or to one expert's row of ``(…, experts, I)``."""
        total = self.total if expert is None else self.total[..., expert, :]
        if self._lost is None:
            total += part
            return
        lost = self._lost if expert is None else self._lost[..., expert, :]
        part = part - lost
        larger = total + part
        lost.copy_((larger - total) - part)
        total.copy_(larger)


class ChannelSums:
    """Sums over one channel axis of one layer, by bucket and expert.

    They are float64. A device without it (MPS) sums at most ``FEW_TOKENS`` tokens in float32, and
    adds these sums with Kahan's compensation. All terms are positive, so the relative error is
    below ``(FEW_TOKENS + 4) * 2**-24``, 4.1e-6, however many tokens there are.
    """

    def __init__(
        self,
        buckets: int,
        experts: int,
        channels: int,
        device: torch.device,
        *,
        compensated: bool | None = None,
        routed: bool = False,
    ) -> None:
        """Start with zeros.

        Args:
            buckets: Buckets of tokens.
            experts: Experts that have the axis.
            channels: Length of the axis.
            device: Device of the activations.
            compensated: None means yes on a device without float64.
            routed: Whether the outputs of experts are summed, too.
        """
        self._compensated = device.type == "mps" if compensated is None else compensated
        self._dtype = torch.float32 if self._compensated else torch.float64
        shape = (buckets, experts, channels)
        self.sum_sq, self.sum_abs, self.sum_l2 = (
            Sum(zeros(each, self._dtype, device)) for each in (shape, shape, shape[1:])
        )
        self.tokens = torch.zeros((buckets, experts), dtype=torch.int64)
        self._routed = (
            {part: torch.zeros((buckets, experts), dtype=torch.float64) for part in ROUTED_PARTS}
            if routed
            else {}
        )
        self._window_sq: Sum | None = None
        """``(windows, I)``: Σ act² of the windows whose last tokens are still to be added."""

    def add(self, expert: int, tokens: Tokens, buckets: torch.Tensor, act: torch.Tensor) -> None:
        """Add the activations of some tokens.

        Args:
            expert: The expert that computed them; 0 in a dense FFN.
            tokens: Their tokens. All tokens of a micro-batch are added before those of the next.
            buckets: int64 ``(tokens,)``: the bucket of each, on the CPU.
            act: ``(tokens, I)``, the input of down_proj.
        """
        count = len(self.tokens)
        self.tokens[:, expert] += torch.bincount(buckets, minlength=count)
        if self._window_sq is None:
            shape = (tokens.count, act.shape[1])
            self._window_sq = Sum(torch.zeros(shape, dtype=self._dtype, device=act.device))
        if act.device.type == "cpu" and not self._compensated:
            self._add_rows(expert, tokens, buckets, act, self._window_sq)
        else:
            self._add_products(expert, tokens, buckets, act, self._window_sq)
        if tokens.last:
            self.sum_l2.add(self._window_sq.total.sqrt_().sum(dim=0), expert)
            self._window_sq = None

    def _add_rows(
        self, expert: int, tokens: Tokens, buckets: torch.Tensor, act: torch.Tensor, windows: Sum
    ) -> None:
        """Add each token's row to its sums while it is in the cache.

        On a CPU this takes a third of the time of ``_add_products``.
        """
        sum_abs, sum_sq = (each.total[:, expert] for each in (self.sum_abs, self.sum_sq))
        step = max(1, CACHED_VALUES // act.shape[1])
        parts = zip(*(each.split(step) for each in (act, buckets, tokens.windows)), strict=True)
        for part, of_bucket, of_window in parts:
            wide = part.to(self._dtype).abs_()
            sum_abs.index_add_(0, of_bucket, wide)
            sum_sq.index_add_(0, of_bucket, wide.square_())
            windows.total.index_add_(0, of_window, wide)

    def _add_products(
        self, expert: int, tokens: Tokens, buckets: torch.Tensor, act: torch.Tensor, windows: Sum
    ) -> None:
        """Multiply many tokens' rows by who belongs to which sum, always in the same order."""
        count = len(self.tokens)
        step = max(1, CHUNK_VALUES // max(act.shape[1], tokens.count))
        step = min(step, FEW_TOKENS) if self._compensated else step
        for start in range(0, len(act), step):
            part = slice(start, start + step)
            of_bucket = membership(buckets[part], count)
            groups = torch.cat([of_bucket, membership(tokens.windows[part], tokens.count)])
            groups = groups.to(act.device, self._dtype)
            wide = act[part].to(self._dtype).abs_()
            self.sum_abs.add(groups[:count] @ wide, expert)
            sums = groups @ wide.square_()
            self.sum_sq.add(sums[:count], expert)
            windows.add(sums[count:])

    def add_outputs(self, expert: int, buckets: torch.Tensor, routed: Routed) -> None:
        """Add what a routed expert puts out.

        Args:
            expert: The expert.
            buckets: int64 ``(n,)``: the bucket of each of its tokens, on the CPU.
            routed: Its output for them.
        """
        norm = torch.linalg.vector_norm(routed.output, dim=-1, dtype=self._dtype).cpu().double()
        gate, factor = (each.cpu().double() for each in (routed.gate, routed.factor))
        added = factor * norm
        terms = (gate, norm, norm.square(), added, added.square())
        for part, term in zip(ROUTED_PARTS, terms, strict=True):
            total = self._routed[part]
            total[:, expert] += torch.bincount(buckets, weights=term, minlength=len(total))

    def numbers(self, weight_norm: torch.Tensor) -> AxisSums:
        """Return the sums as arrays, with down_proj's column norms ``(experts, I)``."""
        sums = (self.sum_sq, self.sum_abs, self.sum_l2)
        sum_sq, sum_abs, sum_l2 = (each.total.cpu().double().numpy() for each in sums)
        outputs = [each.numpy() for each in self._routed.values()]
        return AxisSums(
            sum_sq,
            sum_abs,
            self.tokens.numpy(),
            sum_l2,
            weight_norm.numpy(),
            RoutedSums(*outputs) if outputs else None,
        )


def membership(groups: torch.Tensor, count: int) -> torch.Tensor:
    """Return bool ``(count, tokens)``: whether ``groups[token]`` is the row."""
    return torch.arange(count)[:, None] == groups


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on the CPU they have pages of their own and do not fragment the heap."""
    if device.type == "cpu" and 0 not in shape:
        return pages(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
