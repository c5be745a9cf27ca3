"""One open shard, memory-mapped or read by position, with the same methods."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef

IO = Literal["mmap", "read"]
"""How the bytes of a shard are read.

``mmap`` uses the page cache without a copy. But if the file shrinks or the disk fails in the middle
of a window, SIGBUS kills the process. ``read`` raises an error instead. That is better on network
file systems, where other machines may change a file.
"""

RELEASE_BYTES = 1 << 21
"""Pages are released in aligned pieces of this size: the system may map a whole huge page where
only one small page was touched."""

COMPARED_BYTES = 1 << 20
"""Two tensors are compared in pieces of this size."""

Bytes = NDArray[np.uint8]


class Buffer:
    """Memory that is reused for one window after another."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Return ``nbytes`` of any content; the next call returns the same memory."""
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes]


class ShardFile:
    """A shard that is read by position. Several threads may call ``read_into``."""

    io: ClassVar[IO] = "read"

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

    def fileno(self) -> int:
        """The file descriptor."""
        return self._file.fileno()

    @contextmanager
    def window(self, offset: int, nbytes: int, buffer: Buffer) -> Iterator[Bytes]:
        """Yield ``nbytes`` from ``offset``, read-only and valid until the block ends.

        They may lie in ``buffer``; nothing else may use it until then.

        Raises:
            CheckpointError: the shard ends early, or cannot be read.
        """
        data = buffer.take(nbytes)
        self.read_into(data.data, offset)
        yield data

    def windows(self, offset: int, nbytes: int, most: int) -> Iterator[memoryview]:
        """Yield ``nbytes`` from ``offset``, at most ``most`` at a time."""
        buffer = Buffer()
        for start in range(0, nbytes, most):
            with self.window(offset + start, min(most, nbytes - start), buffer) as data:
                yield data.data

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
                raise self.ended_early(offset)
            target, offset = target[count:], offset + count

    def _read_at(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.fileno(), [target], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(target)

    def ended_early(self, offset: int) -> CheckpointError:
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


class MappedShardFile(ShardFile):
    """A shard that is mapped whole; the pages of a window are released after its use.

    So only one window of it counts as memory of this process. A file that cannot be mapped is
    read. Only one thread may use it.
    """

    io: ClassVar[IO] = "mmap"

    def __init__(self, path: Path) -> None:
        """Open it; the first window maps it."""
        super().__init__(path)
        self._mapping: mmap.mmap | None = None

    def close(self) -> None:
        """Close the file and its mapping."""
        self._mapping = None  # the last reference: this closes the mapping
        super().close()

    @contextmanager
    def window(self, offset: int, nbytes: int, buffer: Buffer) -> Iterator[Bytes]:
        """As in ``ShardFile``; ``buffer`` is not used where the file can be mapped."""
        mapping = self._mapped(offset + nbytes) if nbytes else None
        if mapping is None:  # reading raises the right error, if there is one
            with super().window(offset, nbytes, buffer) as data:
                yield data
            return
        _count_mapped(nbytes)
        try:
            yield np.frombuffer(mapping, np.uint8, nbytes, offset)
        finally:
            self._release_pages(mapping, offset, offset + nbytes)

    def _mapped(self, end: int) -> mmap.mmap | None:
        """The mapping; None if the file ends before ``end`` or cannot be mapped."""
        try:
            if os.fstat(self.fileno()).st_size < end:
                return None
            if self._mapping is None or len(self._mapping) < end:
                self._mapping = mmap.mmap(self.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError):
            return None
        return self._mapping

    def _release_pages(self, mapping: mmap.mmap, start: int, end: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            self._mapping = None  # the next window maps the file anew
            return
        start -= start % RELEASE_BYTES
        end = min(end + -end % RELEASE_BYTES, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


_SHARD_FILES: dict[IO, type[ShardFile]] = {"mmap": MappedShardFile, "read": ShardFile}


def open_shard(path: Path, io: IO) -> ShardFile:
    """Open the shard ``path``.

    Raises:
        CheckpointError: it cannot be opened.
    """
    return _SHARD_FILES[io](path)


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


_mapped_bytes = 0
_count_lock = Lock()


def mapped_bytes() -> int:
    """Bytes that this process has used through mappings: the kernel counts only bytes read."""
    return _mapped_bytes


def _count_mapped(nbytes: int) -> None:
    global _mapped_bytes
    with _count_lock:
        _mapped_bytes += nbytes
