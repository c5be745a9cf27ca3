"""What the command line shows: the library's text with flags, progress bars, and logs."""

import logging
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from surgery.apply.companions import files_left_out
from surgery.errors import printable
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.request import SizeRequest
from surgery.planning.serving import QUALITY
from surgery.process import Progress, reuse_freed_memory, spoken
from surgery.verify.engines import engine_table, planned_notes

RULE = "V' and I' follow a rule of thumb; compact-surgery search finds the split for your model"
"""Note on sizes that follow from a ratio."""

BYTE_STAGES = ("calibrate", "score", "apply", "export")
"""Stages that count bytes of weights; the others count windows times layers."""

TOKEN_STAGES = ("recover", "self-data", "teach")
"""Stages that count tokens."""

SECOND_STAGES = ("writing",)
"""Stages that count seconds."""

PARAMETER = re.compile(r"`([a-z_]+)`")
"""How the library writes the name of a parameter in errors, notes and tables."""


def with_flags(text: str, command: click.Command | None = None) -> str:
    """Return ``text`` with --vocab-size in place of vocab_size between backticks, and so on.

    A name in backticks that is no parameter of any command stays as it is.

    Args:
        text: Text from the library.
        command: The command whose flags come first; None is the running one.
    """
    context = click.get_current_context()
    flags = all_flags(context.find_root().command) | all_flags(command or context.command)
    return PARAMETER.sub(lambda found: flags.get(found[1], found[0]), text)


def all_flags(command: click.Command) -> dict[str, str]:
    """Return parameter → flag of ``command`` and of the commands below it.

    A parameter has the name of its flag and the name by which click passes it: ``width`` and
    ``widths`` are both --width.
    """
    flags: dict[str, str] = {}
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            flags |= all_flags(inner)
    for option in command.params:
        if isinstance(option, click.Option) and option.name:
            flag = max(option.opts, key=len)
            flags |= {option.name: flag, flag.lstrip("-").replace("-", "_"): flag}
    return flags


def print_text(text: str, *, err: bool = False) -> None:
    """Print text from the library, with its parameters spelled as flags."""
    click.echo(with_flags(text), err=err)


LOG_LINES = "compact_surgery.log_lines"
"""Key of a command's context for the log lines that have been printed."""


LINE_SECONDS = 60
"""Where stderr is no terminal, how often a line tells the progress of a long stage."""


class Bars:
    """A progress bar on stderr, one stage at a time; if stderr is no terminal, a line a minute."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage, self._done = "", 0
        self._began = self._told = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage."""
        from tqdm import tqdm

        if self._bar is None or stage != self._stage or done < self._done:
            self.close()
            unit = "B" if stage in BYTE_STAGES else "window"
            unit = "token" if stage in TOKEN_STAGES else unit
            unit = "s" if stage in SECOND_STAGES else unit
            quiet = not sys.stderr.isatty()
            self._bar = tqdm(total=total, desc=stage, unit=unit, unit_scale=True, disable=quiet)
            self._stage, self._done = stage, 0
            self._began = self._told = time.monotonic()
        self._bar.update(done - self._done)
        self._done = done
        if self._bar.disable and time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            took = spoken(self._told - self._began)
            click.echo(f"{stage}: {done / max(1, total):.0%} after {took}", err=True)

    def close(self) -> None:
        """Close the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def bars() -> Iterator[Progress]:
    """Yield a function that shows the progress of a command."""
    drawn = Bars()
    try:
        yield drawn
    finally:
        drawn.close()


@contextmanager
def running() -> Iterator[Progress]:
    """Yield a function that shows the progress of a command that runs a model.

    This also changes a setting of the heap, so that it reuses freed memory. The command line owns
    its process; the library must not do so in the program of a user.
    """
    reuse_freed_memory()
    with bars() as progress:
        yield progress


def show_written(what: str, *then: object) -> None:
    """Print, as a command's last line, what it wrote and the words of the command to go on with."""
    click.echo(f"wrote {what}; next: {shlex.join(['compact-surgery', *map(str, then)])}")


def size_flags(sizes: SizeRequest) -> list[str]:
    """Return the words for the same sizes in another command; of none, those of a usual ratio."""
    by_ratio = sizes.empty or sizes.ratio
    given = ["--ratio", f"{sizes.ratio or 0.2:g}"] if by_ratio else ["SIZES"]
    return [*given, *(["--for", sizes.aim] if sizes.aim != QUALITY else [])]


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a log line of the library on stderr, once per command."""
        context = click.get_current_context(silent=True)
        if context is None:  # the command has ended
            return
        line, printed = self.format(record), context.meta.setdefault(LOG_LINES, [])
        if line not in printed:
            print_text(line, err=True)
            printed.append(line)


def show_logs() -> None:
    """Print what the library logs; without this call, the library is silent."""
    for name in ("surgery", "calib"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Echo) for handler in logger.handlers):
            logger.addHandler(_Echo())
        logger.setLevel(logging.INFO)


def show_plan(plan: Plan, layout: Layout, request: SizeRequest) -> None:
    """Print a plan: its table, the files that the output will not have, and a note on its sizes."""
    print_text(plan.table())
    if names := files_left_out(layout.checkpoint, plan.ids()):
        click.echo(f"note: left out of the output: {printable(', '.join(names))}")
    if request.by_rule and layout.predicts:
        click.echo(f"note: {RULE}")


def show_engines(plan: Plan, layout: Layout, *, every: bool) -> None:
    """Print what engines do with the sizes of a plan's output."""
    if text := engine_table(planned_notes(plan, layout), every=every):
        print_text(text)
