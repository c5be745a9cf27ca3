"""Tensors that replace the source's, in a file of their own: written, checked, described."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from surgery.checkpoint.checksums import check_digest, file_digest
from surgery.errors import PlanError
from surgery.files.atomic import NewFile
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import TensorRef, encode_header, read_header


class Replacement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file whose tensors replace those of the source."""

    what: str
    """How the tensors were made."""
    file: str
    """Absolute path of the file."""
    digest: str
    """SHA-256 of the file."""
    tensors: list[str]
    """Names in the output."""
    trained: bool = False
    """Whether the tensors were trained: the output then computes something else than its source
    with the removed parts at zero."""

    def refs(self) -> dict[str, TensorRef]:
        """Return name in the output → the tensor in the file.

        Raises:
            PlanError: the file has other tensors.
            CheckpointError: the file is missing, or is no safetensors file.
        """
        found = {ref.name: ref for ref in read_header(Path(self.file)).tensors}
        if sorted(found) != sorted(self.tensors):
            other = sorted({*found} ^ {*self.tensors})
            raise PlanError(
                self.file,
                "does not hold the tensors that the plan replaces",
                expected=f"{len(self.tensors)} tensors",
                found=f"{len(found)}, differing in {other[0] if other else 'number'}",
                fix=MAKE_AGAIN,
            )
        return found


def check_replaced(ref: TensorRef, dtype: str | None, shape: tuple[int, ...] | None) -> None:
    """Refuse a tensor unless it has the output's ``dtype`` and ``shape`` (None: no such tensor).

    Raises:
        PlanError: naming the tensor.
    """
    if (ref.dtype, ref.shape) != (dtype, shape):
        raise PlanError(
            f"{ref.path}: {ref.name}",
            "does not fit the output",
            expected=(dtype, shape) if dtype else "a tensor of the output",
            found=(ref.dtype, ref.shape),
            fix=MAKE_AGAIN,
        )


Entry = tuple[str, str, tuple[int, ...]]
"""Name in the output, safetensors dtype, shape."""

OFFSET_DIGITS = 16
"""Bytes to spare in the header for each tensor: another order may have longer offsets."""


def check_file(replacement: Replacement) -> None:
    """Read all of the file and compare its digest.

    Raises:
        CheckpointError: the file has changed.
    """
    check_digest(Path(replacement.file), replacement.digest, MAKE_AGAIN)


class ReplacementWriter:
    """Writes a file of replacements, a tensor at a time; it appears whole at the end or not at all.

    A caller need not know beforehand which of ``entries`` it will add. The file begins with room
    for a header of all of them. Spaces fill what is left of it, as a header may end in spaces.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path = path.absolute()
        self._entries = {name: (dtype, shape) for name, dtype, shape in entries}
        self._room = len(encode_header(entries, {})) + OFFSET_DIGITS * len(entries)
        self._written: list[Entry] = []
        self._digest = ""

    def __enter__(self) -> "ReplacementWriter":
        self._new = NewFile(self._path)
        self._new.file.write(bytes(self._room))
        return self

    def add(self, name: str, data: memoryview) -> None:
        """Append the tensor ``name``, one of the entries."""
        dtype, shape = self._entries[name]
        self._new.file.write(data)
        self._written.append((name, dtype, shape))

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Write the header and give the file its name; after an error, leave no file."""
        if error_type is not None or not self._written:
            self._new.discard()
            return
        self._new.file.seek(0)
        self._new.file.write(encode_header(self._written, {}, room=self._room))
        self._new.commit()
        self._digest = file_digest(self._path)

    def discard(self) -> None:
        """Forget what was written: no file appears."""
        self._written = []

    def replacement(self, what: str) -> Replacement | None:
        """Return the plan's entry for the finished file; None where nothing was written."""
        names = [name for name, _, _ in self._written]
        return Replacement(what, str(self._path), self._digest, names) if names else None


def replacement_file(plan_path: Path) -> Path:
    """Return the file beside a plan's that a repair writes its matrices to."""
    return plan_path.parent / f"{plan_path.name.removesuffix('.json')}.repair.safetensors"
