"""inspect counts the parameters of a model, and draws them."""

import json
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import weights


def test_inspect_counts_every_parameter(llama: Path, run: Run) -> None:
    facts = json.loads(run("inspect", llama, "--json").stdout)
    total = sum(tensor.numel() for tensor in weights(llama).values())
    assert facts["parameters"] == sum(facts["groups"].values()) == total
    assert facts["groups"]["ffn"] == 3 * tiny.LAYERS * 32 * tiny.INTERMEDIATE_SIZE  # eq. 2
    assert facts["groups"]["vocabulary"] == 2 * tiny.VOCAB_SIZE * 32  # eq. 1, untied
    assert facts["groups"]["attention"] == 2 * tiny.LAYERS * 32**2 * (1 + 1 / 2)  # eq. 3, H = 2


def test_tied_embeddings_count_once(tmp_path: Path, run: Run) -> None:
    model = tiny.save(tmp_path / "model", tied=True)
    facts = json.loads(run("inspect", model, "--json").stdout)
    assert facts["groups"]["vocabulary"] == tiny.VOCAB_SIZE * 32


def test_inspect_draws_a_picture(tmp_path: Path, llama: Path, run: Run) -> None:
    assert run("inspect", llama, "--plot", tmp_path / "where.png").exit_code == 0
    assert (tmp_path / "where.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_what_to_install(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", llama, "--plot", tmp_path / "where.png")
    assert result.exit_code == 2
    assert "pip install 'compact-surgery[plot]'" in result.stderr
