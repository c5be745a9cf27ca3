"""The FFN of one layer, dense or of experts, the input of every down_proj in view."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from calib.experts import watched_experts
from calib.tokens import Tokens

PIECE_VALUES = 1 << 23
"""Values of one FFN activation at a time, tokens × I: 32 MiB in fp32.

In pieces of a quarter of this, a window of 2,048 tokens of the 8B shape took 1.3 × the time.
"""

See = Callable[[str, int, Tokens, torch.Tensor], torch.Tensor | None]
"""Called with the channel axis, the expert (0 in a dense FFN), n tokens and what of them goes into
down_proj ``(n, I)``; what it returns, if anything, goes there instead."""


@dataclass(frozen=True)
class Unit:
    """A module of a layer that has channels."""

    axis: str
    """One of ``surgery.family.WIDTHS``."""
    path: str
    """Of the down_proj, or of the experts, inside the layer."""
    routed: bool
    """Whether it is experts."""


@contextmanager
def watched_ffn(
    layer: nn.Module, units: Sequence[Unit], ids: torch.Tensor, see: See
) -> Iterator[None]:
    """Show ``see`` the activations of all ``units`` while ``layer`` runs.

    Args:
        layer: The library's decoder layer.
        units: Of this layer.
        ids: int64 ``(windows, tokens)``: what the layer runs on.
        see: Sees, and may change, the activations.
    """
    with ExitStack() as stack:
        for unit in units:
            module = layer.get_submodule(unit.path)
            if unit.routed:
                stack.enter_context(_routed(unit, module, ids, see))
            else:
                above, _, _ = unit.path.rpartition(".")
                ffn = layer.get_submodule(above) if above and len(units) == 1 else None
                stack.enter_context(_dense(unit, module, ffn, ids, see))
        yield


@contextmanager
def _routed(unit: Unit, module: nn.Module, ids: torch.Tensor, see: See) -> Iterator[None]:
    def see_expert(expert: int, places: torch.Tensor, act: torch.Tensor) -> torch.Tensor | None:
        return see(unit.axis, expert, Tokens.at(ids, places.cpu()), act)

    with watched_experts(module, see_expert):
        yield


@contextmanager
def _dense(
    unit: Unit, down_proj: nn.Module, ffn: nn.Module | None, ids: torch.Tensor, see: See
) -> Iterator[None]:
    """Let ``ffn``, if it is a module of its own, work on pieces of its tokens.

    An FFN takes each token by itself, so pieces change nothing but the size of its activations:
    at I = 14,336 those of a window of 2,048 tokens take 350 MB whole and 90 MB in pieces.
    """
    part = slice(0, ids.shape[1])

    def in_pieces(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal part
        parts = pieces(hidden.shape[0], hidden.shape[1], channels)
        if len(parts) == 1:
            part = parts[0]
            return whole(hidden)
        result = torch.empty_like(hidden)
        for part in parts:
            result[:, part] = whole(hidden[:, part])
        return result

    def pre_hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        act = inputs[0]
        changed = see(unit.axis, 0, Tokens.of(ids, part), act.flatten(0, -2))
        return None if changed is None else (changed.view(act.shape), *inputs[1:])

    handle = down_proj.register_forward_pre_hook(pre_hook)
    if ffn is not None:
        whole, channels = ffn.forward, _channels(down_proj)
        ffn.forward = in_pieces
    try:
        yield
    finally:
        handle.remove()
        if ffn is not None:
            del ffn.forward


def pieces(windows: int, tokens: int, channels: int) -> list[slice]:
    """Cut ``tokens`` into equal pieces whose activation has at most about ``PIECE_VALUES``."""
    count = min(tokens, -(-windows * tokens * channels // PIECE_VALUES))
    edges = [tokens * piece // count for piece in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _channels(down_proj: nn.Module) -> int:
    """Channels that go into a Linear ``[D, I]`` or a Conv1D ``[I, D]``."""
    weight = down_proj.get_parameter("weight")
    return weight.shape[1] if isinstance(down_proj, nn.Linear) else weight.shape[0]
