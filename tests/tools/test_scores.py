"""Which score predicts answers: ranks, halves, and cuts whose answers follow one score."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tools.scores import WEIGHTS, halves, main, predicts, rank_correlation, read_cuts

NUMBERS = st.lists(st.integers(0, 9), min_size=2, max_size=9)


@given(NUMBERS)
def test_a_rank_correlation_is_that_of_ranks(values: list[int]) -> None:
    first = np.array(values, dtype=float)
    varied = len(set(values)) > 1
    assert rank_correlation(first, np.exp(first)) == pytest.approx(float(varied))
    assert rank_correlation(first, -first) == pytest.approx(-float(varied))
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([2, 1, 4, 3])) == pytest.approx(0.6)


def write_cuts(path: Path, weight: float, count: int = 12, items: int = 400) -> Path:
    """Write cuts of which those with a smaller score answer more items, of two tasks."""
    rng, rows = np.random.default_rng(3), []
    losses = rng.random((count, 2)) * [0.5, 0.3]
    for number, (loss, alike) in enumerate(losses):
        share = 0.9 - weight * loss - (1 - weight) * alike
        tasks = {t: {"right_norm": [int(rng.random() < share) for _ in range(items)]} for t in "ab"}
        row = {"name": str(number), "loss": loss, "alike_loss": alike}
        rows.append(row | {"tasks": tasks | {"mean": {}}})
    dense = {"name": "dense", "loss": 0, "alike_loss": 0, "tasks": rows[0]["tasks"]}
    path.write_text(json.dumps({"0.2": [dense, *rows]}))
    return path


def test_the_score_that_answers_follow_predicts_them(tmp_path: Path) -> None:
    cuts = read_cuts(write_cuts(tmp_path / "cuts.json", 0.0))
    assert len(cuts.losses) == 12
    for half in halves([cuts]):
        found = {name: predicts([cuts], half, weight) for name, weight in WEIGHTS.items()}
        assert found["words tokenized alike"] > 0.85
        assert found["words tokenized alike"] > found["all bytes"] + 0.2
    both = zip(*(of[0] for of in halves([cuts])), strict=True)
    assert all(sorted([*one, *two]) == list(range(400)) for one, two in both)


def test_the_command_prints_what_half_of_the_items_choose(tmp_path: Path) -> None:
    path = write_cuts(tmp_path / "cuts.json", 0.0)
    result = CliRunner().invoke(main, [str(path), "--check", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("12 cuts")
    assert result.output.splitlines()[-1] == "chosen: words tokenized alike"
    (tmp_path / "bad.json").write_text("[]")
    result = CliRunner().invoke(main, [str(tmp_path / "bad.json")])
    assert result.exit_code == 1
    assert "has no answers of cuts" in result.output
