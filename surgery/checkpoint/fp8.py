"""Quantized weights: find and read their scales, decode exactly, dequantize FP8 to bf16."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.quantization import SCALE_SUFFIX, Opaque
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import open_shard
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
    with open_shard(tensor.path, "read") as shard:  # decoding copies them anyway
        shard.read_into(raw.data, tensor.start)
    return decode_scales(raw, tensor.dtype).reshape(tensor.shape)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 16 values of FP4 (E2M1), of which a byte holds two, the first in its low half."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's kernels for GEMM have the codes of 8 outputs in an int32."""


def opaque_parts(checkpoint: Checkpoint, codes: TensorRef) -> dict[str, TensorRef]:
    """Return ending → tensor of what is stored beside the tensor ``codes``."""
    opaque = checkpoint.opaque
    if opaque is None:
        return {}
    names = {ending: opaque.base_of(codes.name) + ending for ending in opaque.beside}
    return {end: checkpoint.tensors[n] for end, n in names.items() if n in checkpoint.tensors}


@dataclass(frozen=True)
class OpaqueMatrix:
    """A matrix of an opaque weight: a weight of its own, or one expert of a packed one."""

    opaque: Opaque
    codes: TensorRef
    parts: Mapping[str, TensorRef]
    """Ending → what is stored beside the codes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns in the unquantized model."""
        codes = self.codes.shape
        whole = (1, *codes) if self.opaque.method == "mxfp4" else codes
        rows, columns = self.opaque.shape_of(whole, self.codes.dtype)[-2:]
        return rows, columns

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All that is read to decode it."""
        return self.codes, *self.parts.values()

    def decode(self, shards: Shards) -> Float32:
        """Read and decode it, multiplied in float32; ``shards`` say where bytes are found.

        Raises:
            CheckpointError: the format is not decoded.
        """
        codes = _array(self.codes, shards)
        parts = {ending: _array(ref, shards) for ending, ref in self.parts.items()}
        if self.opaque.method == "mxfp4":
            return np.ascontiguousarray(decode_mxfp4(codes, parts["_scales"]).T)
        return _opaque_matrix(self.opaque, self.codes, codes, parts)


def opaque_matrices(checkpoint: Checkpoint, codes: TensorRef) -> list[OpaqueMatrix]:
    """Return the matrices of a weight of ``checkpoint.opaque``, expert by expert if packed."""
    opaque, parts = checkpoint.opaque, opaque_parts(checkpoint, codes)
    assert opaque is not None
    if opaque.method != "mxfp4":
        return [OpaqueMatrix(opaque, codes, parts)]
    return [
        OpaqueMatrix(opaque, _row(codes, n), {end: _row(ref, n) for end, ref in parts.items()})
        for n in range(codes.shape[0])
    ]


def _row(ref: TensorRef, number: int) -> TensorRef:
    """Return one entry of a tensor's first dimension as a tensor of its own."""
    step = ref.nbytes // ref.shape[0]
    return replace(ref, start=ref.start + number * step, shape=ref.shape[1:])


def decode_mxfp4(blocks: Codes, scales: Codes) -> Float32:
    """Return ``(rows, 32 · groups)`` of bytes ``(rows, groups, 16)``, each two codes of E2M1.

    Scales ``(rows, groups)`` are powers of two (E8M0). Source: OCP Microscaling Formats v1.0.
    """
    return (_fp4(blocks) * E8M0[scales][..., None]).reshape(len(blocks), -1)


def _fp4(packed: Codes) -> Float32:
    """Return the two values of each byte, along the last axis."""
    pairs = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return E2M1[pairs].reshape(*packed.shape[:-1], -1)


Arrays = Mapping[str, NDArray[Any]]


def _opaque_matrix(opaque: Opaque, ref: TensorRef, codes: NDArray[Any], parts: Arrays) -> Float32:
    """Decode ``[out, in]`` by the method of ``opaque``; ``parts`` are by their endings."""
    unknown = opaque.variant == "transformed" or opaque.bits not in (4, 8)
    unknown |= ".weight_zero_point" in parts or ".weight_g_idx" in parts
    if opaque.method == "gptq" and not unknown:
        return _gptq(opaque, codes, parts)
    if opaque.method == "awq" and opaque.bits == 4 and opaque.variant in ("", "gemm", "GEMM"):
        return _awq(codes, parts)
    scales = next((parts[e] for e in (".weight_scale", ".weight_scale_inv") if e in parts), None)
    if unknown or opaque.method in ("gptq", "awq") or scales is None:
        raise CheckpointError(
            _where(ref),
            f"is {opaque.method} of a kind that is not decoded",
            fix="calibrate the unquantized checkpoint, or choose experts at random",
        )
    if ref.dtype == "I32":
        return _times(_unpacked(codes, opaque.bits) - float(1 << (opaque.bits - 1)), scales)
    if ref.dtype == "U8":
        for ending, power in ((".weight_global_scale", -1), (".weight_scale_2", 1)):
            if ending in parts:
                scales = scales * parts[ending].reshape(()) ** power
        return _times(_fp4(codes), scales)
    return _times(codes, scales)


def _unpacked(codes: NDArray[Any], bits: int) -> Float32:
    """Return the codes in each int32 along the last axis, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits)
    values = codes.view(np.uint32)[..., None] >> shifts.astype(np.uint32) & (1 << bits) - 1
    return values.reshape(*codes.shape[:-1], -1).astype(np.float32)


def _times(values: Float32, scales: Float32) -> Float32:
    """Multiply ``[out, in]`` by scales: one for all, one a row, or one for each group of a row."""
    if scales.size == 1:
        return values * np.float32(scales.reshape(()))
    groups = scales.reshape(len(values), -1)
    grouped = values.reshape(len(values), groups.shape[1], -1) * groups[..., None]
    return grouped.astype(np.float32, copy=False).reshape(values.shape)


def _gptq(opaque: Opaque, codes: NDArray[Any], parts: Arrays) -> Float32:
    """Decode GPTQ: codes ``[in / n, out]``, zero points ``[groups, out / n]`` less one.

    The format ``gptq_v2`` stores zero points as they are.
    """
    values = _unpacked(np.ascontiguousarray(codes.T), opaque.bits)  # [out, in]
    scales = parts[".scales"]
    zeros = _unpacked(parts[".qzeros"], opaque.bits) + (opaque.variant != "gptq_v2")
    group = np.arange(values.shape[1]) // (values.shape[1] // len(scales))
    group = parts.get(".g_idx", group)
    result: Float32 = (values - zeros[group].T) * scales[group].T
    return result


def _awq(codes: NDArray[Any], parts: Arrays) -> Float32:
    """Decode AWQ: codes ``[in, out / 8]`` and zero points ``[groups, out / 8]``, interleaved."""

    def ordered(packed: NDArray[Any]) -> Float32:
        values = _unpacked(packed, 4)
        return values.reshape(len(values), -1, 8)[..., AWQ_ORDER].reshape(values.shape)

    values, scales = ordered(codes), parts[".scales"]
    group = np.arange(len(values)) // (len(values) // len(scales))
    result = (values - ordered(parts[".qzeros"])[group]) * scales[group]
    return np.ascontiguousarray(result.T)


def _array(ref: TensorRef, shards: Shards) -> NDArray[Any]:
    """Read a whole tensor: integers as they are, floats as float32."""
    raw = np.empty(ref.nbytes, np.uint8)
    with shards.tensor(ref) as here, open_shard(here.path, "read") as shard:
        shard.read_into(raw.data, here.start)
    integers = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "I64": "<i8"}
    if ref.dtype in integers:
        return raw.view(integers[ref.dtype]).reshape(ref.shape)
    if ref.dtype in VALUES:
        return VALUES[ref.dtype][raw].reshape(ref.shape)
    return decode_scales(raw, ref.dtype).reshape(ref.shape)


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
    with shards.tensor(weight) as here, open_shard(here.path, "read") as shard:
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
