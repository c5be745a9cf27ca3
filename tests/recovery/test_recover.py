"""recover: the trained checkpoint, what is as it was, and runs that are interrupted."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from calib.recovery.options import RecoverOptions
from calib.streaming.settings import ComputeOptions
from surgery.api import open_layout
from surgery.errors import SurgeryError
from surgery.planning.plan import Plan
from surgery.process import Progress
from surgery.text.documents import TextOptions, sources_of
from tests.recovery.conftest import Pair
from tests.support.command import Run, assert_refused
from tests.support.contents import snapshot, weights

if TYPE_CHECKING:
    from calib.recovery.run import Recovered

STEPS, SEQ_LEN = 20, 32
TOKENS = STEPS * SEQ_LEN * 2


def recovered(
    pair: Pair, output: Path, progress: Progress | None = None, **changes: Any
) -> "Recovered":
    from calib.recovery.run import Recovery

    text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=0)
    options: dict[str, Any] = {"tokens": TOKENS, "batch_size": 2, "learning_rate": 3e-3}
    chosen = RecoverOptions(output, **{**options, **changes})
    return Recovery(open_layout(pair.pruned), text, ComputeOptions("cpu"), chosen).run(progress)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "continue"}, {"only": "ffn"}, {"lora": 4, "learning_rate": 1e-2}],
    ids=["distill", "continue", "ffn", "lora"],
)
def test_each_way_of_training_writes_a_better_checkpoint(
    pair: Pair, tmp_path: Path, run: Run, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    made = recovered(pair, out, **changes)
    assert made.after < made.before
    assert len(made.curve) == STEPS
    assert run("verify", out).exit_code == 0
    before, after = weights(pair.pruned), weights(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if ".mlp." in name}
    assert trained <= changed if changes != {"lora": 4} else changed
    if changes == {"only": "ffn"}:
        assert changed == trained
    others = [n for n in snapshot(pair.pruned) if not n.endswith((".safetensors", ".md"))]
    for name in set(others) - {"compact_surgery.json"}:
        assert (out / name).read_bytes() == (pair.pruned / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"Trained: {changes.get('method', 'distill')} on {TOKENS:,} tokens" in card
    assert not (tmp_path / "out.training").exists()
    skipped = run("verify", out, "--forward")
    assert skipped.exit_code == 0
    assert "the weights were trained since" in skipped.stdout


def test_a_killed_run_continues_and_ends_the_same(pair: Pair, tmp_path: Path) -> None:
    whole = recovered(pair, tmp_path / "whole")

    def stop(stage: str, done: int, total: int) -> None:
        if done == 7 * SEQ_LEN * 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(pair, tmp_path / "out", stop)
    with pytest.raises(SurgeryError, match="interrupted"):
        recovered(pair, tmp_path / "out")
    with pytest.raises(SurgeryError, match="learning_rate"):
        recovered(pair, tmp_path / "out", learning_rate=0.5, resume=True)
    damaged = tmp_path / "out.training" / "checkpoint-8"
    damaged.mkdir()  # as a kill leaves it: without its last file
    seen: list[int] = []
    again = recovered(pair, tmp_path / "out", lambda _, done, __: seen.append(done), resume=True)
    assert seen[0] == 7 * SEQ_LEN * 2  # the step after the last checkpoint
    assert again.curve == whole.curve
    first, second = snapshot(tmp_path / "whole"), snapshot(tmp_path / "out")
    assert first.keys() == second.keys()
    differing = [name for name in first if first[name] != second[name]]
    assert differing == ["compact_surgery.json"]  # it names the file of trained tensors


def test_training_that_does_not_help_writes_nothing(pair: Pair, tmp_path: Path) -> None:
    made = recovered(pair, tmp_path / "out", learning_rate=10.0)
    assert made.output is None
    assert "nothing was written" in made.table()
    assert not list(tmp_path.iterdir())


def test_a_trained_model_is_trained_again_and_keeps_its_teacher(pair: Pair, tmp_path: Path) -> None:
    first = recovered(pair, tmp_path / "first", tokens=TOKENS // 5)
    assert first.output is not None
    second = Pair(pair.dense, first.output, pair.text, pair.plan)
    made = recovered(second, tmp_path / "second")
    assert made.before == pytest.approx(first.after)
    plan = Plan.load(tmp_path / "second.plan.json")
    assert plan.replaced is not None
    assert plan.replaced.what.count("; then distill") == 1
    assert plan.after == pair.plan.after


def test_the_command_predicts_and_says_what_it_did(pair: Pair, tmp_path: Path, run: Run) -> None:
    out, picture = tmp_path / "out", tmp_path / "run.svg"
    text = ("--data", pair.text, "--seq-len", SEQ_LEN, "--windows", 2)
    how = ("--batch-size", 2, "--learning-rate", 3e-3, "--device", "cpu")
    given = ("recover", pair.pruned, "-o", out, *text, *how)
    dry = run(*given, "--tokens", TOKENS, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"{STEPS} steps, {TOKENS:,} tokens" in dry.stdout
    assert not list(tmp_path.iterdir())
    result = run(*given, "--tokens", TOKENS, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith(f"wrote {out} and {out}.plan.json; next:")
    assert "bits per byte of held-out text" in picture.read_text(encoding="utf-8")
    short = run(*given, "--minutes", 0.01, "--json", "-o", tmp_path / "short")
    assert json.loads(short.stdout.splitlines()[-1])["tokens"] > 0


def test_bad_requests_are_refused_in_one_line(pair: Pair, tmp_path: Path, run: Run) -> None:
    given = ("recover", pair.pruned, "--data", pair.text, "-o", tmp_path / "out")
    assert_refused(run(*given), "--tokens", "--minutes", "one of them")
    several = (*given, "--tokens", 640, "--seq-len", 32)
    assert_refused(run(*several, "--teacher", pair.pruned), "another vocabulary")
    continued = run(*several, "--method", "continue", "--teacher", pair.dense)
    assert_refused(continued, "--teacher", "no effect")
    few = tmp_path / "few.txt"
    few.write_text("A few words, not more.", encoding="utf-8")
    refused = run("recover", pair.pruned, "--data", few, "-o", tmp_path / "out", "--tokens", 640)
    assert_refused(refused, "does not fill one window")
    arguments = tmp_path / "arguments.json"
    arguments.write_text('{"learning_rat": 1}', encoding="utf-8")
    refused = run(*several, "--training-args", arguments, "--windows", 2)
    assert_refused(refused, "TrainingArguments", "learning_rat")
