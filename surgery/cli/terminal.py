"""What the command line shows: the library's words with flags in them, bars, and logs."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from surgery.apply.companions import left_behind
from surgery.errors import printable
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.process import Progress, reuse_freed_memory

RULE = "V' and I' follow a rule of thumb; compact-surgery search finds the split for your model"
"""What to know of sizes that a ratio has given."""

OF_WEIGHTS = ("calibrate", "score", "apply")
"""Stages that count bytes of weights; the others count windows times layers."""


PARAMETER = re.compile(r"`([a-z_]+)`")
"""How the library writes the name of a parameter in errors, notes and tables."""


def with_flags(text: str, command: click.Command | None = None) -> str:
    """Return ``text`` with --vocab-size in place of vocab_size between backticks, and so on.

    A name in backticks that is no parameter of any command stays as it is.

    Args:
        text: What the library says.
        command: Whose flags come first; None is the command that runs.
    """
    context = click.get_current_context()
    flags = all_flags(context.find_root().command) | all_flags(command or context.command)
    return PARAMETER.sub(lambda found: flags.get(found[1], found[0]), text)


def all_flags(command: click.Command) -> dict[str, str]:
    """Parameter → flag of ``command`` and of the commands below it.

    A parameter is known by the name of its flag and by the name under which click hands it over:
    ``width`` and ``widths`` are both --width.
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


def say(text: str, *, err: bool = False) -> None:
    """Print what the library says, options spelled as flags."""
    click.echo(with_flags(text), err=err)


LOG_LINES = "compact_surgery.log_lines"
"""Where a command's context keeps what has been said."""


class Bars:
    """A bar on stderr for each stage, one at a time; none where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage, self._done = "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        from tqdm import tqdm

        if self._bar is None or stage != self._stage or done < self._done:
            self.close()
            unit = "B" if stage in OF_WEIGHTS else "window"
            quiet = not sys.stderr.isatty()
            self._bar = tqdm(total=total, desc=stage, unit=unit, unit_scale=True, disable=quiet)
            self._stage, self._done = stage, 0
        self._bar.update(done - self._done)
        self._done = done

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def bars() -> Iterator[Progress]:
    """Yield what draws the progress of a command."""
    drawn = Bars()
    try:
        yield drawn
    finally:
        drawn.close()


@contextmanager
def running() -> Iterator[Progress]:
    """Yield what draws the progress of a command that runs a model, in a process that is its own.

    Here the heap may be told to serve one activation after another; in somebody else's program
    that is not ours to change.
    """
    reuse_freed_memory()
    with bars() as progress:
        yield progress


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a line of the library's on stderr, once in a command."""
        context = click.get_current_context(silent=True)
        if context is None:  # the command that asked for it has ended
            return
        line, said = self.format(record), context.meta.setdefault(LOG_LINES, [])
        if line not in said:
            say(line, err=True)
            said.append(line)


def show_logs() -> None:
    """Print what the library logs, which stays quiet in a program of somebody else's."""
    for name in ("surgery", "calib"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Echo) for handler in logger.handlers):
            logger.addHandler(_Echo())
        logger.setLevel(logging.INFO)


def show_plan(plan: Plan, layout: Layout) -> None:
    """Print what a plan cuts and what to know about it."""
    say(plan.table())
    if names := left_behind(layout.checkpoint.path, plan.ids()):
        click.echo(f"note: left behind: {printable(', '.join(names))}")
    if plan.provenance.ratio is not None:
        click.echo(f"note: {RULE}")
