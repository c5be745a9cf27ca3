"""safetensors headers: the dtype, shape and byte offset of each tensor in a shard."""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.files.strict_json import open_regular, parse_json

ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes per element of each safetensors dtype."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference parser."""

MAX_DIMENSIONS = 64
"""The limit of numpy and torch. Without one, a million large sizes would multiply for hours."""

MIN_BYTES = 10
"""The eight bytes of the header's length, and an empty JSON object."""

LFS_PREFIX = b"version "
"""The first bytes of a git-lfs pointer. A clone without git-lfs has pointers instead of shards."""

METADATA_KEY = "__metadata__"
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a shard: dtype, shape and position."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.parameters * self.itemsize


@dataclass(frozen=True)
class Header:
    """The validated header of one shard."""

    tensors: tuple[TensorRef, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]
    raw: bytes
    """The header's JSON as it is in the file; the source's fingerprint covers it."""


def read_header(path: Path) -> Header:
    """Read and validate the header of the safetensors file ``path``; no weights are read.

    Each tensor must start at the end of the one before it, and the last must end with the file.
    So a truncated shard is found here, and not while it is read.

    Raises:
        CheckpointError: truncated, or offsets that contradict the shapes, overlap or leave holes.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(path, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            path, "shard cannot be read", found=error.strerror, fix="check the model directory"
        ) from error
    header = parse_header(path, raw, size)
    check_reference(path)
    return header


def parse_header(path: Path, raw: bytes, size: int) -> Header:
    """Validate ``raw``, the header's JSON of the shard ``path`` of ``size`` bytes.

    Raises:
        CheckpointError: as ``read_header``.
    """
    length = len(raw)
    entries = parse_json(raw, path)
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(path, f"{METADATA_KEY} is not a map of strings", fix=AGAIN)
    data_start = 8 + length
    tensors = sorted(
        (_tensor(path, name, entry, data_start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.nbytes),
    )
    _check_cover(path, tensors, data_start, size)
    return Header(tuple(tensors), metadata, raw)


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], room: int = 0
) -> bytes:
    """Return the length and JSON that precede the data of ``(name, dtype, shape)`` in order.

    Spaces pad it to ``room`` bytes, as the format allows.
    """
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * max(-len(raw) % 8, room - len(raw) - 8)
    return struct.pack("<Q", len(raw)) + raw


def header_length(path: Path, prefix: bytes, size: int) -> int:
    """Return the length of the JSON that follows ``prefix``, the first 8 of ``size`` bytes.

    Raises:
        CheckpointError: as ``read_header``.
    """
    if prefix == LFS_PREFIX:
        raise CheckpointError(
            path, "is a git-lfs pointer, not the shard itself", fix="git lfs pull"
        )
    if size < MIN_BYTES:
        raise CheckpointError(
            path,
            "shard is truncated",
            expected=f"at least {MIN_BYTES} bytes",
            found=size,
            fix=AGAIN,
        )
    length = struct.unpack("<Q", prefix)[0]
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            path,
            "shard is truncated or not safetensors",
            expected=f"a header of 2 to {min(size - 8, MAX_HEADER_BYTES)} bytes",
            found=f"{length} bytes of header in a file of {size}",
            fix=AGAIN,
        )
    return int(length)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    where = f"{path}: tensor {name}"
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            where, "header entry is incomplete", expected="dtype, shape, data_offsets", fix=AGAIN
        ) from error
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(
            where,
            "dtype is not supported",
            expected=f"one of {' '.join(ITEMSIZE)}",
            found=dtype,
            fix="use an unquantized checkpoint",
        )
    if len(numbers) > MAX_DIMENSIONS + 2:
        raise CheckpointError(
            where,
            "has too many dimensions",
            expected=f"at most {MAX_DIMENSIONS}",
            found=len(shape),
            fix=AGAIN,
        )
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(where, "shape or offsets are not natural numbers", fix=AGAIN)
    tensor = TensorRef(name, path, dtype, tuple(shape), data_start + begin)
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            where,
            "data_offsets contradict the shape",
            expected=f"{tensor.nbytes} bytes for {dtype} {list(shape)}",
            found=f"data_offsets [{begin}, {end}]",
            fix=AGAIN,
        )
    return tensor


def _check_cover(path: Path, tensors: Sequence[TensorRef], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}",
                "overlaps its neighbour or leaves a hole",
                expected=f"data offset {position - data_start}",
                found=tensor.start - data_start,
                fix=AGAIN,
            )
        position += tensor.nbytes
    if position != size:
        last = f": tensor {tensors[-1].name}" if tensors else ""
        raise CheckpointError(
            f"{path}{last}",
            "shard is truncated" if size < position else "shard has bytes after its last tensor",
            expected=f"{position} bytes",
            found=size,
            fix=AGAIN,
        )


def check_reference(path: Path) -> None:
    """Check the file with the reference parser as well, which is fuzzed.

    Raises:
        CheckpointError: the reference parser refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    # Opening maps the file and reads only the header.
    try:
        with safe_open(os.fspath(path), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            path, "is not a valid safetensors file", found=error, fix=AGAIN
        ) from error
