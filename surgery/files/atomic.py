"""Files written whole or not at all, and locks between processes."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import OutputError

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


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that cannot lock."""


class FileLock:
    """Not held at first; given back with ``close`` or ``remove``.

    Its file stays behind, unless ``remove`` deletes it.

    Raises:
        OSError: the file cannot be made; ``acquire`` and ``try_acquire``: or cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(self) -> None:
        """Hold it as soon as nobody else holds it."""
        from filelock import lock_descriptor  # with its sockets, 10 ms of every start

        lock_descriptor(self.fileno())

    def try_acquire(self) -> bool:
        """Hold it if nobody else holds it, and say whether."""
        from filelock import lock_descriptor

        return lock_descriptor(self.fileno(), blocking=False)

    def fileno(self) -> int:
        """Descriptor of the file, open to read and to append."""
        return self._file.fileno()

    def close(self) -> None:
        """Let it go."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file and let the lock go.

        The file goes first, so that whoever gets the lock then can see that its file is gone.
        """
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError:  # Windows deletes no open file, and none that another has open
            self.close()
            try:
                self.path.unlink(missing_ok=True)
            except PermissionError:
                return
        self.close()


def lock_output(output: Path, path: Path) -> FileLock:
    """Lock ``path`` for the run that makes ``output``; where no locks are, only open it.

    Raises:
        OutputError: another run holds it.
        OSError: the file cannot be made.
    """
    while True:
        lock = FileLock(path)
        try:
            held = lock.try_acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
            held = True  # nothing keeps two runs apart there
        if not held:
            lock.close()
            raise OutputError(
                output,
                "is being written by another run",
                fix="wait for it, or stop it and continue with `resume`, or name another output",
            )
        # Whoever held it may have deleted it meanwhile; then it is no longer what others lock.
        if _is(path, lock.fileno()):
            return lock
        lock.close()


def _is(path: Path, file: int) -> bool:
    """Whether ``path`` is the file that is open as ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
