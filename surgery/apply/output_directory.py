"""The output directory: a journal beside it, built shard by shard, renamed as a whole."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import msgspec

from surgery.errors import OutputError
from surgery.files.atomic import lock_output, new_file, sync_directory, write_atomic


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


PARTIAL, JOURNAL = ".partial", ".partial.journal"
"""What the names of the directory under construction and of its journal end with."""


class OutputDirectory:
    """``DIR.partial`` until ``commit`` renames it to ``DIR``; a shard is in it whole or not.

    Beside it lies its journal, which is made before it and deleted after the rename.
    """

    def __init__(self, path: Path, plan_digest: str, *, source: Path, resume: bool) -> None:
        """Create the partial directory, or with ``resume`` go on with an interrupted one.

        Raises:
            OutputError: the output exists, lies inside the source or around it, another run
                writes it, an interrupted one is in the way, or the run to resume had another plan.
        """
        check_place(path, source)
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self._journal = _open_journal(path)
        try:
            check_place(path, source)  # the run that held the lock until now may have made it
            if resume and self.partial.is_dir() and not self.partial.is_symlink():
                self._go_on(plan_digest)
            else:
                self._begin(plan_digest)
        except BaseException:
            self._journal.close()
            raise

    @property
    def finished(self) -> frozenset[str]:
        """Shards that need not be written again."""
        return frozenset(self._journal.finished)

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Leave nothing behind after an error, unless there are finished shards to resume."""
        if error_type is None or not self._journal.finished:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._journal.remove()
        else:
            self._journal.close()

    def check_space(self, nbytes: int) -> None:
        """Refuse to start when ``nbytes`` do not fit on the disk.

        Raises:
            OutputError: naming what is needed and what is free.
        """
        free = shutil.disk_usage(self.partial).free
        if free < nbytes:
            raise OutputError(
                self.path,
                "no space for the output",
                expected=f"{nbytes:,} bytes",
                found=f"{free:,} free",
                fix="free space, or name another output, then run with `resume`",
            )

    def finish(self, name: str) -> None:
        """Note that the shard ``name`` is complete and synced; threads may call this."""
        self._journal.finish(name, (self.partial / name).stat().st_size)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Say which file it was that could not be written.

        Raises:
            OutputError: whatever the file system refuses inside.
        """
        try:
            yield
        except OSError as error:
            raise OutputError(
                self.path / name,
                "cannot be written",
                found=error.strerror,
                fix="make that possible, then run again with `resume`",
            ) from error

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Write a file that is no shard, given whole or in pieces.

        Raises:
            OutputError: it cannot be written.
        """
        with self.writing(name):
            write_atomic(self.partial / name, data)

    def commit(self) -> None:
        """Let the output appear under its name, without what processes left that were lost."""
        for path in self.partial.glob("*.tmp"):
            path.unlink()
        sync_directory(self.partial)
        try:
            self.partial.rename(self.path)
        except OSError as error:
            raise OutputError(
                self.path,
                "appeared while it was written",
                fix="move it away, then run with `resume`",
            ) from error
        sync_directory(self.path.parent)

    def _begin(self, plan_digest: str) -> None:
        if self.partial.exists():
            raise OutputError(
                self.partial,
                "is there from a run that was interrupted",
                fix="continue it with `resume`, or delete it",
            )
        self._journal.begin(plan_digest)
        self.partial.mkdir()

    def _go_on(self, plan_digest: str) -> None:
        found = self._journal.plan_digest
        if found is None:
            raise OutputError(
                self.partial,
                "cannot be resumed: it has no journal, so it may be anything",
                expected=self._journal.path,
                fix="delete it and start anew",
            )
        if found != plan_digest:
            raise OutputError(
                self.partial,
                "belongs to another plan",
                expected=f"plan {plan_digest[:12]}",
                found=found[:12],
                fix=f"resume with that plan, or delete {self.partial}",
            )
        self._sweep()

    def _sweep(self) -> None:
        """Delete half a file, and whatever else the journal does not vouch for."""
        whole = {
            path.name
            for path in self.partial.iterdir()
            if path.is_file() and path.stat().st_size == self._journal.finished.get(path.name)
        }
        for path in self.partial.iterdir():
            if path.name not in whole:
                path.unlink()
        self._journal.finished = {
            name: nbytes for name, nbytes in self._journal.finished.items() if name in whole
        }


def forget(path: Path) -> None:
    """Delete the journal of an output that is complete: its run was killed behind the rename.

    Raises:
        OutputError: that run still goes on.
    """
    _open_journal(path).remove()


def _open_journal(path: Path) -> Journal:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            path.parent, "cannot be made", found=error.strerror, fix="choose another output"
        ) from error
    return Journal(path.with_name(path.name + JOURNAL))


@contextmanager
def new_shard(partial: Path, name: str, attempt: str = "") -> Iterator[int]:
    """Open the shard ``name`` of a partial directory for appending; on a clean exit it is there.

    Args:
        partial: The directory.
        name: The shard.
        attempt: Sets its temporary file apart from that of another process.
    """
    with new_file(partial / name, attempt=attempt) as made:
        yield made.file.fileno()


def check_place(path: Path, source: Path) -> None:
    """Refuse an output that exists, lies below a file, or inside the source or around it.

    Raises:
        OutputError: naming both.
    """
    try:
        output, source = path.resolve(), source.resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise OutputError(path, "is no place", found=error, fix="choose another output") from error
    if output == source or source in output.parents or output in source.parents:
        raise OutputError(
            path,
            "output and source lie inside each other",
            found=f"source {source}",
            fix="choose a directory beside the source",
        )
    above = next(parent for parent in output.parents if parent.exists())
    if not above.is_dir():
        raise OutputError(path, "lies below a file", found=above, fix="choose another output")
    if path.exists() or path.is_symlink():
        raise OutputError(path, "exists already", fix="choose another output, or move it away")


def check_file(path: Path, source: Path | None = None) -> None:
    """Refuse, before the work, a file that could not be written after it, or that harms the model.

    Raises:
        OutputError: its directory is not there, takes no file or is ``source``; or ``path`` is one.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(path, "its directory does not exist", fix="create it, or name another")
    if path.is_dir():
        raise OutputError(path, "is a directory", fix="name a file")
    if source is not None and parent.resolve().is_relative_to(source.resolve()):
        raise OutputError(
            path, "lies inside the model, which stays as it is", fix="name a place outside of it"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(path, "its directory takes no file", fix="name another place")
