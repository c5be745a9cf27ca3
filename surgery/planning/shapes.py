"""Shapes, parameters and bytes of an output, from headers alone; FP8 blocks are kept whole."""

import math
from collections.abc import Mapping
from math import lcm

import numpy as np

from surgery.checkpoint.fp8 import scale_grid
from surgery.errors import BudgetError, PlanError
from surgery.families.schema import VOCAB
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import ITEMSIZE, TensorRef
from surgery.layout.layout import Layout
from surgery.planning.plan import Shape
from surgery.planning.sizes import Sizes

DEQUANTIZE = "`dequantize` writes bf16, which can be pruned anywhere"


def blocks(layout: Layout) -> dict[str, int]:
    """Return key of config.json, or VOCAB → how many positions share one scale of an FP8 weight.

    Axes that no FP8 weight has are left out.
    """
    found: dict[str, int] = {}
    fp8 = layout.checkpoint.quantization
    if fp8 is None:
        return found
    for tensor in layout.by_name.values():
        if tensor.dtype == fp8.dtype:
            dims = layout.roles[tensor.name].slot.dims
            for dim, block in zip(dims, fp8.block_shape, strict=False):
                key = layout.key_of(dim)
                if key is not None:
                    found[key] = lcm(found.get(key, 1), block)
    return found


def check_blocks(layout: Layout, sizes: Sizes) -> None:
    """Refuse sizes that FP8 weights cannot have.

    Raises:
        BudgetError: a size is not in whole blocks, a vocabulary in FP8 would lose rows, or
            ``dequantize`` is asked of a checkpoint without FP8.
    """
    if sizes.dequantize:
        if layout.checkpoint.quantization is None:
            raise BudgetError(
                "`dequantize`",
                "has no effect: the checkpoint is not quantized",
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
    """Return the ascending numbers of the blocks that the ascending ``indices`` are made of.

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


def output_shape(layout: Layout, tensor: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of ``tensor`` under ``sizes``; scales follow their weight."""
    role, fp8 = layout.roles[tensor.name], layout.checkpoint.quantization
    if role.scales and fp8 is not None:
        weight = layout.checkpoint.tensors[fp8.weight_of(tensor.name)]
        rows, columns = output_shape(layout, weight, sizes)
        return scale_grid((rows, columns), fp8.block_shape)
    shape = list(tensor.shape)
    for number, dim in enumerate(role.slot.dims):
        key = layout.key_of(dim)
        if dim is not None and key is not None:
            length = sizes.vocab_size if key == VOCAB else sizes.widths[key]
            shape[number] = length * layout.unit(dim)
    return tuple(shape)


def output_dtype(layout: Layout, tensor: TensorRef, sizes: Sizes) -> str | None:
    """Return the safetensors dtype of ``tensor`` in the output; None where it is removed."""
    role = layout.roles[tensor.name]
    if role.dropped or (role.scales and sizes.dequantize):
        return None
    is_removed = sizes.layers and all(role.layer != group[0] for group in sizes.layers)
    if is_removed and role.layer is not None:
        return None
    is_fp8 = layout.checkpoint.scales_of(tensor) is not None
    return "BF16" if is_fp8 and sizes.dequantize else tensor.dtype


def shape_of(layout: Layout, sizes: Sizes) -> Shape:
    """Predict sizes, parameters and bytes of ``layout`` once it has ``sizes``."""
    nbytes = 0
    for tensor in layout.checkpoint.tensors.values():
        dtype = output_dtype(layout, tensor, sizes)
        if dtype is not None:
            nbytes += math.prod(output_shape(layout, tensor, sizes)) * ITEMSIZE[dtype]
    return Shape(
        sizes.vocab_size,
        dict(sizes.widths),
        len(sizes.layers) or layout.num_hidden_layers,
        layout.with_layers(sizes.layers).parameters(sizes.vocab_size, sizes.widths),
        nbytes,
    )


def axis_lengths(layout: Layout, widths: Mapping[str, int]) -> dict[str, int]:
    """Return channel axis → its length under ``widths``, for the axes that the model has."""
    return {
        axis: widths[width.key] * layout.times(axis)
        for axis, width in layout.family.widths.items()
        if width.key in widths
    }
