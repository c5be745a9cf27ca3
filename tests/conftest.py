"""Fixtures: one tiny checkpoint for the session, a command-line runner, a bench to damage."""

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test of this process asks a real hub

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result

from surgery.cli.main import main
from tests.support import tiny
from tests.support.command import Run
from tests.support.plans import layout_of, random_plan, random_stats
from tests.support.sample import ALL, SEED, seed


def pytest_configure() -> None:
    """Choose the seed before workers start, which inherit it."""
    seed()


def pytest_report_header() -> str:
    """Say which types a run covers, so that it can be repeated."""
    every = os.environ.get(ALL) == "all"
    return "model types: all" if every else f"model types: a sample; {SEED}={seed()} repeats it"


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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a pass may compute on, where it is there."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a card with CUDA")
    return torch.device(request.param)


@pytest.fixture
def run() -> Run:
    """Run the command line and return its result; never raises."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture(scope="session")
def pattern(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that commands need: model, text, statistics, plan."""
    root = tmp_path_factory.mktemp("bench")
    shutil.copytree(llama, root / "model")
    shutil.copy(text, root / "text.txt")
    random_stats(layout_of(root / "model")).save(root / "stats.safetensors")
    plan = msgspec.structs.replace(random_plan(root / "model", 512, 64), source="model")
    plan.save(root / "plan.json")
    return root


@pytest.fixture
def bench(pattern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``pattern`` to damage, which is also the working directory."""
    root = shutil.copytree(pattern, tmp_path / "bench")
    monkeypatch.chdir(root)
    return root
