"""The down_proj of a layer's units as matrices ``[D, I]``, however the library stores them."""

import torch
from torch import nn

from calib.ffn import Unit


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
