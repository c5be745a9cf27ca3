"""Other weights in a layer for a while, so that one read of a layer serves several variants."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def swapped(layer: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give ``layer`` these parameters, by name and of its own shapes, until the block ends."""
    own = {name: layer.get_parameter(name).data for name in weights}
    for name, value in weights.items():
        layer.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in own.items():
            layer.get_parameter(name).data = value
