"""The partial directory of a calibration: what a run that is killed leaves for the next one."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import OutputError
from surgery.files.atomic import FileLock, lock_output, sync_file, write_atomic
from surgery.files.safetensors_header import read_header
from surgery.files.strict_json import read_file
from surgery.stats.channel_stats import COSINES, DTYPES, PARTS, AxisSums, save_arrays

STATE = "state.json"
WRITTEN = "written"
"""File that names a layer whose files may not have reached the disk, and when the system started:
as long as that has not ended, it has them in memory, whoever was killed."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Of Linux."""
MAPPED_FILES_GO = os.name != "nt"
"""Whether the system deletes a file that is mapped; else a file's sums are read into memory."""
NUMPY = {name: dtype for dtype, name in DTYPES.items()}


class State(msgspec.Struct, forbid_unknown_fields=True):
    """Written last: whatever it does not tell of does not count."""

    identity: dict[str, str]
    """What must not change between a run and its continuation, by the name users know."""
    finished: int = 0
    """Layers whose sums are complete, and which the hidden states have passed."""
    format: int = 2


class ResumeDirectory:
    """``STATS.partial`` beside the file that is being made; removed once that is written.

    ``STATS.partial.lock`` is there while a run works in it.
    """

    def __init__(
        self, output: Path, identity: Mapping[str, str], *, resume: bool, spill: Path | None = None
    ) -> None:
        """Create the directory, or with ``resume`` go on with what a killed run left.

        Args:
            output: The file that is being made.
            identity: What a killed run must have had, too.
            resume: Whether there may be one.
            spill: Where the hidden states lie; None is in the directory itself.

        Raises:
            OutputError: one is there already, is in use, or belongs to another run.
        """
        self.path = output.with_name(output.name + ".partial")
        self.hidden = _hidden_place(output, spill) if spill else self.path
        """Directory of the hidden states."""
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lock: FileLock | None = lock_output(
            self.path, self.path.with_name(self.path.name + ".lock")
        )
        try:
            self._open(State(dict(identity)), resume=resume)
        except BaseException:
            self.close()
            raise

    def _open(self, new: State, *, resume: bool) -> None:
        if self.path.exists() and not resume:
            raise OutputError(
                self.path,
                "is there from a run that was interrupted or is still going",
                fix="continue it with `resume`, or delete it",
            )
        self.hidden.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._state = self._load(new)
        self._take_up_written()

    @property
    def finished(self) -> int:
        """Layers that need not be computed again."""
        return self._state.finished

    def add(
        self,
        layer: int,
        axes: Mapping[str, AxisSums],
        cosines: float,
        sync: Callable[[], object] = lambda: None,
    ) -> None:
        """Keep the sums of the next layer, and begin to bring all that it left to the disk.

        From here on a killed run goes on behind this layer; behind one that the power has left it
        does once all is on the disk. Until then, at ``settle``, that goes on in the background:
        waiting for it after each layer made a calibration of a small model 12 % slower. ``sync``
        brings the layer's hidden states there.
        """
        arrays = {
            f"{axis}.{part}": getattr(sums, part) for axis, sums in axes.items() for part in PARTS
        }
        arrays[COSINES] = np.array([cosines])
        self.settle()
        save_arrays(self._file(layer), arrays, {}, sync=False)
        write_atomic(self.path / WRITTEN, _written(layer, boot_id()), sync=False)
        self._pending = self._background.submit(self._commit, layer, sync)

    def settle(self) -> None:
        """Wait until what ``add`` began is on the disk; until then nothing may be overwritten.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, layer: int, sync: Callable[[], object]) -> None:
        sync()
        sync_file(self._file(layer))
        state = msgspec.structs.replace(self._state, finished=layer + 1)
        write_atomic(self.path / STATE, msgspec.json.encode(state))
        self._state = state

    def _take_up_written(self) -> None:
        """Bring to the disk what a killed run had written, and go on from there."""
        path, layer, started = self.path / WRITTEN, self._state.finished, boot_id()
        if started and path.exists() and path.read_bytes() == _written(layer, started):
            self._commit(layer, self._sync_hidden)

    def _sync_hidden(self) -> None:
        for path in self.hidden.iterdir():
            sync_file(path)

    def sums(self, layer: int) -> tuple[dict[str, AxisSums], float]:
        """Return the sums of a finished layer, mapped: they take no memory until they are read.

        Beside those of its axes it is the sum of the cosines.
        """
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for ref in read_header(self._file(layer)).tensors:
            axis, _, part = ref.name.partition(".")
            array: np.ndarray
            array = np.memmap(ref.path, NUMPY[ref.dtype], "r", ref.start, ref.shape)
            if not MAPPED_FILES_GO:
                array = array.copy()
            arrays.setdefault(axis, {})[part] = array
        cosines = float(arrays.pop(COSINES)[""][0])
        return {axis: AxisSums(**parts) for axis, parts in arrays.items()}, cosines

    def remove(self) -> None:
        """Delete the directory; from the first step on, there is nothing to continue."""
        (self.path / STATE).unlink(missing_ok=True)
        for directory in {self.hidden, self.path}:
            shutil.rmtree(directory)
        self.close()

    def __enter__(self) -> "ResumeDirectory":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Leave nothing behind after an error, unless there are finished layers to go on from."""
        with suppress(OSError):  # the first error is the one to tell
            self.settle()
        if error_type is not None and not self.finished and self._lock is not None:
            self.remove()
        self.close()

    def close(self) -> None:
        """Let another run use the directory."""
        self._background.shutdown()
        if self._lock is not None:
            self._lock.remove()
        self._lock = None

    def _file(self, layer: int) -> Path:
        return self.path / f"layer_{layer:04}.safetensors"

    def _load(self, new: State) -> State:
        path = self.path / STATE
        if not path.exists():  # killed before the first layer was finished
            return new
        try:
            state = msgspec.json.decode(read_file(path), type=State)
        except (OSError, msgspec.MsgspecError) as error:
            raise OutputError(
                path, "cannot be resumed", found=error, fix=f"delete {self.path} and start anew"
            ) from error
        names = {**state.identity, **new.identity}
        other = [n for n in names if state.identity.get(n) != new.identity.get(n)]
        if other or state.format != new.format:
            raise OutputError(
                self.path,
                f"belongs to a run with another {' and another '.join(other) or 'format'}",
                expected=_texts(state.identity, other),
                found=_texts(new.identity, other),
                fix=f"run as before, or delete {self.path} and start anew",
            )
        return state


def _hidden_place(output: Path, spill: Path) -> Path:
    """A directory in ``spill`` that is this output's alone, whatever others are called."""
    whose = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:16]
    return spill / f"{output.name}.{whose}.hidden"


def _written(layer: int, started: str) -> bytes:
    return f"{layer} {started}".encode()


def boot_id() -> str:
    """What names the time since the system was started; empty where nothing does."""
    with suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def _texts(identity: Mapping[str, Any], names: list[str]) -> str:
    return " ".join(str(identity.get(name))[:40] for name in names) or "another version's"
