"""One layer's FFN over a few tokens at a time, the input of its down_proj in view."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

PIECE_VALUES = 1 << 23
"""Values of one FFN activation at a time, tokens × I: 32 MiB in fp32.

In pieces of a quarter of this, a window of 2,048 tokens of the 8B shape took 1.3 × the time.
"""

See = Callable[[slice, torch.Tensor], torch.Tensor | None]
"""Called with the tokens of a piece and its input of down_proj ``(windows, tokens, I)``; what it
returns, if anything, goes into down_proj instead."""


@contextmanager
def watched_ffn(ffn: nn.Module, down_proj: nn.Module, channels: int, see: See) -> Iterator[None]:
    """Let ``ffn`` work on pieces of its tokens and show ``see`` each input of ``down_proj``.

    An FFN takes each token by itself, so pieces change nothing but the size of its activations:
    at I = 14,336 those of a window of 2,048 tokens take 350 MB whole and 90 MB in pieces.
    """
    whole, part = ffn.forward, slice(None)

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
        changed = see(part, inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    handle = down_proj.register_forward_pre_hook(pre_hook)
    ffn.forward = in_pieces
    try:
        yield
    finally:
        ffn.forward = whole
        handle.remove()


def pieces(windows: int, tokens: int, channels: int) -> list[slice]:
    """Cut ``tokens`` into equal pieces whose activation has at most about ``PIECE_VALUES``."""
    count = min(tokens, -(-windows * tokens * channels // PIECE_VALUES))
    edges = [tokens * piece // count for piece in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
