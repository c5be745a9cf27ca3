"""Locks between processes: one on a file of its own, and one beside an output in the making.

All are exclusive, and the system takes them back when a process ends, however it ends. So a lock
file that is left behind locks nothing.
"""

import errno
import os
from pathlib import Path

from filelock import lock_descriptor

from surgery.errors import OutputError

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
        lock_descriptor(self.fileno())

    def try_acquire(self) -> bool:
        """Hold it if nobody else holds it, and say whether."""
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
