"""The file of a plan's replaced tensors: written whole or not at all, checked before use."""

from collections.abc import Sequence
from pathlib import Path

from surgery.atomic import NewFile
from surgery.checksums import check_digest, file_digest
from surgery.header import encode_header
from surgery.replacement import Replacement
from surgery.selection import MAKE_AGAIN

Entry = tuple[str, str, tuple[int, ...]]
"""Name in the output, safetensors dtype, shape."""

OFFSET_DIGITS = 16
"""Room in the header for offsets that become longer in another order."""


def check_file(replacement: Replacement) -> None:
    """Read the file whole and compare its digest.

    Raises:
        CheckpointError: it has changed.
    """
    check_digest(Path(replacement.file), replacement.digest, MAKE_AGAIN)


class ReplacementWriter:
    """Writes such a file, a tensor at a time; it appears whole at the end or not at all.

    Which of ``entries`` come need not be known before: there is room for a header with all of
    them, and it is filled with spaces, which a header may end in.
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
        """Append one of the entries."""
        dtype, shape = self._entries[name]
        self._new.file.write(data)
        self._written.append((name, dtype, shape))

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Write the header and give the file its name; after an error, leave nothing."""
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
        """What a plan says of the finished file; None where nothing was written."""
        names = [name for name, _, _ in self._written]
        return Replacement(what, str(self._path), self._digest, names) if names else None
