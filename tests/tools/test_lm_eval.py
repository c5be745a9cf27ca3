"""A pruned directory runs under lm-evaluation-harness as it is, without any network."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT
from tests.support.command import Run
from tools import harness, task_scores
from tools.tasks.records import FOLDER, KINDS, read

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


def log_probability(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    """Sum the log-probabilities of the choice's tokens after the context and a space."""
    before = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
    with torch.no_grad():
        logs = model(ids[:, :-1]).logits[0].log_softmax(-1)
    tokens = logs.gather(1, ids[0, 1:, None])[:, 0]
    return float(tokens[before - 1 :].sum())


def direct_accuracy(model: Any, tokenizer: Any, kind: str) -> tuple[float, float]:
    """Return acc, and acc_norm by bytes, of the first items of a kind."""
    right = right_norm = 0
    records = read(kind)[:LIMIT]
    for record in records:
        choices = record["choices"]
        sums = [log_probability(model, tokenizer, record["context"], c) for c in choices]
        normed = [s / len(c.encode()) for s, c in zip(sums, choices, strict=True)]
        right += max(range(len(sums)), key=sums.__getitem__) == record["answer"]
        right_norm += max(range(len(sums)), key=normed.__getitem__) == record["answer"]
    return right / len(records), right_norm / len(records)


def test_harness_scores_a_pruned_directory_as_transformers_does(pruned: Path) -> None:
    tasks = harness.task_manager(FOLDER)
    results = harness.evaluate(pruned, {"compact_surgery": 0}, tasks, LIMIT)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    direct = {kind: direct_accuracy(model, tokenizer, kind) for kind in KINDS}
    found = {kind: results[f"compact_surgery_{kind}"] for kind in KINDS}
    assert {k: (r["acc,none"], r["acc_norm,none"]) for k, r in found.items()} == direct
    for metric, values in zip(("acc", "acc_norm"), zip(*direct.values(), strict=True), strict=True):
        mean = sum(values) / len(KINDS)
        assert results["compact_surgery"][f"{metric},none"] == pytest.approx(mean)


def test_task_scores_prints_every_kind_of_every_directory(
    llama: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "evaluate", partial(harness.evaluate, limit=4))
    result = CliRunner().invoke(task_scores.main, [str(llama), str(pruned)])
    assert result.exit_code == 0, result.output
    for metric in task_scores.METRICS:
        assert re.search(rf"^{metric} +{' +'.join(KINDS)} +mean$", result.stdout, re.MULTILINE)
    assert len(re.findall(rf"^{re.escape(str(pruned))}( +[\d.]+){{6}}$", result.stdout, re.M)) == 2
    as_json = CliRunner().invoke(task_scores.main, [str(llama), "--json"])
    (scores,) = json.loads(as_json.stdout).values()
    assert set(scores) == {*KINDS, "mean"}
    assert scores["mean"]["acc"] == pytest.approx(sum(scores[k]["acc"] for k in KINDS) / 5)


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
    result = CliRunner().invoke(task_scores.main, [str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.strip() == (
        f"Error: {tmp_path / 'none'}: is not a checkpoint; it has no config.json"
    )


def test_a_broken_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    result = CliRunner().invoke(task_scores.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path}: ")
    assert result.output.count("\n") == 1
