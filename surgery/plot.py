"""Figures, drawn with matplotlib (extra ``plot``) and saved to a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import OutputError
from surgery.files.atomic import check_file, new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: Path | None, *, force: bool = False) -> None:
    """Refuse, before the work, a picture that could not be drawn after it.

    Args:
        path: The file; None draws nothing.
        force: Whether to replace a file that is there.

    Raises:
        OutputError: as ``check_file`` and ``saved_figure``.
    """
    if path is None:
        return
    check_file(path, force=force)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise _needs_matplotlib(path) from error
    suffix, known = path.suffix.removeprefix("."), FigureCanvasBase.filetypes
    if suffix and suffix.lower() not in known:
        raise OutputError(
            path,
            "is a picture of an unknown kind",
            expected=", ".join(f".{name}" for name in sorted(known)),
            found=path.suffix,
            fix="name a .png file",
        )


def _needs_matplotlib(path: Path) -> OutputError:
    return OutputError(path, "needs matplotlib", fix="pip install 'compact-surgery[plot]'")


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure of ``width`` × ``height`` inches, then save it to ``path``.

    Raises:
        OutputError: matplotlib (extra ``plot``) is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _needs_matplotlib(path) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    try:
        with new_file(path) as made:
            figure.savefig(made.file, format=path.suffix.removeprefix(".") or None, dpi=150)
    except ValueError as error:
        raise OutputError(path, "cannot be drawn", found=error, fix="name a .png file") from error
