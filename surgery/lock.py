"""A lock between processes, on a file that is there for nothing else."""

import fcntl
import os
from pathlib import Path


class FileLock:
    """Not held at first; given back with ``close``, or by the system when the process ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __enter__(self) -> "FileLock":
        self.exclusive()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shared(self) -> None:
        """Hold it together with others, as soon as nobody holds it alone."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def exclusive(self) -> None:
        """Hold it alone, as soon as nobody else holds it; what was held is let go first."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def try_exclusive(self) -> bool:
        """Hold it alone if nobody else holds it, and say whether."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)
