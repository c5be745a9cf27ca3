"""The command line, run in the tests' own process."""

from collections.abc import Callable

from click.testing import Result

Run = Callable[..., Result]
"""Runs the command line on its arguments, as the fixture ``run`` does."""


def assert_refused(result: Result, *words: str) -> None:
    """One line, exit status 2, no traceback, and every one of ``words``."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (2, 1), result.output
    assert lines[0].startswith("Error: ")
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"


def refusal(run: Run, *arguments: object) -> str:
    """Run a command that must be refused, and return its one line."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(result.stderr.strip().splitlines()) == 1
    return str(result.stderr)
