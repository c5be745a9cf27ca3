"""The serving benchmark: its tasks, one engine on a tiny model, runs in turns, and its tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.support import tiny
from tools.bench.__main__ import main
from tools.bench.serve import ENDINGS, SIDES, Pair, Setting, missing, plot, run_pair, table
from tools.bench.serving import in_transformers, tokenize

QUESTIONS = Setting(batch=4, prompts=2)
TEXTS = Setting(batch=2, prompts=2, new_tokens=3, prompt_tokens=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("serve") / "model")


def task_of(setting: Setting, model: Path) -> dict[str, Any]:
    sizes = {"new_tokens": setting.new_tokens, "prompt_tokens": setting.prompt_tokens}
    task = {"batch": setting.batch, "threads": 1, "texts": setting.texts(), **sizes}
    tokenize(str(model), task)
    return task


def test_questions_are_scored_as_each_sequence_alone(model: Path) -> None:
    task = task_of(QUESTIONS, model)
    assert len(task["sequences"]) == 2 * ENDINGS
    contexts = [s[:start] for s, start in zip(task["sequences"], task["starts"], strict=True)]
    assert contexts[0] == contexts[ENDINGS - 1] != contexts[ENDINGS]
    task["sequences"] = [s[-12 - n :] for n, s in enumerate(task["sequences"])]  # tiny positions
    task["starts"] = [5] * len(task["sequences"])
    _, run = in_transformers(str(model), task)
    made: Any = run()
    found = [score for batch in made for score in batch]
    loaded = tiny.load(model)
    for ids, score in zip(task["sequences"], found, strict=True):
        bits = tiny.logits_of(loaded, torch.tensor([ids]))[0].log_softmax(-1)
        alone = sum(float(bits[n - 1, ids[n]]) for n in range(5, len(ids)))
        assert score == pytest.approx(alone, abs=1e-3)


def test_texts_are_continued_by_as_many_tokens_as_asked(model: Path) -> None:
    task = task_of(TEXTS, model)
    assert {len(ids) for ids in task["sequences"]} == {16}
    warm, run = in_transformers(str(model), task)
    warm()
    made: Any = run()
    assert [each.shape for each in made] == [(2, 16 + 3)]


def echo(model: str, seconds: float, log: Path) -> list[str]:
    facts = {"load_seconds": 1, "seconds": seconds, "cpu_seconds": seconds, "device_bytes": 0}
    write = f"open({str(log)!r}, 'a').write({model[0]!r})"
    return [sys.executable, "-S", "-c", f"{write}; print({json.dumps(facts)!r})"]


def test_runs_take_turns_and_become_tables_and_a_picture(tmp_path: Path) -> None:
    log, pair = tmp_path / "log", Pair("transformers", TEXTS)
    run_pair(pair, {"dense": echo("dense", 2, log), "pruned": echo("pruned", 1, log)}, 3)
    assert log.read_text() == "dppddp"
    assert pair.gains() == [2, 2, 2]
    broken = Pair("llama.cpp", QUESTIONS)
    run_pair(
        broken, {side: [sys.executable, "-S", "-c", "raise SystemExit(3)"] for side in SIDES}, 1
    )
    assert "ended with status 3" in broken.problem
    taken = {side: {"file": 8, "weights": 8, "cache": None, "logits": 4} for side in SIDES}
    text = table([pair, broken], taken)
    assert "| file | 8 | 8 | 0.0% |" in text
    assert "2.00 (2.00–2.00)" in text
    rows = [line for line in text.splitlines() if line.startswith(("| trans", "| llama"))]
    assert {line.count("|") for line in rows} == {9}
    plot([pair, broken], tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_an_engine_that_is_missing_or_unknown_is_named(model: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    assert missing("vLLM", python) == "is not installed: no module vllm"
    asked = ["serve", str(model), str(model), "--work", str(tmp_path / "w"), "--python", "MLX=x"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert "MLX is none of transformers, vLLM, llama.cpp" in result.output
