"""Fixtures: one tiny checkpoint for the session, a command-line runner."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from surgery.cli import main
from tests.support import tiny
from tests.support.command import Run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded, untied bf16-free Llama; tests must not change it."""
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", sharded=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of real prose in two documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    prose = tiny.prose(12_000)
    path.write_text(prose[:7_000].replace("\n\n", "\n") + "\n\n" + prose[7_000:], encoding="utf-8")
    return path


@pytest.fixture
def run() -> Run:
    """Run the command line and return its result; never raises."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke
