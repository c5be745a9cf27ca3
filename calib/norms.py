"""The norms of down_proj's columns."""

from collections.abc import Sequence

import torch
from torch import nn

from calib.down import down_matrices, down_name
from calib.ffn import Unit
from calib.sums import CHUNK_VALUES


def weight_norms(layer: nn.Module, units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """Return channel axis → float64 ``(experts, I)``, on the CPU: ||W[:, k]||₂ of each channel."""
    found = {}
    for unit in units:
        weight = layer.get_parameter(down_name(unit)).data
        norms = [_column_norms(matrix) for matrix in down_matrices(layer, unit, weight)]
        found[unit.axis] = torch.stack(norms)
    return found


def _column_norms(matrix: torch.Tensor) -> torch.Tensor:
    """float64 ``(I,)`` of ``[D, I]``, some rows at a time: columns take three times as long."""
    wide = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=wide)
    for part in matrix.split(max(1, CHUNK_VALUES // matrix.shape[1])):
        total += part.to(wide, torch.float64).square_().sum(0)
    return total.sqrt_().cpu()
