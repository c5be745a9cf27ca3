"""Files written whole or not at all, and locks between processes."""

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import OutputError

PARTIAL = ".partial"
"""Suffix of the directory of a run that has not ended."""

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that cannot sync a directory."""


class NewFile:
    """A file under a temporary name, until ``commit`` renames it.

    No other process has the same temporary name. What killed runs left under such names is deleted.
    """

    def __init__(self, path: Path) -> None:
        """Open it for reading and writing; ``commit`` replaces a file named ``path``.

        Raises:
            OSError: the file cannot be created, or ``path`` is a device, a pipe or a directory,
                which a rename would replace.
        """
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "is not a regular file", str(path))
        self._path = path
        with errors_name(path):
            _delete_leftovers(path)
            while True:
                self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                self.file = open(self._temporary, "x+b")  # noqa: SIM115
                _lock(self.file.fileno(), blocking=True)
                # Another run may have taken it for a leftover before it was locked.
                if _is(self._temporary, self.file.fileno()):
                    break
                self.file.close()

    def commit(self, *, sync: bool = True) -> None:
        """Rename it to its final name; with ``sync``, after its bytes are on the disk.

        Without ``sync``, the file is whole after a kill, but perhaps not after a power failure.

        Raises:
            OSError: it could not be written; it is deleted then.
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
        """Delete the temporary file."""
        with suppress(OSError):  # on a full disk, flushing the buffer fails again
            self.file.close()
        self._temporary.unlink(missing_ok=True)


def _delete_leftovers(path: Path) -> None:
    """Delete temporary files of ``path`` that no running process has locked."""
    name = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    try:
        there = list(path.absolute().parent.iterdir())
    except OSError:  # opening the file tells what is wrong
        return
    for found in there:
        if name.fullmatch(found.name) and not found.is_symlink():
            with suppress(OSError), open(found, "r+b") as file:
                if _lock(file.fileno(), blocking=False):
                    found.unlink()


def _lock(descriptor: int, *, blocking: bool) -> bool:
    """Lock an open file; False if another process has, or where nothing can be locked."""
    from filelock import lock_descriptor  # importing it loads sockets: 10 ms of every start

    try:
        return lock_descriptor(descriptor, blocking=blocking)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False


@contextmanager
def new_file(path: Path, *, sync: bool = True) -> Iterator[NewFile]:
    """Yield a ``NewFile``: committed on a clean exit, discarded after an error.

    Raises:
        OSError: it cannot be created or written.
    """
    made = NewFile(path)
    try:
        yield made
    except BaseException:
        made.discard()
        raise
    made.commit(sync=sync)


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Write ``data``, whole or in pieces; ``path`` has its old content or all of the new.

    ``sync`` is as in ``NewFile.commit``.
    """
    with errors_name(path), new_file(path, sync=sync) as made:
        made.file.writelines([data] if isinstance(data, bytes) else data)


def move_into_place(temporary: Path, path: Path) -> None:
    """Sync the complete file ``temporary``, then rename it to ``path``."""
    sync_file(temporary)
    temporary.replace(path)
    sync_directory(path.parent)


OTHER_OR_FORCE = "name another file, or replace it with `force`"


def check_file(
    path: Path, read: Iterable[Path], *, force: bool = False, fix: str = OTHER_OR_FORCE
) -> None:
    """Refuse, before the work, a file that could not be written after it, or that the work reads.

    Args:
        path: The file.
        read: All that the work reads: files, none of which is replaced, and directories, in which
            nothing is written. Names of what is not there, such as a model on the hub, are ignored.
        force: Whether to replace a file that is there.
        fix: What to do about a file that is there.

    Raises:
        OutputError: ``path`` is a directory, a device or a pipe; or its directory is missing or not
            writable; or it is one of the files of ``read``, or inside a directory of them; or the
            file is there, and ``force`` is not given.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(path, "its directory does not exist", fix="create it, or name another")
    if path.is_dir():
        raise OutputError(path, "is a directory", fix="name a file")
    if path.exists() and not path.is_file():
        raise OutputError(
            path, "is not a regular file, and a new file would replace it", fix="name a file"
        )
    for each in read:
        _check_not_read(path, parent, each)
    if not os.access(parent, os.W_OK):
        raise OutputError(path, "its directory is not writable", fix="name another directory")
    if path.exists() and not force:
        raise OutputError(path, "is there already", fix=fix)


def _check_not_read(path: Path, parent: Path, read: Path) -> None:
    """Refuse ``path`` in the directory ``parent`` where it is ``read``, or inside of it."""
    if read.is_dir() and parent.resolve().is_relative_to(read.resolve()):
        raise OutputError(
            path,
            "is inside a directory that is only read",
            found=read,
            fix="name a file outside of it",
        )
    if path.exists() and read.exists() and path.samefile(read):
        other = str(read) if read != path else None
        raise OutputError(
            path,
            "is one of the files that are read, and would be replaced",
            found=other,
            fix="name another file",
        )


def check_no_partial(output: Path, *, resume: bool) -> None:
    """Refuse to begin where an earlier run was interrupted, unless it is to be continued.

    Raises:
        OutputError: ``output`` was begun, and ``resume`` is not given.
    """
    partial = output.with_name(output.name + PARTIAL)
    if partial.exists() and not resume:
        raise OutputError(
            partial,
            "is there from a run that was interrupted or is still running",
            fix="continue it with `resume`, or delete it",
        )


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Let an OSError inside name ``path``: the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync_file(path: Path) -> None:
    """Sync the content of ``path`` to the disk."""
    with open(path, "r+b") as file:  # Windows cannot sync a file that is open for reading only
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Sync the names in directory ``path`` to the disk, where the system can.

    Windows cannot open a directory, and some file systems cannot sync one.
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
"""Errors of file systems that cannot lock."""


WAIT_OR_RESUME = "wait for it, or stop it and continue with `resume`, or name another output"


class FileLock:
    """A lock between processes; ``close`` and ``remove`` release it.

    The constructor does not acquire it. ``close`` keeps the file, ``remove`` deletes it.

    Raises:
        OSError: the file cannot be created; ``acquire`` and ``try_acquire``: or not locked.
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
        """Wait until no other process holds it, then hold it."""
        from filelock import lock_descriptor  # importing it loads sockets: 10 ms of every start

        lock_descriptor(self.fileno())

    def try_acquire(self) -> bool:
        """Hold it if no other process does; return whether it is held."""
        from filelock import lock_descriptor

        return lock_descriptor(self.fileno(), blocking=False)

    def fileno(self) -> int:
        """Descriptor of the file, open for reading and appending."""
        return self._file.fileno()

    def close(self) -> None:
        """Release it."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file, then release the lock.

        In this order, the next holder of the lock can see that its file was deleted.
        """
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError:  # Windows cannot delete an open file
            self.close()
            try:
                self.path.unlink(missing_ok=True)
            except PermissionError:
                return
        self.close()


def lock_output(output: Path, path: Path, fix: str = WAIT_OR_RESUME) -> FileLock:
    """Lock ``path`` for the run that writes ``output``; where nothing can be locked, only open it.

    Args:
        output: What is written.
        path: The file to lock.
        fix: What to do while another run holds the lock.

    Raises:
        OutputError: another run holds the lock.
        OSError: the file cannot be created.
    """
    while True:
        lock = FileLock(path)
        try:
            held = lock.try_acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
            held = True  # there, nothing keeps two runs apart
        if not held:
            lock.close()
            raise OutputError(output, "is being written by another run", fix=fix)
        # The last holder may have deleted the file since it was opened: others then lock a new one.
        if _is(path, lock.fileno()):
            return lock
        lock.close()


def _is(path: Path, file: int) -> bool:
    """Whether ``path`` is the file that is open as ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
