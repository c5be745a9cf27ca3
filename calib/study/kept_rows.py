"""Rows of a comparison in a file, so that a killed run goes on, or one with more methods."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from calib.study.study import Study
from calib.study.table import DENSE, Row
from surgery.errors import DataError
from surgery.files.atomic import FileLock, check_file, lock_output, write_atomic
from surgery.files.strict_json import read_file

FORMAT = 2


class _File(msgspec.Struct):
    """What the file holds."""

    version: int
    comparison: str
    """SHA-256 of what all rows have in common."""
    rows: dict[str, dict[str, Row]]
    """Ratio → name → row."""


def check_kept(path: Path | None, read: Iterable[Path]) -> None:
    """Refuse, before the work, a file that cannot keep its rows; None keeps none.

    Args:
        path: The file; of those that it has, whether they are of this comparison is seen later.
        read: All that the work reads, as for ``check_file``.

    Raises:
        DataError: it holds something else.
        OutputError: as ``check_file``.
    """
    if path is not None:
        check_file(path, read, force=True)
        _read(path)


class KeptRows:
    """Rows that are kept in a file as they are made; without a file, in memory alone.

    ``FILE.lock`` exists while a run uses the file.
    """

    def __init__(self, path: Path | None, study: Study, *settings: object) -> None:
        """Read the rows that ``path`` has; ``settings`` are those of all rows, beside the study's.

        Raises:
            DataError: the file has rows of another comparison, or none.
            OutputError: another run writes it.
        """
        self._path = path
        self._lock: FileLock | None = None
        self._file = _File(FORMAT, "", {})
        if path is None:
            return
        wait = "wait for it, or name another file"
        self._lock = lock_output(path, path.with_name(f"{path.name}.lock"), wait)
        try:
            self._file = _rows_of(path, _digest(study, settings))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "KeptRows":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs write the file."""
        if self._lock is not None:
            self._lock.remove()

    def at(self, ratio: float) -> Mapping[str, Row]:
        """Return the rows of a ratio by their names."""
        return self._file.rows.get(repr(float(ratio)), {})

    def add(self, ratio: float, rows: Mapping[str, Row]) -> None:
        """Keep rows of a ratio, that of the dense model among them."""
        assert DENSE in rows
        self._file.rows.setdefault(repr(float(ratio)), {}).update(rows)
        if self._path is not None:
            write_atomic(self._path, msgspec.json.encode(self._file))


def _rows_of(path: Path, comparison: str) -> _File:
    """Return the rows of ``path``, which must be of ``comparison``; none where it is not there."""
    found = _read(path)
    if found is None:
        return _File(FORMAT, comparison, {})
    if (found.version, found.comparison) != (FORMAT, comparison):
        raise DataError(
            path,
            "holds rows of another comparison",
            expected="the same model, text, tasks and sizes to try",
            fix="name another file, or delete this one",
        )
    return found


def _read(path: Path) -> _File | None:
    """Return what ``path`` holds; None where it is not there."""
    if not path.exists():
        return None
    try:
        found = msgspec.json.decode(read_file(path), type=_File)
        if not all(DENSE in rows for rows in found.rows.values()):
            raise ValueError(f"no row {DENSE}")
    except (OSError, ValueError) as error:
        raise DataError(
            path, "holds no rows of compare", found=error, fix="name another file"
        ) from error
    return found


def _digest(study: Study, settings: tuple[object, ...]) -> str:
    """Return the SHA-256 of the model, the text, the tasks, and ``settings``."""
    text, result = study.text, hashlib.sha256()
    facts = [
        text.layout.checkpoint.fingerprint,
        text.layout.checkpoint.weights,
        text.samples,
        text.seq_len,
        text.rarity.must_keep,
        *(task.digest for task in study.tasks),
        str(study.settings.dtype),
        *settings,
    ]
    result.update(repr(facts).encode() + b"\0" + text.rarity.order.tobytes())
    for window in text.heldout:
        result.update(window.encode() + b"\0")
    for ids in study.calibration_windows():
        result.update(ids.tobytes() + b"\0")
    return result.hexdigest()
