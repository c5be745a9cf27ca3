"""The directory of an unfinished recovery: its text, its settings and the last checkpoints."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from calib.recovery.teach import TaughtWindows
from calib.recovery.trainer import Windows
from surgery.errors import OutputError, SurgeryError
from surgery.files.atomic import FileLock, lock_output, new_file, write_atomic
from surgery.files.strict_json import read_file, read_json

SETTINGS, WINDOWS, HELD = "settings.json", "windows.npy", "heldout.json"


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run and its continuation have in common."""

    identity: dict[str, str]
    """Model, text and options, by the users' names."""
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

    ``OUT.training.lock`` exists while a run uses it. Where several processes train together, the
    first one makes the files, and the others read them.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, str], *, resume: bool, main: bool = True
    ) -> None:
        """Make the directory, or with ``resume`` continue with that of a killed run.

        Raises:
            OutputError: it is there and ``resume`` is not given, is in use, or was begun with other
                options.
        """
        self.path, self._identity = path, dict(identity)
        self._lock: FileLock | None = None
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
        if self.path.exists() and not resume:
            raise OutputError(
                self.path,
                "is there from a run that was interrupted",
                fix="continue it with `resume`, or delete it",
            )
        self.path.mkdir(exist_ok=True)
        known = self.schedule
        if known is not None and known.identity != self._identity:
            every = sorted({*known.identity, *self._identity})
            name = next(n for n in every if known.identity.get(n) != self._identity.get(n))
            raise OutputError(
                f"{self.path}: `{name}`",
                "was another one when the run was begun",
                expected=known.identity.get(name),
                found=self._identity.get(name),
                fix="give the same options, or delete the directory and begin anew",
            )

    def close(self, *, done: bool = False) -> None:
        """Give up the lock; a directory without a checkpoint is deleted, as one that is done."""
        if self._lock is not None:
            if done or not any(self.path.glob("checkpoint-*")):
                shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()
            self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)
            self._lock = None

    @property
    def schedule(self) -> Schedule | None:
        """What an earlier run has begun; None where none has."""
        path = self.path / SETTINGS
        try:
            return msgspec.json.decode(read_file(path), type=Schedule) if path.exists() else None
        except msgspec.MsgspecError as error:
            fix = "delete the directory and begin anew"
            raise OutputError(path, "is damaged", found=error, fix=fix) from error

    def begin(self, steps: int, every: int, start: float) -> Schedule:
        """Write down the steps of a new run."""
        made = Schedule(self._identity, steps, every, start)
        write_atomic(self.path / SETTINGS, msgspec.json.encode(made))
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
