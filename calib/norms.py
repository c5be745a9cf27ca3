"""The norms of down_proj's columns, from weights as the file lays them out."""

from collections.abc import Mapping

import torch

from calib.sums import CHUNK_VALUES
from surgery.family import STACK, Dim
from surgery.layout import Layout


def weight_norms(
    layout: Layout, layer: int, stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return channel axis → float64 ``(experts, I)``, on the CPU: ||W[:, k]||₂ of each channel.

    Args:
        layout: The model.
        layer: Number of the layer.
        stored: Its tensors by their names in the text model; FP8 as the numbers it stands for.
    """
    found = {
        axis: torch.zeros((experts, layout.channels_of(axis)), dtype=torch.float64)
        for axis, experts in layout.watched[layer].items()
    }
    for name, tensor in stored.items():
        place = layout.places[layout.of_layer[layer][name].name]
        axis = place.slot.width
        if not place.slot.watched or axis is None:
            continue
        dims = place.slot.dims
        packed = Dim(STACK) in dims
        channels = dims.index(Dim(axis)) - packed
        for expert, weight in enumerate(tensor if packed else [tensor], place.expert or 0):
            found[axis][expert] = _norms(weight, channels)
    return found


def _norms(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """float64 ``(I,)`` of ``(D, I)`` or, with ``channels`` 0, ``(I, D)``, some rows at a time."""
    rows = weight.split(max(1, CHUNK_VALUES // weight.shape[1]))
    squares = (part.double().square_() for part in rows)
    if channels == 0:
        return torch.cat([part.sum(dim=1) for part in squares]).sqrt_().cpu()
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for part in squares:
        total += part.sum(dim=0)
    return total.sqrt_().cpu()
