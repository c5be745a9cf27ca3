"""The journal of an apply: a file beside the output, locked by the run that writes it."""

import errno
import os
from pathlib import Path
from threading import Lock

import msgspec

from surgery.errors import OutputError
from surgery.lock import lock_output


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line."""

    plan_digest: str


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every other line: a shard that is complete and synced."""

    shard: str
    nbytes: int
    """Of the file."""


class Journal:
    """One JSON object a line, each synced when it is written; the lock ends with the process.

    It lies beside the directory it tells of, so that it is there until that one has its name. A
    power cut may leave the start of a line at the end, which does not count.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock ``path``, and read what an earlier run had written.

        Raises:
            OutputError: another run holds it, it cannot be made, or it is no journal.
        """
        self.path = path
        self.plan_digest: str | None = None
        """None where nothing was begun."""
        self.finished: dict[str, int] = {}
        """Shard → bytes."""
        self._threads = Lock()
        try:
            self._lock = lock_output(path.with_suffix(""), path)
        except OSError as error:
            raise OutputError(
                path, "cannot be made", found=error.strerror, fix="choose another output"
            ) from error
        self._file = self._lock.fileno()
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def begin(self, plan_digest: str) -> None:
        """Forget whatever was there: a run of this plan begins."""
        os.ftruncate(self._file, 0)
        self.plan_digest, self.finished = None, {}
        self._append(Begun(plan_digest))
        self.plan_digest = plan_digest

    def finish(self, shard: str, nbytes: int) -> None:
        """Note that ``shard`` is complete and synced; threads may call this at the same time."""
        with self._threads:
            self._append(Finished(shard, nbytes))
            self.finished[shard] = nbytes

    def close(self) -> None:
        """Let the lock go; a journal that tells nothing goes as well."""
        if self.plan_digest is None and not os.fstat(self._file).st_size:
            self._lock.remove()
        else:
            self._lock.close()

    def remove(self) -> None:
        """Delete the file and let the lock go."""
        self._lock.remove()

    def _append(self, line: Begun | Finished) -> None:
        """Write a line whole or not at all, for others may follow."""
        size, raw = os.fstat(self._file).st_size, msgspec.json.encode(line) + b"\n"
        try:
            if os.write(self._file, raw) < len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OutputError(
                self.path,
                "cannot be written",
                found=error.strerror,
                fix="make that possible, then run again with `resume`",
            ) from error

    def _read(self) -> None:
        os.lseek(self._file, 0, os.SEEK_SET)
        raw = os.read(self._file, os.fstat(self._file).st_size)
        *lines, torn = raw.split(b"\n")
        try:
            if lines:
                self.plan_digest = msgspec.json.decode(lines[0], type=Begun).plan_digest
            finished = [msgspec.json.decode(line, type=Finished) for line in lines[1:]]
            if torn and not lines:
                raise ValueError("no whole line")
        except ValueError as error:  # msgspec's among them
            raise OutputError(
                self.path,
                "cannot be resumed",
                found=error,
                fix="delete it and the directory it tells of, and start anew",
            ) from error
        self.finished = {line.shard: line.nbytes for line in finished}
        if torn:
            os.ftruncate(self._file, len(raw) - len(torn))
