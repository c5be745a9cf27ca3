"""The directory of an unfinished recovery: its text, its settings and the last checkpoints."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from calib.recovery.options import check_same_options, read_state
from calib.recovery.taught import TaughtWindows
from calib.recovery.trainer import Windows
from surgery.errors import OutputError, SurgeryError
from surgery.files.atomic import FileLock, lock_output, new_file, write_atomic
from surgery.files.strict_json import read_file, read_json

IDENTITY, SCHEDULE, WINDOWS, HELD = "identity.json", "schedule.json", "windows.npy", "heldout.json"
CLOCK = "writing.json"
"""Seconds in which a teacher has written text."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run and its continuation have in common."""

    steps: int
    """Of the whole run."""
    every: int
    """Steps between two checkpoints, at which held-out text is measured."""
    start: float
    """Bits per byte of the held-out text before the first step."""


@dataclass(frozen=True)
class TrainingText:
    """What a run trains on and is judged by."""

    windows: Windows | TaughtWindows
    """Read from their files as they are used."""
    heldout: list[str]


class WorkDirectory:
    """``OUT.training`` beside the output; a run that ends well removes it.

    Nothing is deleted that another program made: the directory says what run it is of.

    ``OUT.training.lock`` exists while a run uses it. Where several processes train together, the
    first one makes the files, and the others read them.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, str], *, resume: bool, main: bool = True
    ) -> None:
        """Make the directory, or with ``resume`` continue with that of a killed run.

        Raises:
            OutputError: it is there and ``resume`` is not given, is in use, was begun with other
                options, or is none that a recovery made.
        """
        self.path, self._identity = path, dict(identity)
        self._lock: FileLock | None = None
        self._made = False
        if not main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_output(path, path.with_name(path.name + ".lock"))
        try:
            self._open(resume=resume)
        except BaseException:
            self.close()
            raise

    def _open(self, *, resume: bool) -> None:
        identity = self.path / IDENTITY
        if not self.path.exists():
            self.path.mkdir()
            self._made = True
        elif not self._is_of_a_run():
            raise OutputError(
                self.path,
                "is in the way: it is not the directory of an interrupted run",
                fix="move it away, or name another output",
            )
        elif not resume:
            raise OutputError(
                self.path,
                "is there from a run that was interrupted",
                fix="continue it with `resume`, or delete it",
            )
        if not identity.exists():
            write_atomic(identity, msgspec.json.encode(self._identity))
        check_same_options(self.path, read_state(identity, dict[str, str]), self._identity)

    def _is_of_a_run(self) -> bool:
        """Whether the path is a directory that says what run it is of, or was to say so."""
        if not self.path.is_dir():
            return False
        begun = (self.path / IDENTITY).exists()
        return begun or all(each.name.startswith(IDENTITY) for each in self.path.iterdir())

    def close(self, *, done: bool = False, keep: bool = False) -> None:
        """Give up the lock, and delete the directory of a run that is ``done``.

        One that this object made is deleted too while it has no checkpoint, unless ``keep``.
        """
        if self._lock is not None:
            begun = keep or any(self.path.glob("checkpoint-*"))
            if done or (self._made and not begun):
                shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()
            self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)
            self._lock = None

    @property
    def schedule(self) -> Schedule | None:
        """What an earlier run has begun; None where none has."""
        path = self.path / SCHEDULE
        return read_state(path, Schedule) if path.exists() else None

    def begin(self, steps: int, every: int, start: float) -> Schedule:
        """Write down the steps of a new run."""
        made = Schedule(steps, every, start)
        write_atomic(self.path / SCHEDULE, msgspec.json.encode(made))
        return made

    def text(self, make: Callable[[], tuple[np.ndarray, list[str]]]) -> TrainingText:
        """Return the text of the run; ``make`` reads it, unless an earlier run has."""
        windows, held = self.path / WINDOWS, self.path / HELD
        if not held.exists():
            ids, texts = make()
            with new_file(windows) as made:
                np.save(made.file, ids)
            write_atomic(held, json.dumps(texts).encode())
        found = json.loads(read_file(held))
        return TrainingText(Windows(np.load(windows, mmap_mode="r")), found)

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is whole, and delete those that are not."""
        found: dict[int, Path] = {}
        for path in self.path.glob("checkpoint-*"):
            try:
                read_json(path / "trainer_state.json")  # Trainer writes it last
            except (OSError, SurgeryError):
                shutil.rmtree(path)
                continue
            found[int(path.name.rpartition("-")[2])] = path
        return found[max(found)] if found else None
