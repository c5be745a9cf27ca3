"""Channels of FP8 weights, which go and stay in the blocks that share a scale."""

from math import lcm

import numpy as np

from surgery.budget import Sizes
from surgery.errors import BudgetError, PlanError
from surgery.family import VOCAB
from surgery.layout import Layout
from surgery.selection import MAKE_AGAIN

DEQUANTIZE = "`dequantize` writes bf16, which can be cut anywhere"


def blocks(layout: Layout) -> dict[str, int]:
    """Key of config.json, or VOCAB → positions that an FP8 weight has under one scale.

    Axes that no FP8 weight has are not in it.
    """
    found: dict[str, int] = {}
    fp8 = layout.checkpoint.quantization
    if fp8 is None:
        return found
    for tensor in layout.by_name.values():
        if tensor.dtype == fp8.dtype:
            dims = layout.places[tensor.name].slot.dims
            for dim, block in zip(dims, fp8.block_shape, strict=False):
                key = layout.key_of(dim)
                if key is not None:
                    found[key] = lcm(found.get(key, 1), block)
    return found


def check_blocks(layout: Layout, sizes: Sizes) -> None:
    """Refuse a cut that FP8 weights cannot follow.

    Raises:
        BudgetError: a size that is not whole blocks, rows of a vocabulary in FP8, or bf16 asked of
            a checkpoint that has no FP8.
    """
    if sizes.dequantize:
        if layout.checkpoint.quantization is None:
            raise BudgetError(
                "`dequantize`",
                "has nothing to do: the checkpoint is not quantized",
                fix="leave it out",
            )
        return
    found = blocks(layout)
    if VOCAB in found and sizes.vocab_size != layout.vocab_size:
        raise BudgetError(
            "`vocab_size`",
            "cannot change: the rows of this vocabulary are FP8 and share scales",
            expected=layout.vocab_size,
            found=sizes.vocab_size,
            fix=DEQUANTIZE,
        )
    for key, size in sizes.widths.items():
        block, full = found.get(key, 1), layout.widths[key]
        if size != full and (size % block or full % block):
            raise BudgetError(
                key,
                f"is not in whole blocks of {block} channels, which share an FP8 scale",
                expected=f"multiples of {block} before and after",
                found=f"{full} and {size}",
                fix=f"choose another size; or {DEQUANTIZE}",
            )


def whole_blocks(indices: np.ndarray, block: int, where: str) -> np.ndarray:
    """Ascending numbers of the blocks that the ascending ``indices`` are made of.

    Raises:
        PlanError: a block is not whole.
    """
    numbers = indices[::block] // block
    if not np.array_equal(indices, (numbers[:, None] * block + np.arange(block)).reshape(-1)):
        raise PlanError(
            where,
            "kept_channels are not whole blocks, which share an FP8 scale",
            expected=f"blocks of {block}",
            fix=MAKE_AGAIN,
        )
    return numbers
