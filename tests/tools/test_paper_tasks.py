"""Table 7's settings are tasks of the installed harness; Table 2's averages come out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tools import harness, paper_tasks
from tools.paper_tasks import COLUMNS, SHOTS, TABLE_7, averaged, table

TABLE_2 = {
    "Qwen 2.5-0.5B": {
        "Dense": (47.3, 52.2, 56.4, 32.3, 58.2, 69.9, 34.9, 50.2, 100.0),
        "10 %": (45.2, 51.9, 55.3, 32.4, 59.5, 70.1, 28.7, 49.0, 97.7),
        "20 %": (44.1, 48.1, 55.4, 30.6, 53.3, 66.6, 26.3, 46.3, 92.4),
        "35 %": (25.5, 40.0, 53.8, 25.2, 40.0, 62.2, 0.5, 35.3, 70.4),
    },
    "LLaMA 3.2-1B": {
        "Dense": (36.6, 63.8, 60.7, 36.2, 60.7, 74.5, 5.4, 48.3, 100.0),
        "10 %": (36.7, 61.1, 59.7, 35.1, 57.1, 71.9, 6.1, 46.8, 97.0),
        "20 %": (30.6, 54.4, 58.6, 32.0, 51.3, 69.9, 3.1, 42.8, 88.8),
        "35 %": (27.9, 42.8, 55.6, 27.7, 41.7, 60.6, 1.8, 36.9, 76.4),
    },
    "Gemma3-1B": {
        "Dense": (24.9, 62.1, 59.0, 38.2, 71.9, 74.8, 2.4, 47.6, 100.0),
        "10 %": (24.9, 60.3, 59.0, 39.1, 69.0, 74.1, 1.7, 46.9, 98.4),
        "20 %": (25.0, 55.4, 59.0, 37.9, 63.3, 70.0, 1.7, 44.6, 93.6),
        "35 %": (24.2, 45.1, 55.9, 26.5, 46.4, 65.3, 0.5, 37.7, 79.2),
    },
}
"""COMPACT's rows, as printed: seven tasks, Avg, Avg%."""


def results_of(figures: tuple[float, ...]) -> harness.Results:
    """Made-up results of the harness that stand for a row of Table 2."""
    return {
        benchmark.task: {benchmark.key: figure / 100, f"{benchmark.metric}_stderr,none": "N/A"}
        for benchmark, figure in zip(TABLE_7, figures, strict=False)
    }


@pytest.mark.parametrize("model", TABLE_2)
def test_averages_are_those_of_table_2(model: str) -> None:
    printed = TABLE_2[model]
    rows = averaged([paper_tasks.row(results_of(figures)) for figures in printed.values()])
    for row, figures in zip(rows, printed.values(), strict=True):
        assert [row[column] for column in COLUMNS] == pytest.approx(figures[:7])
        # Of figures with one digit: each is off by 0.05 at most.
        assert row["Avg"] == pytest.approx(figures[7], abs=0.1)
        assert row["Avg%"] == pytest.approx(figures[8], abs=0.2)


def test_the_table_looks_like_table_2() -> None:
    printed = TABLE_2["Qwen 2.5-0.5B"]
    rows = averaged([paper_tasks.row(results_of(figures)) for figures in printed.values()])
    lines = table(dict(zip(printed, rows, strict=True))).splitlines()
    assert lines[0].split() == [*COLUMNS, "Avg", "Avg%"]
    for line, (name, figures) in zip(lines[1:], printed.items(), strict=True):
        assert line.startswith(name)
        assert line.removeprefix(name).split() == [f"{figure:.1f}" for figure in figures]


def test_a_first_row_of_zeros_is_no_division_by_zero() -> None:
    (row,) = averaged([dict.fromkeys(COLUMNS, 0.0)])
    assert row["Avg%"] == 0


def test_main_evaluates_each_directory_with_table_7_s_shots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    made_up = {
        str(tmp_path / name): results_of(figures)
        for name, figures in TABLE_2["Qwen 2.5-0.5B"].items()
    }

    def evaluate(
        directory: Path, shots: dict[str, int], _: Any, limit: int | None
    ) -> harness.Results:
        seen.append((shots, limit))
        return made_up[str(directory)]

    monkeypatch.setattr(harness, "evaluate", evaluate)
    monkeypatch.setattr(harness, "task_manager", lambda: None)
    result = CliRunner().invoke(paper_tasks.main, [*made_up, "--limit", "10", "--json"])
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == list(made_up)
    assert json.loads(result.stdout)[str(tmp_path / "20 %")]["Avg%"] == pytest.approx(92.4, abs=0.2)
    expected = dict.fromkeys(SHOTS, 0) | {"gsm8k": 5}
    assert seen == [(expected, 10)] * 4


def test_without_the_extra_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = CliRunner().invoke(paper_tasks.main, ["anything"])
    assert result.exit_code == 1
    assert "lm-evaluation-harness is missing" in result.output
    assert "install the extra `eval`" in result.output
    assert result.output.count("\n") == 1


@pytest.fixture(scope="module")
def tasks() -> Any:
    """The harness as installed."""
    pytest.importorskip("lm_eval")
    return harness.task_manager()


def test_every_task_is_registered_in_the_installed_harness(tasks: Any) -> None:
    assert set(SHOTS) <= {*tasks.all_subtasks, *tasks.all_groups}


@pytest.mark.parametrize("benchmark", TABLE_7, ids=lambda benchmark: benchmark.task)
def test_metric_and_filter_are_in_the_config(tasks: Any, benchmark: paper_tasks.Benchmark) -> None:
    config = config_of(tasks, benchmark.task)
    listed = config.get("metric_list") or config["aggregate_metric_list"]
    assert benchmark.metric in {metric["metric"] for metric in listed}
    filters = {"none", *(entry["name"] for entry in config.get("filter_list", ()))}
    assert benchmark.filter in filters
    assert config.get("num_fewshot", 0) == benchmark.shots


def test_without_the_data_there_is_one_line(
    llama: Path, tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "task_manager", lambda: tasks)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    result = CliRunner().invoke(paper_tasks.main, [str(llama), "--limit", "1"])
    assert result.exit_code == 1, result.output
    (line,) = [part for part in result.output.splitlines() if part.startswith("Error:")]
    assert line.startswith("Error: the data of mmlu, hellaswag, winogrande, arc_challenge")
    assert "run this where the hub can be reached" in line


def config_of(tasks: Any, name: str) -> dict[str, Any]:
    """Return a task's YAML with what it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(tasks.task_index[name].yaml_path, resolve_func=False))
