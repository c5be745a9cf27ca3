"""The output directory: built beside its place, shard by shard, then renamed as a whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import msgspec

from surgery.errors import OutputError
from surgery.jsonfile import read_file, write_atomic

JOURNAL = "journal.json"


class Journal(msgspec.Struct, forbid_unknown_fields=True):
    """What an interrupted run had finished."""

    plan_digest: str
    shards: list[str]
    """Files that are complete and synced."""


class OutputDirectory:
    """``DIR.partial`` until ``commit`` renames it to ``DIR``; a shard is in it whole or not."""

    def __init__(self, path: Path, plan_digest: str, *, source: Path, resume: bool) -> None:
        """Create the partial directory, or with ``resume`` go on with an interrupted one.

        Raises:
            OutputError: the output exists, lies inside the source or around it, an interrupted
                run is in the way, or the run to resume had another plan.
        """
        check_place(path, source)
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._lock = Lock()
        self._journal = Journal(plan_digest, [])
        if resume and self.partial.is_dir() and not self.partial.is_symlink():
            self._journal = self._read_journal(plan_digest)
            return
        try:
            self.partial.mkdir(parents=True)
        except FileExistsError as error:
            raise OutputError(
                self.partial,
                "is there from a run that was interrupted or is still going",
                fix="continue it with --resume, or delete it",
            ) from error
        self._save_journal()

    @property
    def finished(self) -> frozenset[str]:
        """Shards that need not be written again."""
        return frozenset(self._journal.shards)

    def __enter__(self) -> "OutputDirectory":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Leave nothing behind after an error, unless there are finished shards to resume."""
        if error_type is not None and self.partial.exists() and not self._journal.shards:
            shutil.rmtree(self.partial)

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
                fix="free space, or name another output, then run with --resume",
            )

    def finish(self, name: str) -> None:
        """Note that the shard ``name`` is complete and synced."""
        with self._lock:
            self._journal.shards.append(name)
            self._save_journal()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        write_atomic(self.partial / name, data)

    def commit(self) -> None:
        """Let the output appear under its name, without what processes left that were lost."""
        for path in self.partial.glob("*.tmp"):
            path.unlink()
        (self.partial / JOURNAL).unlink()
        _sync_directory(self.partial)
        try:
            self.partial.rename(self.path)
        except OSError as error:
            raise OutputError(
                self.path,
                "appeared while it was written",
                fix=f"move it away and rename {self.partial} yourself",
            ) from error
        _sync_directory(self.path.parent)

    def _read_journal(self, plan_digest: str) -> Journal:
        path = self.partial / JOURNAL
        if not path.exists():  # killed before the first entry or behind the last: nothing counts
            return Journal(plan_digest, [])
        try:
            journal = msgspec.json.decode(read_file(path), type=Journal)
        except (OSError, msgspec.MsgspecError) as error:
            raise OutputError(
                path, "cannot be resumed", found=error, fix=f"delete {self.partial} and start anew"
            ) from error
        if journal.plan_digest != plan_digest:
            raise OutputError(
                self.partial,
                "belongs to another plan",
                expected=f"plan {plan_digest[:12]}",
                found=journal.plan_digest[:12],
                fix=f"resume with that plan, or delete {self.partial}",
            )
        return journal

    def _save_journal(self) -> None:
        write_atomic(self.partial / JOURNAL, msgspec.json.encode(self._journal))


@contextmanager
def new_shard(partial: Path, name: str, attempt: str = "") -> Iterator[int]:
    """Open the shard ``name`` of a partial directory for appending; on a clean exit it is there.

    Args:
        partial: The directory.
        name: The shard.
        attempt: Sets its temporary file apart from that of another process.
    """
    temporary = partial / f"{name}{attempt}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(partial / name)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
