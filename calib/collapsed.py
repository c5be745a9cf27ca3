"""A layer that several become: the sum that apply streams, made of whole layers."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn

from calib.weights import TORCH_DTYPE


class Collapsed:
    """W + Σ (W_k − W) over the other layers (LaCo, arXiv 2402.11187), in the layers' dtype."""

    def __init__(self, first: nn.Module, dtypes: Mapping[str, str]) -> None:
        """Begin with the first layer.

        Args:
            first: The layer that the others are added to; it is copied.
            dtypes: Parameter → safetensors dtype in the file; those that are not in it stay.
        """
        self.layer = deepcopy(first)
        state = self.layer.state_dict()
        self._dtypes = {name: dtype for name, dtype in dtypes.items() if name in state}
        self._first = {name: state[name].clone() for name in self._dtypes}

    @torch.no_grad()
    def add(self, other: nn.Module) -> None:
        """Add what another layer has more than the first."""
        total, terms = self.layer.state_dict(), other.state_dict()
        for name, first in self._first.items():
            total[name] += terms[name] - first

    @torch.no_grad()
    def round(self) -> None:
        """Round once to what the file can hold, to nearest even."""
        total = self.layer.state_dict()
        for name, dtype in self._dtypes.items():
            total[name].copy_(total[name].to(TORCH_DTYPE[dtype]))
