"""Hidden states of all windows between two layers: in memory, on the device, or in a file."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import torch

from calib.streaming.weights import pages, raw
from surgery.files.atomic import errors_name, sync_file
from surgery.files.shard_file import ShardFile

BLOCK_BYTES = 1 << 24
"""Bytes that are copied between a device and a file at a time."""


class HiddenStates:
    """Rows ``(tokens, D)`` in memory or on the device; every layer overwrites them.

    ``directory``, if given, holds two alternating files: ``hidden_0`` after an even number of
    layers, ``hidden_1`` after an odd one. So if a run is killed within a layer, the input of this
    layer is still on the disk.
    """

    syncs_in_background = True
    """Whether the next layer may compute while ``sync`` still runs."""

    def __init__(self, directory: Path | None = None, device: torch.device | None = None) -> None:
        self.before = torch.empty(0)
        """The input of the next layer."""
        self.after = self.before
        """Where the output of that layer is written."""
        self.passed = 0
        """Layers that the rows have passed."""
        self.wait_for_commit: Callable[[], object] = lambda: None
        """Returns once the older of the two files may be overwritten."""
        self._directory = directory
        self._device = device or torch.device("cpu")

    @property
    def _step(self) -> int:
        """Rows that are copied to or from a file at a time."""
        return max(1, BLOCK_BYTES // (self.before.shape[1] * self.before.itemsize))

    def allocate(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Allocate the rows."""
        if self._device.type == "cpu":
            self.before = pages((tokens, width), dtype)
        else:
            self.before = torch.empty((tokens, width), dtype=dtype, device=self._device)
        self.after = self.before

    def give_back(self, rows: slice) -> None:
        """Free the memory of ``rows``, which have passed the layer, where they are in a file."""

    def advance(self) -> None:
        """Count one more layer that all rows have passed, and write them; ``sync`` flushes them."""
        self.wait_for_commit()
        self.passed += 1
        if self._directory is not None:
            path = self._file(self.passed)
            with errors_name(path), open(path, "wb") as file:
                for rows in self.before.split(self._step):
                    file.write(raw(rows.cpu()))

    def sync(self) -> None:
        """Flush to the disk what ``advance`` wrote. Call it before the next ``advance``."""
        if self._directory is not None:
            with errors_name(self._file(self.passed)):
                sync_file(self._file(self.passed))

    def restore(self, passed: int) -> None:
        """Read the rows that an earlier run saved after ``passed`` layers."""
        self.passed = passed
        path = self._file(passed)
        with ShardFile(path) as file:
            offset = 0
            for rows in self.before.split(self._step):
                block = torch.empty_like(rows, device="cpu")
                file.read_into(raw(block), offset)
                rows.copy_(block)
                offset += block.nbytes

    def _file(self, passed: int) -> Path:
        assert self._directory is not None
        return self._directory / f"hidden_{passed % 2}"


class SwappedStates(HiddenStates):
    """Rows in memory whose input is kept while a layer writes its output: twice the memory."""

    def allocate(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Allocate the rows, and those of the output."""
        super().allocate(tokens, width, dtype)
        self.after = torch.empty_like(self.before)

    def advance(self) -> None:
        """Count one more layer, and swap input and output."""
        self.passed += 1
        self.before, self.after = self.after, self.before


class SpilledStates(HiddenStates):
    """Rows in two mapped files: a layer reads one and writes the other.

    Their pages are given back after every micro-batch, so that they do not count as memory of
    this process. The machine's free memory caches them.
    """

    syncs_in_background = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._maps: list[mmap.mmap] = []

    def allocate(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Create both files at full size, so that a full disk fails here and not within a layer."""
        self._nbytes = tokens * width * dtype.itemsize
        for passed in range(2):
            path = self._file(passed)
            with errors_name(path), open(path, "a+b") as file:
                reserve(file.fileno(), self._nbytes)
                self._maps.append(mmap.mmap(file.fileno(), self._nbytes))
        self._views = [torch.frombuffer(m, dtype=dtype).view(tokens, width) for m in self._maps]
        self._swap()

    def give_back(self, rows: slice) -> None:
        """Drop the pages of ``rows`` from this process; the system writes changed ones later."""
        if not hasattr(
            mmap, "MADV_DONTNEED"
        ):  # as on Windows, which takes pages when memory is short
            return
        row_bytes = self.before.shape[1] * self.before.itemsize
        start = rows.start * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(self._nbytes, rows.stop * row_bytes) - start
        for pages_of in self._maps:
            pages_of.madvise(mmap.MADV_DONTNEED, start, length)

    def advance(self) -> None:
        """Count one more layer, and swap the files."""
        self.passed += 1
        self._swap()

    def sync(self) -> None:
        """Flush to the disk what the layer wrote."""
        self._maps[self.passed % 2].flush()

    def restore(self, passed: int) -> None:
        """Continue with the file that an earlier run left after ``passed`` layers."""
        self.passed = passed
        self._swap()

    def _swap(self) -> None:
        self.before = self._views[self.passed % 2]
        self.after = self._views[(self.passed + 1) % 2]


def reserve(descriptor: int, nbytes: int) -> None:
    """Reserve ``nbytes`` of disk for a file, so that writing to its mapping cannot fail.

    Raises:
        OSError: the disk has no space.
    """
    os.ftruncate(descriptor, min(nbytes, os.fstat(descriptor).st_size))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
        return
    os.lseek(descriptor, 0, os.SEEK_END)
    while missing := nbytes - os.fstat(descriptor).st_size:
        os.write(descriptor, bytes(min(missing, BLOCK_BYTES)))
