"""Files that are there whole or not at all, whatever happens while they are written."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that cannot sync a directory."""


class NewFile:
    """A file under a temporary name, until ``commit`` gives it its own."""

    def __init__(self, path: Path, attempt: str = "") -> None:
        """Open it to read and write.

        Args:
            path: Its name in the end; a file of that name is replaced.
            attempt: Sets its temporary name apart from that of another process.

        Raises:
            OSError: it cannot be made.
        """
        self._path = path
        self._temporary = path.with_name(f"{path.name}{attempt}.tmp")
        with errors_name(path):
            self.file = open(self._temporary, "w+b")  # noqa: SIM115

    def commit(self, *, sync: bool = True) -> None:
        """Let it appear under its name; with ``sync``, after it is on the disk.

        Without ``sync`` it is whole after a process was killed, not after the power was lost.

        Raises:
            OSError: it could not be written; then it is gone.
        """
        try:
            with errors_name(self._path):
                with self.file:
                    self.file.flush()
                    if sync:
                        os.fsync(self.file.fileno())
                self._temporary.replace(self._path)
                if sync:
                    sync_directory(self._path.parent)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Delete it; no file appears."""
        with suppress(OSError):  # a full disk takes what is buffered no more now than before
            self.file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path, *, attempt: str = "", sync: bool = True) -> Iterator[NewFile]:
    """Yield a ``NewFile`` that gets its name on a clean exit; after an error, nothing is left.

    Raises:
        OSError: it cannot be made or written.
    """
    made = NewFile(path, attempt)
    try:
        yield made
    except BaseException:
        made.discard()
        raise
    made.commit(sync=sync)


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Write ``data``, whole or in pieces, so that ``path`` holds its old content or all of it.

    ``sync`` is as in ``NewFile.commit``.
    """
    with errors_name(path), new_file(path, sync=sync) as made:
        made.file.writelines([data] if isinstance(data, bytes) else data)


def move_into_place(temporary: Path, path: Path) -> None:
    """Give the complete file ``temporary`` the name ``path``, once it is on the disk."""
    sync_file(temporary)
    temporary.replace(path)
    sync_directory(path.parent)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Let an OSError inside tell of ``path``: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync_file(path: Path) -> None:
    """Bring what was written to ``path`` to the disk."""
    with open(path, "r+b") as file:  # Windows syncs no file that is open to read only
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Bring the names in ``path`` to the disk, where the system can.

    Windows opens no directory, and some file systems sync none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
