"""A pruned directory runs under lm-evaluation-harness as it is, without any network."""

import json
import re
import shlex
from pathlib import Path
from statistics import mean

import click
import pytest

import calib
from tests.support import ROOT
from tests.support.command import Run
from tools import harness
from tools.tasks.records import FOLDER, KINDS

pytest.importorskip("lm_eval")

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
LIMIT = 16


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the libraries refuse what a test must not need."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def pruned(llama: Path, text: Path, tmp_path: Path, run: Run) -> Path:
    """The tiny Llama, pruned through the command line."""
    output = tmp_path / "pruned"
    sizes = ("--vocab-size", 512, "--intermediate-size", 64, "--samples", 4, "--seq-len", 128)
    result = run("prune", llama, "--data", text, *sizes, "-o", output)
    assert result.exit_code == 0, result.output
    return output


def test_harness_scores_a_pruned_directory_as_this_tool_does(pruned: Path) -> None:
    tasks = harness.task_manager(FOLDER)
    results = harness.evaluate(pruned, {"compact_surgery": 0}, tasks, LIMIT)
    found = calib.answer(pruned, tasks=[FOLDER / f"{kind}.jsonl" for kind in KINDS])
    for task in found.tasks:
        row = results[f"compact_surgery_{task.name}"]
        assert row["acc,none"] == pytest.approx(mean(task.right[:LIMIT]))
        assert row["acc_norm,none"] == pytest.approx(mean(task.right_norm[:LIMIT]))
    expected = mean(mean(task.right_norm[:LIMIT]) for task in found.tasks)
    assert results["compact_surgery"]["acc_norm,none"] == pytest.approx(expected)


def test_the_page_s_lm_eval_command_runs(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.__main__ import cli_evaluate

    (line,) = re.findall(r"^lm_eval (?:.*\\\n)*.*", PAGE, re.MULTILINE)
    (tmp_path / "my-model-pruned").symlink_to(pruned)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    command = shlex.split(line.replace("\\\n", " "))
    monkeypatch.setattr("sys.argv", [*command, "--limit", "2", "--output_path", "results"])
    cli_evaluate()
    (written,) = Path("results").rglob("*.json")
    results = json.loads(written.read_text(encoding="utf-8"))["results"]
    assert {f"compact_surgery_{kind}" for kind in KINDS} <= set(results)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    words = f"{tmp_path / 'none'}: is not a checkpoint; it has no config.json"
    with pytest.raises(click.ClickException, match=re.escape(words)):
        harness.evaluate(tmp_path / "none", {}, None)


def test_a_broken_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(click.ClickException) as caught:
        harness.evaluate(tmp_path, {}, None)
    assert caught.value.message.startswith(f"{tmp_path}: ")
    assert "\n" not in caught.value.message
