"""Weights from a checkpoint into torch tensors, every byte read at most once."""

import math
import mmap
import os
from pathlib import Path

import numpy as np
import torch

from surgery.checkpoint import Checkpoint
from surgery.header import TensorRef
from surgery.selection import runs
from surgery.stream import read_into

TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

BLOCK_BYTES = 1 << 20
"""Bytes of a tensor that are read before they are converted; they stay in the cache."""


class WeightReader:
    """Positional reads from the shards of a checkpoint, in the dtype and on the device asked for.

    ``bytes_read`` counts what was read, so that a test can hold it against the file.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self._tensors = checkpoint.tensors
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor ``name`` whole, on the CPU and in the file's dtype."""
        ref = self._tensors[name]
        stored = _pages(ref.shape, TORCH_DTYPE[ref.dtype])
        self._fill(ref, _raw(stored), ref.start)
        return stored

    def place(self, stored: torch.Tensor) -> torch.Tensor:
        """Return what ``read`` gave in the dtype and on the device asked for."""
        if self.device.type != "cpu" or stored.dtype == self.dtype:
            return stored.to(self.device, self.dtype)
        return _pages(stored.shape, self.dtype).copy_(stored)

    def rows(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Return the ascending ``rows`` of tensor ``name``, placed: ``(len(rows), ...)``.

        They are converted a block at a time, so that no tensor is in memory in two dtypes.
        """
        ref = self._tensors[name]
        result = torch.empty((len(rows), *ref.shape[1:]), dtype=self.dtype, device=self.device)
        step = max(1, BLOCK_BYTES // (ref.nbytes // ref.shape[0]))
        for start in range(0, len(rows), step):
            result[start : start + step].copy_(self._stored(ref, rows[start : start + step]))
        return result

    def _stored(self, ref: TensorRef, rows: np.ndarray) -> torch.Tensor:
        """Read ``rows`` as the file has them, a positional read for each run of rows."""
        stored = torch.empty((len(rows), *ref.shape[1:]), dtype=TORCH_DTYPE[ref.dtype])
        row_bytes = ref.nbytes // ref.shape[0]
        target = _raw(stored)
        starts, stops = runs(rows)
        for first, last in zip(starts.tolist(), stops.tolist(), strict=True):
            length = (last - first) * row_bytes
            self._fill(ref, target[:length], ref.start + first * row_bytes)
            target = target[length:]
        return stored

    def _fill(self, ref: TensorRef, target: memoryview, offset: int) -> None:
        if ref.path not in self._files:
            self._files[ref.path] = os.open(ref.path, os.O_RDONLY)
        read_into(ref.path, self._files[ref.path], target, offset)
        self.bytes_read += len(target)


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return memory on pages of its own, which go back to the system when it is freed.

    On the heap, layers leave holes among the activations: on the 8B shape, with 8 windows of 256
    tokens, the peak then grew by 10 MB with every layer.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
