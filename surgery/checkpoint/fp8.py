"""FP8 weights with block scales: find and read the scales, decode exactly, dequantize to bf16."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.quantization import SCALE_SUFFIX
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import ShardFile
from surgery.hub.shards import Shards

Codes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Bf16Bits = NDArray[np.uint16]

STRIP_ROWS = 16
"""Rows looked up at once. An index takes eight bytes; the indices of a strip fit the cache."""

_CODES = np.arange(256, dtype=np.uint16)


def _e4m3() -> Float32:
    # In the fields of a half, a code is 2**8 too small: the exponent biases differ by 8.
    halves = ((_CODES & 0x80) << 8 | (_CODES & 0x7F) << 7).view(np.float16)
    values = halves.astype(np.float32) * np.float32(256)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _e8m0() -> Float32:
    # A code is the exponent of a float32, except for the lowest and the highest code.
    values = (_CODES.astype(np.uint32) << np.uint32(23)).view(np.float32)
    values[[0x00, 0xFF]] = 2.0**-127, np.nan
    return values


E4M3 = _e4m3()
"""The 256 values of F8_E4M3 (float8_e4m3fn): up to ±448, no infinity, NaN at 0x7F and 0xFF."""
E5M2 = (_CODES << 8).view(np.float16).astype(np.float32)
"""The 256 values of F8_E5M2: a half without its low byte, infinities and NaN included."""
E8M0 = _e8m0()
"""The 256 values of F8_E8M0, used only for scales: powers of two, NaN at 0xFF."""


def to_bf16(values: Float32) -> Bf16Bits:
    """Bits of ``values`` as bfloat16, rounded to nearest, ties to even; every NaN is 0x7FC0."""
    bits = values.view(np.uint32)
    tie_to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + tie_to_even)) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def from_bf16(bits: Bf16Bits) -> Float32:
    """The values of bfloat16 ``bits``, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


VALUES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
"""Safetensors dtype of an FP8 weight → the values of its codes."""

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
"""dtypes of scales in published checkpoints: DeepSeek F32, Qwen also BF16 or F16."""


def decode_scales(raw: Codes, dtype: str) -> Float32:
    """Decode the bytes ``raw`` of scales whose dtype is one of ``SCALE_DTYPES``."""
    if dtype == "F8_E8M0":
        return E8M0[raw]
    if dtype == "BF16":
        return from_bf16(raw.view("<u2"))
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def scale_grid(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight of ``shape``: one per block, partial blocks included."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def dequantize(
    codes: Codes,
    scales: Float32,
    first_row: int,
    first_col: int,
    block_shape: tuple[int, int],
    values: Float32 = E4M3,
) -> Bf16Bits:
    """Return the bits of a window of an FP8 weight as bfloat16.

    Each element is its code's value times its block's scale, multiplied in float32 and rounded
    once, as in transformers. A block has only 256 different results. So these are computed and the
    elements looked up: three times as fast as arithmetic on every element.

    Args:
        codes: ``(rows, cols)``, the window that starts at ``first_row``, ``first_col``.
        scales: Of the whole weight, with the shape ``scale_grid``; ``(1, 1)`` with a block as large
            as the weight is one scale for all.
        first_row: Row of the weight that the window starts at.
        first_col: Its column.
        block_shape: Rows and columns that share a scale.
        values: The values of the 256 codes, ``E4M3`` or ``E5M2``.
    """
    rows, cols = codes.shape
    result = np.empty((rows, cols), np.uint16)
    block_cols = np.arange(first_col, first_col + cols) // block_shape[1]
    columns, offsets = np.unique(block_cols, return_inverse=True)
    offsets *= len(values)
    block_rows = np.arange(first_row, first_row + rows) // block_shape[0]
    for block_row in np.unique(block_rows):
        start, stop = np.searchsorted(block_rows, (block_row, block_row + 1))
        with np.errstate(over="ignore", invalid="ignore"):  # the result shows it: inf or NaN
            table = to_bf16(scales[block_row, columns, None] * values)
        for row in range(start, stop, STRIP_ROWS):
            strip = slice(row, min(row + STRIP_ROWS, stop))
            # No index is out of range; with "clip", numpy does not copy the result.
            np.take(table, codes[strip] + offsets, out=result[strip], mode="clip")
    return result


AGAIN = "download the checkpoint again"
UNQUANTIZED = "use the unquantized checkpoint"


def read_scales(tensor: TensorRef) -> Float32:
    """Read the scales of an FP8 weight from their shard: usually one for 16,384 weights.

    Raises:
        CheckpointError: the shard ends early.
    """
    raw = np.empty(tensor.nbytes, np.uint8)
    with ShardFile(tensor.path) as shard:
        shard.read_into(raw.data, tensor.start)
    return decode_scales(raw, tensor.dtype).reshape(tensor.shape)


WINDOW_VALUES = 1 << 18
"""Values of a weight that are decoded at a time."""


def weight_windows(
    checkpoint: Checkpoint, weight: TensorRef, shards: Shards
) -> Iterator[tuple[int, Float32]]:
    """Yield the values of a weight in order, with the number of each window's first one.

    A window has whole rows and ends with a matrix of a packed tensor.

    Args:
        checkpoint: The checkpoint of the weight.
        weight: The weight; its dtype is a float's, or FP8 with block scales.
        shards: Where its bytes are found.
    """
    *outer, rows, columns = weight.shape
    scales = checkpoint.scales_of(weight)
    fp8, grid = checkpoint.quantization, None
    if scales is not None:
        with shards.tensor(scales) as here:
            grid = read_scales(here)
    step, width = max(1, WINDOW_VALUES // columns), columns * weight.itemsize
    with shards.tensor(weight) as here, ShardFile(here.path) as shard:
        for matrix in range(math.prod(outer)):
            for row in range(0, rows, step):
                first, count = matrix * rows + row, min(step, rows - row)
                raw = np.empty(count * width, np.uint8)
                shard.read_into(raw.data, here.start + first * width)
                if fp8 is not None and grid is not None:
                    codes, block = raw.reshape(count, columns), fp8.block_shape
                    bits = dequantize(codes, grid, row, 0, block, VALUES[weight.dtype])
                    yield first * columns, from_bf16(bits).reshape(-1)
                else:
                    yield first * columns, decode_scales(raw, weight.dtype)


def weight_of(checkpoint: Checkpoint, scales: TensorRef) -> TensorRef | None:
    """Return the weight of the tensor ``scales``; None if its name is not that of scales.

    Raises:
        CheckpointError: scales without an FP8 weight, or without a quantization_config.
    """
    if not scales.name.endswith(SCALE_SUFFIX):
        return None
    if checkpoint.quantization is None:
        raise CheckpointError(
            _where(scales),
            "holds scales of FP8 weights, but config.json has no quantization_config",
            fix="download config.json again",
        )
    name = checkpoint.quantization.weight_of(scales.name)
    weight = checkpoint.tensors.get(name)
    if weight is None or weight.dtype != checkpoint.quantization.dtype:
        raise CheckpointError(
            _where(scales),
            "holds scales without their weight",
            expected=f"a tensor {name} of {checkpoint.quantization.dtype}",
            found=weight.dtype if weight else "none",
            fix=AGAIN,
        )
    return weight


def check_weight(checkpoint: Checkpoint, weight: TensorRef) -> None:
    """Check an FP8 tensor against its scales and config.json.

    Raises:
        CheckpointError: another FP8 dtype than in config.json, or not a matrix, or scales that are
            missing or not one per block.
    """
    fp8, where = checkpoint.quantization, _where(weight)
    if fp8 is None or weight.dtype != fp8.dtype:
        raise CheckpointError(
            where,
            "is FP8 of a kind that config.json's quantization_config does not name",
            expected="BF16 or F16 or F32" + (f" or {fp8.dtype}" if fp8 else ""),
            found=weight.dtype,
            fix=f"download config.json again, or {UNQUANTIZED}",
        )
    if len(weight.shape) != 2:
        raise CheckpointError(
            where,
            "is FP8 but no matrix: experts packed into one tensor are not supported in FP8",
            expected="two dimensions",
            found=list(weight.shape),
            fix=UNQUANTIZED,
        )
    scales = checkpoint.scales_of(weight)
    if scales is None:
        raise CheckpointError(
            where, "has no scales", expected=f"a tensor {fp8.scales_of(weight.name)}", fix=AGAIN
        )
    grid = scale_grid((weight.shape[0], weight.shape[1]), fp8.block_shape)
    if scales.shape != grid or scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            _where(scales),
            f"is not one scale for each block of {list(fp8.block_shape)} of its weight "
            f"{list(weight.shape)}",
            expected=f"{' or '.join(SCALE_DTYPES)} {list(grid)}",
            found=f"{scales.dtype} {list(scales.shape)}",
            fix="check weight_block_size in config.json",
        )


def _where(tensor: TensorRef) -> str:
    return f"{tensor.path}: tensor {tensor.name}"
