"""Which text a command reads, and how it is divided into windows."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TextOptions:
    """Documents, and the windows that are taken from them."""

    data: str | Path | Iterable[str]
    """A path, ``hub:name[:config][:split][:field]``, or the documents themselves."""
    samples: int = 256
    """Windows, at most."""
    seq_len: int = 2048
    """Tokens of a full window."""
    windows: int = 64
    """Windows of 2,048 bytes that are held out, at most, where cuts are compared."""
    seed: int | None = None
    """Shuffles the documents; None leaves them in order."""

    def documents(self) -> Iterable[str]:
        """Read the documents.

        Raises:
            DataError: there are none, or they cannot be read.
        """
        from calib.documents import read_documents

        return read_documents(self.data, self.seed)  # type: ignore[arg-type]
