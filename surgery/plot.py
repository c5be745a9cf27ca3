"""Pictures: figures that matplotlib (extra ``plot``) draws into a file, and tables in notebooks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import OutputError
from surgery.files.atomic import check_file, new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""

SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "compact-surgery"}
"""Text in an SVG stays text, and the same figure gives the same file."""


def check_picture(path: Path | None, read: Iterable[Path], *, force: bool = False) -> None:
    """Refuse, before the work, a picture that could not be drawn after it.

    Args:
        path: The file; None draws nothing.
        read: All that the work reads, as for ``check_file``.
        force: Whether to replace a file that is there.

    Raises:
        OutputError: as ``check_file`` and ``saved_figure``.
    """
    if path is None:
        return
    check_file(path, read, force=force)
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
            fix="name a .png or .svg file",
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
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.rcsetup import cycler
    except ImportError as error:
        raise _needs_matplotlib(path) from error
    form = path.suffix.removeprefix(".") or None
    facts = {"Date": None} if form == "svg" else None
    settings: Any = {**SETTINGS, "axes.prop_cycle": cycler(color=list(COLOURS))}
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        try:
            with new_file(path) as made:
                figure.savefig(made.file, format=form, dpi=150, metadata=facts)
        except ValueError as error:
            fix = "name a .png or .svg file"
            raise OutputError(path, "cannot be drawn", found=error, fix=fix) from error


def titled(model: str, text: str) -> str:
    """Return the title of a picture: the model's name, where it is known, and ``text``."""
    return f"{Path(model).name}: {text}" if model else text


def html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table for a notebook; the first cell of a row names it, numbers stand right."""
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(str(name))}</th>'
        + "".join(f'<td style="text-align:right">{_shown(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _shown(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.2%}"
    return f"{cell:,}" if isinstance(cell, int) else escape(str(cell))
