"""The output directory: written shard by shard beside a journal, then renamed as a whole."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import msgspec

from surgery.errors import NotFiniteError, OutputError
from surgery.files.atomic import (
    PARTIAL,
    check_no_partial,
    lock_output,
    new_file,
    sync_directory,
    write_atomic,
)


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line of a journal."""

    plan_digest: str


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every other line of a journal: a shard that is complete and synced."""

    shard: str
    nbytes: int
    """Bytes of the file."""


class Journal:
    """The journal: one JSON object per line, each synced when it is written.

    The process holds a lock on it, which ends with the process. The journal is beside its
    directory, so that it exists until that directory has its final name. After a power failure the
    last line may be incomplete; such a line does not count.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock ``path``, and read what an earlier run wrote.

        Raises:
            OutputError: another run holds the lock, or the file cannot be made or is no journal.
        """
        self.path = path
        self.plan_digest: str | None = None
        """None where no run has begun."""
        self.finished: dict[str, int] = {}
        """Finished shard → its bytes."""
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
        """Erase the journal: a run of this plan begins."""
        os.ftruncate(self._file, 0)
        self.plan_digest, self.finished = None, {}
        self._append(Begun(plan_digest))
        self.plan_digest = plan_digest

    def finish(self, shard: str, nbytes: int) -> None:
        """Record that ``shard`` is complete and synced; threads may call this at the same time."""
        with self._threads:
            self._append(Finished(shard, nbytes))
            self.finished[shard] = nbytes

    def close(self) -> None:
        """Release the lock; delete the file if it is empty."""
        if self.plan_digest is None and not os.fstat(self._file).st_size:
            self._lock.remove()
        else:
            self._lock.close()

    def remove(self) -> None:
        """Delete the file and release the lock."""
        self._lock.remove()

    def _append(self, line: Begun | Finished) -> None:
        """Write a line whole or not at all, as other lines may follow."""
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
        self.plan_digest, self.finished, whole = _parsed(raw, self.path)
        if whole < len(raw):
            os.ftruncate(self._file, whole)


def _parsed(raw: bytes, path: Path) -> tuple[str | None, dict[str, int], int]:
    """Return the plan and the finished shards of a journal, and the length of its whole lines."""
    *lines, torn = raw.split(b"\n")
    digest = None
    try:
        if lines:
            digest = msgspec.json.decode(lines[0], type=Begun).plan_digest
        finished = [msgspec.json.decode(line, type=Finished) for line in lines[1:]]
        if torn and not lines:
            raise ValueError("no whole line")
    except ValueError as error:  # msgspec's among them
        raise OutputError(
            path,
            "cannot be resumed",
            found=error,
            fix="delete it and its directory, and start anew",
        ) from error
    return digest, {line.shard: line.nbytes for line in finished}, len(raw) - len(torn)


JOURNAL = f"{PARTIAL}.journal"
"""Suffix of the journal of an unfinished directory."""


class OutputDirectory:
    """``DIR.partial`` until ``commit`` renames it to ``DIR``; it holds whole shards only.

    Its journal is beside it. The journal is made before the directory and deleted after the rename.
    """

    def __init__(self, path: Path, plan_digest: str, *, source: Path, resume: bool) -> None:
        """Create the partial directory, or continue an interrupted one with ``resume``.

        Raises:
            OutputError: the output exists, or contains the source, or is inside it; another run
                writes it; an interrupted run left it and ``resume`` is false; or the run to resume
                had another plan.
        """
        check_output_path(path, [source])
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self._journal = _open_journal(path)
        try:
            check_output_path(path, [source])  # the run that held the lock may have made it
            if resume and self.partial.is_dir() and not self.partial.is_symlink():
                self._resume(plan_digest)
            else:
                self._begin(plan_digest)
        except BaseException:
            self._journal.close()
            raise

    @property
    def finished(self) -> frozenset[str]:
        """Shards that are complete."""
        return frozenset(self._journal.finished)

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Clean up: after an error, keep the directory only if it has finished shards to resume.

        A model with NaN or infinity cannot be continued with.
        """
        failed = error_type is not None and not issubclass(error_type, NotFiniteError)
        if failed and self._journal.finished:
            self._journal.close()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._journal.remove()

    def finish(self, name: str) -> None:
        """Record that the shard ``name`` is complete and synced; threads may call this."""
        self._journal.finish(name, (self.partial / name).stat().st_size)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Name the file in errors of the file system.

        Raises:
            OutputError: the file system refuses a call within the block.
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
        """Write a file other than a shard; ``data`` is whole or in pieces.

        Its name may have a folder in front.

        Raises:
            OutputError: the file cannot be written.
        """
        path = self.partial / name
        with self.writing(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    def commit(self) -> None:
        """Rename the output to its final name, without temporary files of lost processes."""
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
        check_no_partial(self.path, resume=False)
        self._journal.begin(plan_digest)
        self.partial.mkdir()

    def _resume(self, plan_digest: str) -> None:
        _check_same_plan(self.partial, self._journal.plan_digest, plan_digest)
        self._sweep()

    def _sweep(self) -> None:
        """Delete every file that is not a complete shard by the journal."""
        whole = _whole_shards(self.partial, self._journal.finished)
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in whole:
                path.unlink()
        self._journal.finished = {
            name: nbytes for name, nbytes in self._journal.finished.items() if name in whole
        }


def _check_same_plan(partial: Path, found: str | None, plan_digest: str) -> None:
    """Refuse to resume without a journal, or with that of another plan."""
    if found is None:
        raise OutputError(
            partial,
            "cannot be resumed: it has no journal, so its content is unknown",
            expected=partial.with_name(partial.name.removesuffix(PARTIAL) + JOURNAL),
            fix="delete it and start anew",
        )
    if found != plan_digest:
        raise OutputError(
            partial,
            "belongs to another plan",
            expected=f"plan {plan_digest[:12]}",
            found=found[:12],
            fix=f"resume with that plan, or delete {partial}",
        )


def _whole_shards(partial: Path, finished: Mapping[str, int]) -> set[str]:
    """Return the names of the files that are finished shards, of the length in the journal."""
    return {
        path.name
        for path in partial.iterdir()
        if path.is_file() and path.stat().st_size == finished.get(path.name)
    }


def shards_at_hand(path: Path, plan_digest: str, *, source: Path, resume: bool) -> frozenset[str]:
    """Return the finished shards that ``OutputDirectory`` would find; nothing is written.

    Raises:
        OutputError: as for ``OutputDirectory``, but for another run that holds the lock.
    """
    check_output_path(path, [source])
    partial = path.with_name(path.name + PARTIAL)
    if not (resume and partial.is_dir() and not partial.is_symlink()):
        check_no_partial(path, resume=False)
        return frozenset()
    journal = path.with_name(path.name + JOURNAL)
    raw = journal.read_bytes() if journal.exists() else b""
    found, finished, _ = _parsed(raw, journal)
    _check_same_plan(partial, found, plan_digest)
    return frozenset(_whole_shards(partial, finished))


def check_space(path: Path, nbytes: int, *, resumable: bool = True) -> int:
    """Check that ``nbytes`` fit on the disk of the output ``path``, and return what is free.

    Raises:
        OutputError: they do not; it names what is needed and what is free.
    """
    free = shutil.disk_usage(_existing_parent(path)).free
    if free < nbytes:
        raise OutputError(
            path,
            "no space for the output",
            expected=f"{nbytes:,} bytes",
            found=f"{free:,} free",
            fix="free space, or name another output"
            + (", then run with `resume`" if resumable else ""),
        )
    return free


def file_system(path: Path) -> int:
    """Return the number of the file system on which the output ``path`` will be."""
    return _existing_parent(path).stat().st_dev


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def remove_journal(path: Path) -> None:
    """Delete the journal of a complete output, whose run may have been killed after the rename.

    Raises:
        OutputError: that run has not ended yet.
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
def new_shard(partial: Path, name: str) -> Iterator[int]:
    """Open the shard ``name`` of a partial directory for appending; on a clean exit it exists."""
    with new_file(partial / name) as made:
        yield made.file.fileno()


def check_output_path(path: Path, read: Iterable[Path]) -> None:
    """Refuse an output that exists, is below a file, contains what is read, or is inside of it.

    Args:
        path: The output; ``DIR.partial`` counts with it.
        read: Files and directories that are read, as for ``check_file``.

    Raises:
        OutputError: naming the paths.
    """
    try:
        output, inputs = path.resolve(), [each.resolve() for each in read if each.exists()]
    except (RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise OutputError(path, "is no path", found=error, fix="choose another output") from error
    above = next((parent for parent in output.parents if parent.exists()), output)
    if not above.is_dir():
        raise OutputError(path, "is below a file", found=above, fix="choose another output")
    places = (output, Path(f"{output}{PARTIAL}"))
    for each in inputs:
        if each in output.parents or not {each, *each.parents}.isdisjoint(places):
            raise OutputError(
                path,
                "output and input are inside each other",
                found=f"input {each}",
                fix="choose a directory beside the input",
            )
    if path.exists() or path.is_symlink():
        raise OutputError(path, "exists already", fix="choose another output, or move it away")
