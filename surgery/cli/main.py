"""The command line: all commands in one group, which reports their errors."""

import errno
import io
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from surgery.cli.inspection import inspect, report
from surgery.cli.models import calibrate, prune, score, stats
from surgery.cli.options import Refusal
from surgery.cli.plans import apply, export, plan, verify
from surgery.cli.studies import compare, search
from surgery.cli.terminal import show_logs, with_flags
from surgery.cli.training import recover, teach
from surgery.errors import SurgeryError, is_panic, printable, shortened
from surgery.version import __version__

FIXES = {
    errno.ENOSPC: "; free space, or name another path",
    errno.EDQUOT: "; free space, or name another path",
    errno.EROFS: "; name another path",
    errno.EACCES: "; change its permissions, or name another path",
    errno.ENOENT: "; check the name, and create its directory",
}
"""What to do about an error of the file system."""


HINTS = {
    "--seq-len": "--window-bytes",
    "--max-length": "--seq-len",
    "--text": "--data",
    "--dataset": "--data",
    "--column": "--field",
    "--text-field": "--field",
    "--output-dir": "--output",
    "--out": "--output",
    "--overwrite": "--force",
    "--sparsity": "--ratio",
    "--num-samples": "--samples",
    "--nsamples": "--samples",
}
"""Options of other tools and commands → what they are called here."""


class Commands(click.Group):
    """Turns library errors and errors of the file system into one line and exit status 2."""

    arguments: Sequence[str] = ()
    """The words of the command line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line as a program."""
        given = kwargs.get("args") or (args[0] if args else None) or sys.argv[1:]
        self.arguments = [str(argument) for argument in given]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
                # A Windows console may lack a character; then it shows the number.
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and report its errors."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise _interrupted(command, self.arguments) or error from error
        except click.NoSuchOption as error:
            raise _hinted(error) from error
        except SurgeryError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise Refusal(error.message(partial(with_flags, command=command))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has ended: click ends quietly
                raise
            reason = f"{error.filename or 'input or output'}: {error.strerror or error}"
            fix = FIXES.get(error.errno or 0, "")
            raise Refusal(printable(reason + fix)) from error
        except UnicodeEncodeError as error:
            reason = (
                f"{shortened(ascii(error.object))}: is no UTF-8, so it cannot be written to a file"
            )
            raise Refusal(f"{reason}; rename it") from error
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = f"tokenizer.json: the tokenizers library failed on it: {error}"
            fix = "check that transformers' AutoTokenizer loads it"
            raise Refusal(printable(f"{reason}; {fix}")) from error


def _interrupted(
    command: click.Command | None, arguments: Sequence[str]
) -> click.exceptions.Exit | None:
    """Name the command that continues, and return the end of this one; None where none does."""
    if command is None or "resume" not in {option.name for option in command.params}:
        return None
    again = shlex.join([*arguments, *({"--resume"} - {*arguments})])
    click.echo(f"interrupted; continue with: compact-surgery {again}", err=True)
    return click.exceptions.Exit(130)


def _hinted(error: click.NoSuchOption) -> click.NoSuchOption:
    """Name the option of the command that another tool, or another command, calls like this."""
    hint = HINTS.get(error.option_name)
    options = error.ctx.command.params if error.ctx else []
    if hint is None or all(hint not in option.opts for option in options):
        return error
    text = f"No such option '{error.option_name}'. (Did you mean '{hint}'?)"
    return click.NoSuchOption(error.option_name, text, ctx=error.ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Make a published LLM checkpoint smaller without ever loading the model.

    MODEL is a local directory or a hub id org/name[@revision].
    """
    show_logs()


for command in (
    *(inspect, plan, apply, verify, export, calibrate, score, prune, search, compare, stats),
    *(report, recover, teach),
):
    main.add_command(command)
