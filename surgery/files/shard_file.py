"""One open shard, read by position."""

import os
from collections.abc import Iterator
from io import FileIO
from mmap import PAGESIZE
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef

COMPARED_BYTES = 1 << 20
"""Two tensors are compared in pieces of this size."""

Bytes = NDArray[np.uint8]


class Buffer:
    """Memory that is reused for one window after another.

    It begins at a page. Where it does not, as numpy's own, the copy out of the page cache can be
    five times as slow on an AMD Zen 3, by where in a page the bytes of the file begin.
    """

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Return ``nbytes`` of any content; the next call returns the same memory."""
        if nbytes > len(self._memory):
            larger = np.empty(nbytes + PAGESIZE, np.uint8)
            self._memory = larger[-larger.ctypes.data % PAGESIZE :]
        return self._memory[:nbytes]


class ShardFile:
    """A shard that is read by position. Several threads may call ``read_into``."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            CheckpointError: it cannot be opened.
        """
        self.path = path
        try:
            self._file = FileIO(path)
        except OSError as error:
            raise self._unreadable(error) from error
        self._lock = Lock()

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def window(self, offset: int, nbytes: int, buffer: Buffer) -> Bytes:
        """Return ``nbytes`` from ``offset``, read into ``buffer``.

        Raises:
            CheckpointError: the shard ends early, or cannot be read.
        """
        data = buffer.take(nbytes)
        self.read_into(data.data, offset)
        return data

    def windows(self, offset: int, nbytes: int, most: int) -> Iterator[memoryview]:
        """Yield ``nbytes`` from ``offset``, at most ``most`` at a time, each in the same memory."""
        buffer = Buffer()
        for start in range(0, nbytes, most):
            yield self.window(offset + start, min(most, nbytes - start), buffer).data

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the bytes from ``offset``.

        Raises:
            CheckpointError: the shard ends early, or cannot be read.
        """
        while target:
            try:
                count = self._read_at(target, offset)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise self._ended_early(offset)
            target, offset = target[count:], offset + count

    def _read_at(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(target)

    def _ended_early(self, offset: int) -> CheckpointError:
        """The error of a shard that has become shorter than its header describes."""
        return CheckpointError(
            self.path,
            "shard ended early: it changed while it was read",
            expected=f"more than {offset} bytes",
            fix="bring it back as it was, then run again with `resume`",
        )

    def _unreadable(self, error: OSError) -> CheckpointError:
        """The error of a shard that could be read when its header was read."""
        return CheckpointError(
            self.path,
            "shard cannot be read any more",
            found=error.strerror,
            fix="bring it back, then run again with `resume`",
        )


def same_values(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; reads up to the first difference.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with ShardFile(first.path) as file, ShardFile(second.path) as other:
        pieces = file.windows(first.start, first.nbytes, COMPARED_BYTES)
        others = other.windows(second.start, second.nbytes, COMPARED_BYTES)
        return all(map(np.array_equal, pieces, others))
