"""One open shard: mapped, or read into memory of ours, behind the same few calls."""

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

IO = Literal["mmap", "read"]
"""How the bytes of a shard are reached.

``mmap`` takes them from the page cache without a copy, but a file that shrinks, or a disk that
fails, in the middle of a window kills the process with SIGBUS. ``read`` gets an error there, which
is better on network file systems, where other machines may change a file.
"""

GIVEN_BACK_BYTES = 1 << 21
"""Pages are given back in aligned pieces of this: the system may map a huge page around one that
was touched."""

Bytes = NDArray[np.uint8]


class Buffer:
    """Memory for one window after the other."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Return ``nbytes`` of any content; they are the next call's as well."""
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes]


class ShardFile:
    """A shard that is read by position. Threads may share ``read_into``."""

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
        """Have ``nbytes`` from ``offset`` until the block ends, for reading only.

        They may lie in ``buffer``, which must not be in use for anything else until then.

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
        """What to say of a shard that has become shorter than its header says."""
        return CheckpointError(
            self.path,
            "shard ended early: it changed while it was read",
            expected=f"more than {offset} bytes",
            fix="bring it back as it was, then run again with `resume`",
        )

    def _unreadable(self, error: OSError) -> CheckpointError:
        """What to say of a shard that was there when its header was read."""
        return CheckpointError(
            self.path,
            "shard cannot be read any more",
            found=error.strerror,
            fix="bring it back, then run again with `resume`",
        )


class MappedShardFile(ShardFile):
    """A shard that is mapped whole; the pages of a window are given back when it has been used.

    So no more of it counts as memory of this process than a window. What cannot be mapped is read.
    One thread uses it.
    """

    io: ClassVar[IO] = "mmap"

    def __init__(self, path: Path) -> None:
        """Open it; it is mapped with its first window."""
        super().__init__(path)
        self._mapping: mmap.mmap | None = None

    def close(self) -> None:
        """Close the file and its mapping."""
        self._mapping = None  # with nothing left that refers to it, it is closed
        super().close()

    @contextmanager
    def window(self, offset: int, nbytes: int, buffer: Buffer) -> Iterator[Bytes]:
        """As for any shard; ``buffer`` is not used where the mapping has the bytes."""
        mapping = self._mapped(offset + nbytes) if nbytes else None
        if mapping is None:  # reading says what is wrong, if anything is
            with super().window(offset, nbytes, buffer) as data:
                yield data
            return
        _count_mapped(nbytes)
        try:
            yield np.frombuffer(mapping, np.uint8, nbytes, offset)
        finally:
            self._give_back(mapping, offset, offset + nbytes)

    def _mapped(self, end: int) -> mmap.mmap | None:
        """The mapping, where the file still reaches to ``end`` and can be mapped."""
        try:
            if os.fstat(self.fileno()).st_size < end:
                return None
            if self._mapping is None or len(self._mapping) < end:
                self._mapping = mmap.mmap(self.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError):
            return None
        return self._mapping

    def _give_back(self, mapping: mmap.mmap, start: int, end: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            self._mapping = None  # the next window maps the file anew
            return
        start -= start % GIVEN_BACK_BYTES
        end = min(end + -end % GIVEN_BACK_BYTES, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


KINDS: dict[IO, type[ShardFile]] = {"mmap": MappedShardFile, "read": ShardFile}


def open_shard(path: Path, io: IO) -> ShardFile:
    """Open the shard ``path``.

    Raises:
        CheckpointError: it cannot be opened.
    """
    return KINDS[io](path)


_mapped_bytes = 0
_counting = Lock()


def mapped_bytes() -> int:
    """Bytes that this process has used by mappings so far: its kernel counts only those read."""
    return _mapped_bytes


def _count_mapped(nbytes: int) -> None:
    global _mapped_bytes
    with _counting:
        _mapped_bytes += nbytes
