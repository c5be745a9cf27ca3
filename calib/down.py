"""The down_proj of a layer's units as matrices ``[D, I]``, however the library stores them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from calib.ffn import Unit
from surgery.family import STACK, Dim
from surgery.layout import Layout

Place = tuple[str, int]
"""Channel axis and expert, 0 for an FFN that is no expert."""


def down_name(unit: Unit) -> str:
    """The parameter, by its name inside the layer."""
    return f"{unit.path}.down_proj" if unit.routed else f"{unit.path}.weight"


def down_matrices(layer: nn.Module, unit: Unit, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return ``weight``, shaped as the parameter of ``unit``, as views ``[D, I]``: one per expert.

    A Conv1D holds ``[I, D]``; experts lie behind one another, and those of classes without
    ``is_transposed``, such as Llama 4's, hold ``[I, D]`` each.
    """
    module = layer.get_submodule(unit.path)
    if unit.routed:
        transposed = getattr(module, "is_transposed", True)
        return [matrix.T if transposed else matrix for matrix in weight]
    return [weight if isinstance(module, nn.Linear) else weight.T]


def cut_weight(
    layer: nn.Module,
    unit: Unit,
    kept: Sequence[np.ndarray],
    refitted: Mapping[Place, torch.Tensor],
) -> torch.Tensor:
    """Return a unit's down_proj with zeros for the channels that go: a mask of its input.

    Args:
        layer: The library's.
        unit: Of the layer.
        kept: Per expert the channels that stay.
        refitted: ``[D, K]`` for those whose columns are others than before.
    """
    own = layer.get_parameter(down_name(unit)).data
    new = torch.zeros_like(own)
    pairs = zip(*(down_matrices(layer, unit, weight) for weight in (own, new)), strict=True)
    for expert, (before, after) in enumerate(pairs):
        stays = torch.from_numpy(kept[expert]).to(own.device)
        better = refitted.get((unit.axis, expert))
        after[:, stays] = before[:, stays] if better is None else better.to(own.device, own.dtype)
    return new


def watched_tensors(layout: Layout, index: int) -> list[str]:
    """The file's names of a layer's down_projs."""
    names = (ref.name for ref in layout.of_layer[index].values())
    return [n for n in names if layout.places[n].slot.watched and layout.places[n].slot.width]


def file_matrices(layout: Layout, name: str, tensor: torch.Tensor) -> dict[Place, torch.Tensor]:
    """Return ``tensor``, laid out as the file's tensor ``name``, as views ``[D, channels]``."""
    place = layout.places[name]
    axis, dims = place.slot.width, list(place.slot.dims)
    assert axis is not None
    packed = Dim(STACK) in dims
    transposed = dims.index(Dim(axis)) - packed == 0
    parts = enumerate(tensor) if packed else [(place.expert or 0, tensor)]
    return {(axis, expert): part.T if transposed else part for expert, part in parts}
