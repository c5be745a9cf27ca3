"""Figures, drawn with matplotlib (extra ``plot``) and saved to a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import OutputError
from surgery.files.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure of ``width`` × ``height`` inches, then save it to ``path``.

    Raises:
        OutputError: matplotlib (extra ``plot``) is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(
            path, "needs matplotlib", fix="pip install 'compact-surgery[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    try:
        with new_file(path) as made:
            figure.savefig(made.file, format=path.suffix.removeprefix(".") or None, dpi=150)
    except ValueError as error:
        raise OutputError(path, "cannot be drawn", found=error, fix="name a .png file") from error
