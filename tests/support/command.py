"""The command line, run in the tests' own process."""

from collections.abc import Callable

from click.testing import Result

Run = Callable[..., Result]
"""Runs the command line on its arguments, as the fixture ``run`` does."""
