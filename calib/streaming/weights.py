"""Read weights of a checkpoint into torch tensors; choose dtype and device."""

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.streaming.settings import DEVICES, MICRO_BATCH_VALUES, ComputeOptions, PassSettings
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import read_scales
from surgery.checkpoint.opaque import opaque_matrices
from surgery.checkpoint.quantization import Opaque
from surgery.errors import SurgeryError, check_choice
from surgery.files.index_sets import runs
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import ShardFile
from surgery.hub.shards import SMALL_BYTES, Shards

TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INTEGER_DTYPE = {"I64": torch.int64, "I32": torch.int32}
"""Of tables, such as one with the experts of each token; they are never converted."""

FP8_DTYPE = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

BLOCK_BYTES = 1 << 20
"""Bytes of a tensor that are read before they are converted; they fit in the CPU's cache."""


CONVERTED_VALUES = 1 << 15
"""Values that are converted at a time as they are read. For so few, torch starts no threads, which
would wait for those that compute."""


class WeightReader:
    """Reads tensors from the shards of a checkpoint, in a given dtype and on a given device.

    FP8 weights are multiplied by their scales in float32 and rounded once, as the library does:
    to ``dtype``, or to ``dequantize`` if that is given. ``bytes_read`` counts the bytes that were
    read, so that a test can compare it with the file.

    A tensor has memory of its own, which is converted, pinned, and freed with its layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        dequantize: torch.dtype | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self._dequantize = dequantize or dtype
        self._checkpoint = checkpoint
        fp8 = checkpoint.quantization
        self._block_shape = fp8.block_shape if fp8 else (1, 1)
        self._tensors = checkpoint.tensors
        self._files: dict[Path, ShardFile] = {}
        self._shards = Shards.of(checkpoint.path)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._close_files()
        self._shards.__exit__(error_type)

    def expect(self, names: Sequence[str]) -> None:
        """Announce the tensors in reading order, so that each of a hub's shards is fetched once."""
        refs = [self._tensors[name] for name in names]
        self._shards.expect([{ref.path.name} for ref in refs if ref.nbytes > SMALL_BYTES])

    def read(self, name: str, *, convert: bool = False) -> torch.Tensor:
        """Return the whole tensor ``name`` on the CPU, in the file's dtype; FP8 is dequantized.

        FP8 codes cannot be merged as experts are, but the numbers that they encode can. So FP8 is
        dequantized here.

        Args:
            name: The tensor.
            convert: Where the CPU computes, return it in the compute dtype.

        Raises:
            CheckpointError: it is quantized in a format that is not decoded.
        """
        if (opaque := self._holds_codes(name)) is not None:
            return self._decoded(self._tensors[name], opaque)
        with self._at_hand(self._tensors[name]) as ref:
            if ref.dtype in INTEGER_DTYPE:
                return self._whole(ref, None)
            scales = self._scales(self._tensors[name])
            other = scales is None and TORCH_DTYPE[ref.dtype] != self.dtype
            if convert and other and self.device.type == "cpu":
                return self._converted(ref)
            return self._whole(ref, scales)

    def _holds_codes(self, name: str) -> Opaque | None:
        """Return the format of a tensor's codes, if it holds codes."""
        opaque, dtype = self._checkpoint.opaque, self._tensors[name].dtype
        plain = dtype in TORCH_DTYPE and not (
            opaque and opaque.codes and name.endswith(opaque.codes)
        )
        return None if plain else opaque

    def _decoded(self, ref: TensorRef, opaque: Opaque) -> torch.Tensor:
        """Decode a weight, one expert at a time where they are packed."""
        shape = opaque.shape_of(ref.shape, ref.dtype)
        result = self._memory(shape, self._dequantize)
        matrices = opaque_matrices(self._checkpoint, ref)
        for target, matrix in zip(result.view(-1, *shape[-2:]), matrices, strict=True):
            for first, window in matrix.windows():
                values = torch.from_numpy(window.decode(self._shards))
                target[first : first + len(values)].copy_(values)
                self.bytes_read += sum(each.nbytes for each in window.refs)
        return result

    def _whole(self, ref: TensorRef, scales: torch.Tensor | None) -> torch.Tensor:
        if scales is not None:
            result = self._memory(ref.shape, self._dequantize)
            return self._rows_into(result, ref, np.arange(ref.shape[0]), scales)
        stored = self._memory(ref.shape, (TORCH_DTYPE | INTEGER_DTYPE)[ref.dtype])
        self._fill(ref, raw(stored), ref.start)
        return stored

    def _converted(self, ref: TensorRef) -> torch.Tensor:
        """Convert values while they are in the cache: 2 ns a value; a whole tensor takes 10 ns."""
        result = pages(ref.shape, self.dtype)
        flat, offset = result.view(-1), ref.start
        block = torch.empty(CONVERTED_VALUES, dtype=TORCH_DTYPE[ref.dtype])
        for target in flat.split(CONVERTED_VALUES):
            stored = block[: len(target)]
            self._fill(ref, raw(stored), offset)
            target.copy_(stored)
            offset += stored.nbytes
        return result

    def to_device(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a tensor from ``read`` in the compute dtype and on the device."""
        if not stored.is_floating_point():
            return stored.to(self.device)
        if self.device.type != "cpu" or stored.dtype == self.dtype:
            return stored.to(self.device, self.dtype)
        return pages(stored.shape, self.dtype).copy_(stored)

    def rows(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Return the ascending ``rows`` of tensor ``name`` on the device: ``(len(rows), ...)``.

        They are converted a block at a time, so that no tensor is in memory in two dtypes.
        """
        if (opaque := self._holds_codes(name)) is not None:
            decoded = self._decoded(self._tensors[name], opaque)
            return self.to_device(decoded[torch.from_numpy(rows)])
        with self._at_hand(self._tensors[name]) as ref:
            result = torch.empty((len(rows), *ref.shape[1:]), dtype=self.dtype, device=self.device)
            return self._rows_into(result, ref, rows, self._scales(self._tensors[name]))

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an empty tensor on pages of its own, pinned ones if CUDA will copy from them."""
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return pages(shape, dtype)

    def _rows_into(
        self, result: torch.Tensor, ref: TensorRef, rows: np.ndarray, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """Fill ``result`` with ``rows``, a block at a time, and return it."""
        step = max(1, BLOCK_BYTES // (ref.nbytes // ref.shape[0]))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            stored = self._stored(ref, block)
            if scales is not None:
                stored = self._dequantized(stored, block, scales)
            result[start : start + step].copy_(stored)
        return result

    def _scales(self, ref: TensorRef) -> torch.Tensor | None:
        """Return float32 scales ``[block rows, block columns]`` of an FP8 weight, else None."""
        scales = self._checkpoint.scales_of(ref)
        if scales is None:
            return None
        self.bytes_read += scales.nbytes
        with self._shards.tensor(scales) as here:
            return torch.from_numpy(read_scales(here))

    def _dequantized(
        self, codes: torch.Tensor, rows: np.ndarray, scales: torch.Tensor
    ) -> torch.Tensor:
        """Return the numbers that ``rows`` of an FP8 weight encode; edge blocks may be partial."""
        block_rows, block_columns = self._block_shape
        per_row = scales[torch.from_numpy(rows // block_rows)]
        columns = torch.arange(codes.shape[1]) // block_columns
        return (codes.float() * per_row[:, columns]).to(self._dequantize)

    def _stored(self, ref: TensorRef, rows: np.ndarray) -> torch.Tensor:
        """Read ``rows`` in the file's dtype, with one positional read for each run of rows."""
        dtype = (TORCH_DTYPE | FP8_DTYPE)[ref.dtype]
        stored = torch.empty((len(rows), *ref.shape[1:]), dtype=dtype)
        row_bytes = ref.nbytes // ref.shape[0]
        target = raw(stored)
        starts, stops = runs(rows)
        for first, last in zip(starts.tolist(), stops.tolist(), strict=True):
            length = (last - first) * row_bytes
            self._fill(ref, target[:length], ref.start + first * row_bytes)
            target = target[length:]
        return stored

    @contextmanager
    def _at_hand(self, ref: TensorRef) -> Iterator[TensorRef]:
        """Fetch the bytes of a tensor to this disk; a remote shard is closed, as it is deleted."""
        with self._shards.tensor(ref) as here:
            yield here
            if self._shards.remote:
                self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _fill(self, ref: TensorRef, target: memoryview, offset: int) -> None:
        if ref.path not in self._files:
            self._files[ref.path] = ShardFile(ref.path)
        self._files[ref.path].read_into(target, offset)
        self.bytes_read += len(target)


def pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on pages of its own, which return to the system when it is freed.

    On the heap, layers leave holes among the activations. On the 8B shape, with 8 windows of 256
    tokens, the peak then grew by 10 MB with every layer.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, nbytes)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Transfer:
    """Copies from pinned memory on a CUDA stream of its own; does nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``stored`` on the device, and empty it. Called on the background thread.

        The copies are complete when this returns. The compute stream uses their memory, so this
        stream must not reuse the memory before the compute stream has finished with it.
        """
        if self._stream is None:
            return stored
        with torch.cuda.stream(self._stream):
            moved = {n: t.to(self._device, non_blocking=True) for n, t in stored.items()}
        self._stream.synchronize()
        stored.clear()
        computing = torch.cuda.default_stream(self._device)
        for tensor in moved.values():
            tensor.record_stream(computing)
        return moved


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(SurgeryError):
    """The requested device is not available."""


def choose_settings(compute: ComputeOptions, checkpoint: Checkpoint) -> PassSettings:
    """Return the fastest settings with the device and dtype of ``compute``, whatever its caps.

    Raises:
        DeviceError: as ``choose_device``.
    """
    device = choose_device(compute.device)
    dtype = choose_dtype(compute.dtype, checkpoint, device)
    hidden = "file" if compute.spill is not None else "memory"
    return PassSettings(device, dtype, MICRO_BATCH_VALUES, hidden=hidden, spill=compute.spill)


def choose_device(name: str) -> torch.device:
    """Return the device ``name``; "auto" is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: it is not available.
    """
    check_choice("device", name, DEVICES)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if name in available and not available[name]():
        raise DeviceError(
            f"`device` {name}",
            "is not available",
            fix=f"use `device` cpu, or a torch and a machine with {name}",
        )
    return torch.device(name)


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype ``name``; "auto" is float32 on the CPU, else the checkpoint's.

    CPUs are slow in 16 bits, and float32 holds every bf16 and fp16 weight exactly. For FP8 it is
    bf16, to which FP8 is dequantized.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    return TORCH_DTYPE.get(largest.dtype, torch.bfloat16)
