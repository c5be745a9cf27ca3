"""Weights stored as codes and parts: decoded window by window, and where they can be cut."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import E8M0, VALUES, Codes, Float32, decode_scales
from surgery.checkpoint.quantization import Opaque
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import ShardFile
from surgery.hub.shards import Shards

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 16 values of FP4 (E2M1), of which a byte holds two, the first in its low half."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's kernels for GEMM have the codes of 8 outputs in an int32."""


SHAPE = ".weight_shape"
"""Ending of the tensor that holds a weight's rows and columns as numbers."""

SCALES = (".weight_scale", ".weight_scale_inv")
"""Endings of the names of a weight's scales."""

ZEROS = ".weight_zero_point"
"""Ending of the name of a weight's zero points."""

GLOBAL = (".weight_global_scale", ".weight_scale_2")
"""Endings of the scale of NVFP4's scales; the first divides, the second multiplies."""

EXPONENTS = ("U8", "F8_E8M0")
"""Dtypes of scales that are powers of two."""

G_IDX = ".weight_g_idx"
"""Ending of the tensor that gives each column a group, where groups are no neighbours."""

WINDOW_VALUES = 1 << 20
"""Values that are decoded at a time, if codes are stored row by row. They take 4 bytes each, and
some 20 more while they are decoded."""

ALIGNED_ROWS = 128
"""Windows begin at multiples of this or of a block, for zero points are packed along rows."""


def opaque_parts(checkpoint: Checkpoint, codes: TensorRef) -> dict[str, TensorRef]:
    """Return ending → tensor of what is stored beside the tensor ``codes``."""
    opaque = checkpoint.opaque
    if opaque is None:
        return {}
    names = {ending: opaque.base_of(codes.name) + ending for ending in opaque.beside}
    return {end: checkpoint.tensors[n] for end, n in names.items() if n in checkpoint.tensors}


def codes_of(checkpoint: Checkpoint, part: TensorRef) -> TensorRef | None:
    """Return the codes that the tensor ``part`` belongs to, which may be itself."""
    opaque = checkpoint.opaque
    stored = opaque.weight_of(part.name) if opaque else None
    if opaque is None or stored is None or not stored[1]:
        return part
    base = stored[0].removesuffix(opaque.weight)
    names = (base + opaque.codes, stored[0]) if opaque.codes else (stored[0],)
    return next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)


def steps_of(checkpoint: Checkpoint, part: TensorRef) -> tuple[int, ...]:
    """Return how many positions of the weight an entry stands for, per dimension; 0: for all.

    ``()`` where rows and columns cannot be removed: the layout is not by rows, or is not known.

    Args:
        checkpoint: A checkpoint in the format ``checkpoint.opaque``.
        part: Codes of a weight, or what is stored beside them.
    """
    opaque, codes = checkpoint.opaque, codes_of(checkpoint, part)
    if opaque is None or codes is None or not opaque.by_rows or len(codes.shape) != 2:
        return ()
    if opaque.variant == "transformed" or opaque.base_of(codes.name) + G_IDX in checkpoint.tensors:
        return ()
    if part.name == codes.name:
        return 1, opaque.values_of(codes.dtype)
    return grid_of(checkpoint, part, codes)[: len(part.shape)]


def held_of(checkpoint: Checkpoint, codes: TensorRef) -> Opaque:
    """Return what config.json says of the weight that ``codes`` belong to.

    Raises:
        CheckpointError: none of its groups has the module.
    """
    opaque = checkpoint.opaque
    assert opaque is not None
    module = opaque.base_of(codes.name)
    found = opaque.of(module)
    if found is None:
        raise CheckpointError(
            where_of(codes),
            "is quantized, but config.json does not say how",
            expected=f"{module}, a pattern of it or Linear in the targets of a config_group",
            fix="add it to its group in quantization_config",
        )
    return found


def grid_of(checkpoint: Checkpoint, part: TensorRef, codes: TensorRef) -> tuple[int, int]:
    """Return the rows and columns that share an entry of ``part``; 0: all."""
    if not part.name.endswith((*SCALES, ZEROS)):
        return 0, 0
    held = held_of(checkpoint, codes)
    grid = {"tensor": (0, 0), "channel": (1, 0), "group": (1, held.group)}.get(held.strategy)
    grid = held.block or grid
    if grid is None:  # not said: FP4 has its groups by definition
        exponents = part.dtype in EXPONENTS
        by_row = (0, 0) if math.prod(part.shape) == 1 else (1, 0)
        grid = (1, 32) if exponents else (1, 16) if codes.dtype == "U8" else by_row
    packed = part.name.endswith(ZEROS) and codes.dtype == "I32"
    return grid[0] * (held.values_of(codes.dtype) if packed else 1), grid[1]


@dataclass(frozen=True)
class OpaqueMatrix:
    """A matrix of an opaque weight: a weight of its own, one expert of a packed one, or rows."""

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

    @property
    def window_rows(self) -> int:
        """Rows that are decoded at a time."""
        rows, columns = self.shape
        if not self.opaque.by_rows:
            return rows
        step = math.lcm(ALIGNED_ROWS, self.opaque.block[0] if self.opaque.block else 1)
        return min(rows, max(1, WINDOW_VALUES // (columns * step)) * step)

    def windows(self) -> Iterator[tuple[int, "OpaqueMatrix"]]:
        """Yield the rows that are decoded at a time, with the number of the first."""
        rows, step = self.shape[0], self.window_rows
        if step == rows:
            yield 0, self
            return
        for first in range(0, rows, step):
            yield first, self._rows(first, min(step, rows - first))

    def _rows(self, first: int, count: int) -> "OpaqueMatrix":
        rows = self.shape[0]
        parts = {}
        for ending, ref in self.parts.items():
            size = ref.shape[0] if ref.shape else 1
            block = self.opaque.block[0] if self.opaque.block else -(-rows // size)
            parts[ending] = ref
            if size > 1 and ending != SHAPE:
                start, stop = first // block, -(-(first + count) // block)
                parts[ending] = _rows_of(ref, start, stop - start)
        return replace(self, codes=_rows_of(self.codes, first, count), parts=parts)

    def decode(self, shards: Shards) -> Float32:
        """Read and decode it, multiplied in float32; ``shards`` say where bytes are found.

        Raises:
            CheckpointError: the format is not decoded.
        """
        codes = read_array(self.codes, shards)
        parts = {ending: read_array(ref, shards) for ending, ref in self.parts.items()}
        if self.opaque.method == "mxfp4":
            return np.ascontiguousarray(decode_mxfp4(codes, parts["_scales"]).T)
        return _opaque_matrix(self.opaque, self.codes, codes, parts)


def opaque_matrices(checkpoint: Checkpoint, codes: TensorRef) -> list[OpaqueMatrix]:
    """Return the matrices of a weight of ``checkpoint.opaque``, expert by expert if packed."""
    opaque, parts = checkpoint.opaque, opaque_parts(checkpoint, codes)
    assert opaque is not None
    if opaque.method != "mxfp4":
        return [OpaqueMatrix(held_of(checkpoint, codes), codes, parts)]
    return [
        OpaqueMatrix(opaque, _row(codes, n), {end: _row(ref, n) for end, ref in parts.items()})
        for n in range(codes.shape[0])
    ]


def _row(ref: TensorRef, number: int) -> TensorRef:
    """Return one entry of a tensor's first dimension as a tensor of its own."""
    return replace(_rows_of(ref, number, 1), shape=ref.shape[1:])


def _rows_of(ref: TensorRef, first: int, count: int) -> TensorRef:
    """Return ``count`` entries of a tensor's first dimension as a tensor of its own."""
    start = ref.start + first * (ref.nbytes // ref.shape[0])
    return replace(ref, start=start, shape=(count, *ref.shape[1:]))


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
    unknown |= G_IDX in parts
    if opaque.method == "gptq" and not unknown:
        return _gptq(opaque, codes, parts)
    if opaque.method == "awq" and opaque.bits == 4 and opaque.variant in ("", "gemm", "GEMM"):
        return _awq(codes, parts)
    scales = next((parts[ending] for ending in SCALES if ending in parts), None)
    if unknown or opaque.method in ("gptq", "awq") or scales is None:
        raise CheckpointError(
            where_of(ref),
            f"is {opaque.method} of a kind that is not decoded",
            fix="calibrate the unquantized checkpoint, or choose experts at random",
        )
    zeros = parts.get(ZEROS)
    if ref.dtype == "I32":
        values = _unpacked(codes, opaque.bits)
        if zeros is None:
            return _times(opaque, values - float(1 << (opaque.bits - 1)), scales)
        zeros = np.ascontiguousarray(_unpacked(np.ascontiguousarray(zeros.T), opaque.bits).T)
        return _times(opaque, values - _spread(opaque, zeros[: len(values)], values.shape), scales)
    if ref.dtype == "U8":
        for ending, power in zip(GLOBAL, (-1, 1), strict=True):
            if ending in parts:
                scales = scales * parts[ending].reshape(()) ** power
        return _times(opaque, _fp4(codes), scales)
    values = codes.astype(np.float32)
    if zeros is not None:
        values -= _spread(opaque, zeros.astype(np.float32), values.shape)
    return _times(opaque, values, scales)


def _unpacked(codes: NDArray[Any], bits: int) -> Float32:
    """Return the codes in each int32 along the last axis, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits)
    values = codes.view(np.uint32)[..., None] >> shifts.astype(np.uint32) & (1 << bits) - 1
    return values.reshape(*codes.shape[:-1], -1).astype(np.float32)


def _times(opaque: Opaque, values: Float32, scales: NDArray[Any]) -> Float32:
    """Multiply ``[out, in]`` by scales; as bytes, these are exponents (E8M0)."""
    wide = E8M0[scales] if scales.dtype == np.uint8 else scales.astype(np.float32, copy=False)
    result: Float32 = values * _spread(opaque, wide, values.shape)
    return result


def _spread(opaque: Opaque, entries: Float32, shape: tuple[int, ...]) -> Float32:
    """Return an entry for each position: one for all, for a row, a group of a row, or a block."""
    if entries.size == 1:
        return entries.reshape(1, 1)
    rows, columns = shape
    if opaque.block and entries.ndim == 2:
        entries = np.repeat(entries, opaque.block[0], axis=0)[:rows]
        return np.repeat(entries, opaque.block[1], axis=1)[:, :columns]
    groups = entries.reshape(rows, -1)
    return groups if groups.shape[1] == 1 else np.repeat(groups, columns // groups.shape[1], axis=1)


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


def read_array(ref: TensorRef, shards: Shards) -> NDArray[Any]:
    """Read a whole tensor: integers as they are, floats as float32."""
    raw = np.empty(ref.nbytes, np.uint8)
    with shards.tensor(ref) as here, ShardFile(here.path) as shard:
        shard.read_into(raw.data, here.start)
    integers = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "I64": "<i8"}
    if ref.dtype in integers:
        return raw.view(integers[ref.dtype]).reshape(ref.shape)
    if ref.dtype in VALUES:
        return VALUES[ref.dtype][raw].reshape(ref.shape)
    return decode_scales(raw, ref.dtype).reshape(ref.shape)


def where_of(tensor: TensorRef) -> str:
    """Name a tensor and its file, for errors."""
    return f"{tensor.path}: tensor {tensor.name}"
