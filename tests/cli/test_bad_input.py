"""Bad input to whole commands: the bench is good, code is never run, devices that are not there."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.command import Run, assert_refused
from tests.support.contents import digests
from tests.support.damage import (
    APPLY,
    CALIBRATE,
    INSPECT,
    PLAN,
    PRUNE,
    SCORE,
    SIZES_ONLY,
    change,
    config,
)


def test_the_bench_itself_is_good(bench: Path, run: Run) -> None:
    commands = (INSPECT, PLAN, APPLY, "verify out --plan plan.json", f"{SCORE} text.txt")
    for command in (*commands, f"{CALIBRATE} text.txt"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output


def test_code_of_a_checkpoint_is_never_run_and_left_behind(bench: Path, run: Run) -> None:
    """Where transformers knows the model type, a pointer to code is no obstacle."""
    code = "from pathlib import Path\nPath('run').touch()\nclass C: pass\n"
    (bench / "model" / "custom.py").write_text(code)
    names = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.C"}
    config(auto_map=names)(bench)
    change("model/tokenizer_config.json", lambda data: data.update(auto_map=names))(bench)
    for command in (f"{PRUNE} out", "verify out --forward", f"{SCORE} text.txt"):
        result = run(*command.split())
        assert result.exit_code == 0, result.output
    assert not (bench / "run").exists()
    assert not list((bench / "out").glob("*.py"))
    assert "auto_map" not in json.loads((bench / "out/config.json").read_text())


@pytest.mark.parametrize("command", [f"{CALIBRATE} text.txt", f"{SCORE} text.txt", f"{PRUNE} out"])
def test_no_cuda(command: str, bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("--device cuda", "not available", "--device cpu")
    assert_refused(run(*command.split(), "--device", "cuda"), *words)
    assert digests(bench) == before


def test_a_name_that_no_json_can_hold_is_one_line(bench: Path, run: Run) -> None:
    (bench / "model").rename(bench / "mod\udcff")
    command = SIZES_ONLY.replace("model", "mod\udcff")
    assert_refused(run(*command.split()), "mod\\udcff", "no UTF-8", "rename it")
