"""The output directory: built beside its place, shard by shard, then renamed as a whole."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.atomic import new_file, sync_directory, write_atomic
from surgery.errors import OutputError
from surgery.journal import Journal

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
