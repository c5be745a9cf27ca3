"""recover: the trained checkpoint, what is as it was, and runs that are interrupted."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from hypothesis.strategies import floats
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib.recovery import forecast
from calib.recovery.forecast import fitting_steps
from calib.recovery.options import RecoverOptions
from calib.scoring.score import first_token, score_windows
from calib.streaming.empty_model import positions
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import choose_settings
from surgery.api import apply_plan, open_layout
from surgery.errors import SurgeryError
from surgery.planning.plan import Plan
from surgery.process import Progress
from surgery.text.documents import TextOptions, sources_of
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.recovery.conftest import Pair
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import snapshot, weights
from tests.support.plans import random_plan

if TYPE_CHECKING:
    from calib.recovery.run import Recovery
    from calib.recovery.written import Recovered

STEPS, SEQ_LEN = 20, 32
TOKENS = STEPS * SEQ_LEN * 2
DOWN = "model.layers.1.mlp.down_proj.weight"


def requested(pair: Pair, output: Path, **changes: Any) -> "Recovery":
    from calib.recovery.run import Recovery

    text = TextOptions(sources_of(pair.text), seq_len=SEQ_LEN, windows=2, seed=0)
    options: dict[str, Any] = {"tokens": TOKENS, "batch_size": 2, "learning_rate": 3e-3}
    chosen = RecoverOptions(output, **{**options, **changes})
    return Recovery(open_layout(pair.pruned), text, ComputeOptions("cpu"), chosen)


def recovered(
    pair: Pair, output: Path, progress: Progress | None = None, **changes: Any
) -> "Recovered":
    return requested(pair, output, **changes).run(progress)


def stopped_after(steps: int) -> Progress:
    def stop(stage: str, done: int, total: int) -> None:
        if done >= steps * SEQ_LEN * 2:
            raise KeyboardInterrupt

    return stop


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
    assert len(made.curve) == STEPS // 2
    assert made.curve[-1][0] == TOKENS
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
    best = min(made.curve, key=lambda point: point[1])[0]
    assert f"Trained: {changes.get('method', 'distill')} on {best:,} tokens" in card
    assert not (tmp_path / "out.training").exists()
    skipped = run("verify", out, "--forward")
    assert skipped.exit_code == 0
    assert "the weights were trained since" in skipped.stdout


KILLED = """
import os, signal, sys
import torch
import calib

def progress(stage: str, done: int, total: int) -> None:
    if done == 7 * total // 20:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(int(sys.argv[4]))
calib.recover(
    sys.argv[1], data=sys.argv[2], output=sys.argv[3], tokens=1280, batch_size=2, seq_len=32,
    windows=2, seed=0, learning_rate=3e-3, device="cpu", progress=progress,
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process by a signal")
def test_a_killed_run_continues_and_ends_the_same(pair: Pair, tmp_path: Path) -> None:
    whole = recovered(pair, tmp_path / "whole")
    given = (pair.pruned, pair.text, tmp_path / "out", torch.get_num_threads())
    command = [sys.executable, "-c", KILLED, *map(str, given)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
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


@hypothesis.given(seconds=floats(0, 1e6), step=floats(1e-3, 1e3), evaluation=floats(1e-3, 1e3))
def test_steps_fit_into_the_time(seconds: float, step: float, evaluation: float) -> None:
    steps, evaluations = fitting_steps(seconds, step, evaluation)
    taken = steps * step + (evaluations + 1) * evaluation
    assert 1 <= evaluations <= 16
    assert steps == 1 or taken <= seconds * (1 + 1e-9)
    assert taken + step >= seconds * (1 - 1e-9)


def test_a_step_that_others_slow_down_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = accumulate([5.0, 4.0, 1.0, 1.5, 9.0])
    clock = chain([0.0], *([end, end] for end in ends))
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(forecast, "time", fake)
    assert forecast.timed(int, seconds=14.0) == 1.0
    monkeypatch.undo()
    runs: list[int] = []
    forecast.timed(lambda: runs.append(1))
    assert len(runs) == 2


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
    arguments.write_text('{"max_grad_norm": "abc"}', encoding="utf-8")
    refused = run(*several, "--training-args", arguments, "--windows", 2)
    assert_refused(refused, "--training-args: max_grad_norm", "got `str`", "correct it")


@pytest.mark.parametrize(
    "given",
    [
        {"optim": "bogus"},
        {"lr_scheduler_type": "bogus"},
        {"lr_scheduler_kwargs": {"bogus": 1}},
        {"report_to": "none-such"},
        {"dataloader_num_workers": -1},
        {"dataloader_persistent_workers": True},
        {"logging_steps": 0},
        {"optim": "galore_adamw"},
        {"accelerator_config": {"bogus": 1}},
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_values_that_the_library_refuses_are_refused_before_anything_is_loaded(
    pair: Pair,
    tmp_path: Path,
    run: Run,
    given: dict[str, Any],
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("refused after something was loaded")

    for name in ("documents_of", "Student", "Teacher", "load_tokenizer"):
        monkeypatch.setattr(f"calib.recovery.run.{name}", load)
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps(given), encoding="utf-8")
    take = ("--tokens", 640, "--seq-len", 32, "--windows", 2, "--training-args", arguments)
    command = ("recover", pair.pruned, "--data", pair.text, "-o", tmp_path / "out", *take, *more)
    assert_refused(
        run(*command), "--training-args: is refused by transformers' Train", "correct it"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["arguments.json"]


def test_values_that_need_the_model_are_refused_when_it_is_there(
    pair: Pair, tmp_path: Path
) -> None:
    training = {"optim": "galore_adamw", "optim_target_modules": ["none_such"]}
    with pytest.raises(SurgeryError, match="is refused by transformers' Trainer"):
        recovered(pair, tmp_path / "out", training=training)
    assert not list(tmp_path.iterdir())


def test_a_file_of_arguments_that_cannot_be_read_is_named(
    pair: Pair, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "text.json").write_text("words", encoding="utf-8")
    command = ("recover", "model-that-is-not-there", "--data", pair.text, "-o", tmp_path / "out")
    for name, *words in (
        ("lists.json", "lists.json: does not exist", "did you mean", "list.json", "JSON file"),
        (".", "cannot be read: found Is a directory", "name a JSON file"),
        ("list.json", "list.json: is not a JSON object", "found list; correct it"),
        ("text.json", "text.json: is not valid JSON", "correct it"),
    ):
        given = (*command, "--tokens", 640, "--training-args", tmp_path / name)
        assert_refused(run(*given), *words)


def test_a_killed_run_of_a_mixture_continues_with_its_experts(pair: Pair, tmp_path: Path) -> None:
    dense = tiny.save(tmp_path / "dense", "mixtral", dtype=torch.bfloat16)
    plan = random_plan(dense, 560, 64)
    plan.save(tmp_path / "pruned.plan.json")
    mixture = Pair(dense, tmp_path / "pruned", pair.text, plan)
    apply_plan(plan, output=mixture.pruned)
    whole = recovered(mixture, tmp_path / "whole", tokens=8 * SEQ_LEN * 2)
    with pytest.raises(KeyboardInterrupt):
        recovered(mixture, tmp_path / "out", stopped_after(4), tokens=8 * SEQ_LEN * 2)
    again = recovered(mixture, tmp_path / "out", resume=True, tokens=8 * SEQ_LEN * 2)
    assert (again.curve, again.after) == (whole.curve, whole.after)
    assert whole.after == pytest.approx(min(bits for _, bits in whole.curve), abs=0.01)


def test_nothing_is_deleted_or_replaced_that_a_run_has_not_made(pair: Pair, tmp_path: Path) -> None:
    work, mine = tmp_path / "out.training", tmp_path / "out.training" / "mine.txt"
    work.write_text("a file", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(SurgeryError, match="in the way"):
            recovered(pair, tmp_path / "out", resume=resume)
    work.unlink()
    work.mkdir()
    mine.write_text("x", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(SurgeryError, match="in the way"):
            recovered(pair, tmp_path / "out", resume=resume)
    assert mine.read_text(encoding="utf-8") == "x"
    mine.unlink()
    work.rmdir()
    for end in (".plan.json", ".trained.safetensors", ".self-data.jsonl"):
        mine = tmp_path / f"out{end}"
        mine.write_text("x", encoding="utf-8")
        with pytest.raises(SurgeryError, match=f"{end}.*; name another output"):
            recovered(pair, tmp_path / "out", resume=True)
        assert mine.read_text(encoding="utf-8") == "x"
        mine.unlink()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_into_what_is_read(pair: Pair, tmp_path: Path) -> None:
    before = snapshot(pair.dense)
    for changes in ({}, {"method": "continue"}, {"teacher": str(pair.dense)}):
        with pytest.raises(SurgeryError, match="inside each other"):
            requested(pair, pair.dense / "out", **changes)
    assert snapshot(pair.dense) == before


def test_a_run_without_a_checkpoint_outlives_other_options(pair: Pair, tmp_path: Path) -> None:
    from calib.recovery.work import WorkDirectory

    work = tmp_path / "out.training"
    first = WorkDirectory(work, {"teacher": "one"}, resume=False)
    first.close(keep=True)  # as a kill leaves it
    with pytest.raises(SurgeryError, match="teacher"):
        WorkDirectory(work, {"teacher": "another"}, resume=True)
    assert (work / "identity.json").exists()
    WorkDirectory(work, {"teacher": "one"}, resume=True).close(done=True)
    assert not work.exists()


def test_a_teacher_that_was_changed_is_another_one(pair: Pair, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(pair.dense, dense)
    with pytest.raises(KeyboardInterrupt):
        recovered(pair, tmp_path / "out", stopped_after(4), teacher=str(dense))
    for path in dense.glob("*.safetensors"):
        save_file({name: -value for name, value in load_file(path).items()}, path)
    with pytest.raises(SurgeryError, match="teacher"):
        recovered(pair, tmp_path / "out", teacher=str(dense), resume=True)


def test_numbers_that_are_not_finite_are_an_error(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object) -> None:
        pytest.fail("trained")

    with pytest.raises(SurgeryError, match="finite"):
        recovered(pair, tmp_path / "out", learning_rate=float("inf"))
    broken = tmp_path / "broken"
    shutil.copytree(pair.dense, broken)
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if DOWN in tensors:
            tensors[DOWN][3, 4] = float("nan")
            save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr("calib.recovery.run.run_trainer", train)
    nothing = Pair(broken, broken, pair.text, pair.plan)
    cases: list[tuple[Pair, dict[str, Any]]] = [
        (pair, {"teacher": str(broken)}),
        (pair, {"teacher": str(broken), "method": "self-data"}),
        (nothing, {"method": "continue"}),
    ]
    for models, changes in cases:
        words = rf"safetensors: tensor {DOWN}: has a number that is not finite.*download the file"
        with pytest.raises(SurgeryError, match=words):
            recovered(models, tmp_path / "out", tokens=2 * SEQ_LEN * 2, **changes)
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", "abc"),
        ("gradient_accumulation_steps", 0),
        ("metric_for_best_model", "loss"),
        ("per_device_train_batch_size", 4),
        ("eval_strategy", "no"),
        ("save_strategy", "no"),
        ("save_only_model", True),
        ("seed", 1),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    pair: Pair, tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(SurgeryError, match=name):
        recovered(pair, tmp_path / "out", training={name: value})


def test_the_tokens_of_the_best_state_are_told_from_those_of_the_run() -> None:
    from calib.recovery.written import Recovered

    made = Recovered(None, "distill", 2.0, 1.2, ((10, 1.5), (20, 1.2), (30, 1.3)), 1.0, None)
    assert (made.best_tokens, made.tokens) == (20, 30)


def test_arguments_that_the_library_refuses_are_named(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="refused by transformers"):
        recovered(pair, tmp_path / "out", training={"report_to": "nothing-known"})
    assert not list(tmp_path.iterdir())


def test_few_positions_split_the_held_out_text(pair: Pair, tmp_path: Path, run: Run) -> None:
    model = tiny.save(tmp_path / "gpt2", "gpt2", n_positions=64)
    given = ("recover", model, "--data", pair.text, "--method", "continue", "--windows", 2)
    how = ("--tokens", 1280, "--batch-size", 2, "--learning-rate", 3e-3, "--device", "cpu")
    result = run(*given, *how, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    scored = run("score", model, "--data", pair.text, "--dtype", "float32", "--json")
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize(
    ("key", "more", "words"),
    [
        ("mixtral", ("--lora", 4), "does not work with --lora"),
        ("bloom", (), "trains nothing"),
    ],
)
def test_ffns_that_cannot_be_trained_are_refused(
    pair: Pair, tmp_path: Path, run: Run, key: str, more: tuple[object, ...], words: str
) -> None:
    model = tiny.save(tmp_path / "model", key)
    given = ("recover", model, "--data", pair.text, "--method", "continue", "--tokens", 640)
    refused = run(*given, "-o", tmp_path / "out", "--only", "ffn", *more)
    assert_refused(refused, "--only ffn", words)


def test_a_missing_library_is_named(
    pair: Pair, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "calib.recovery.run", raising=False)
    given = ("recover", pair.pruned, "--data", pair.text, "-o", tmp_path / "out", "--tokens", 640)
    assert_refused(run(*given), "accelerate: is not installed", "pip install")


def test_held_out_bits_are_those_of_a_score(pair: Pair) -> None:
    from calib.recovery.model import load_model
    from calib.recovery.text import encode_heldout, hold_out
    from calib.recovery.trainer import HeldOut

    layout = open_layout(pair.pruned)
    _, held = hold_out([pair.text.read_text(encoding="utf-8")], 2)
    tokenizer = load_tokenizer(pair.pruned)
    ids = encode_heldout(held, tokenizer, first_token(layout), positions(layout))
    windows = HeldOut(ids, sum(len(text.encode()) for text in held), nullcontext)
    found = windows.bits_per_byte(load_model(layout, torch.float32), torch.device("cpu"))
    settings = choose_settings(ComputeOptions("cpu", dtype="float32"), layout.checkpoint)
    wanted = score_windows(layout, held, tokenizer, settings)
    assert found == pytest.approx(wanted.bits_per_byte, rel=1e-6)


def test_steps_that_another_process_has_chosen_are_taken(pair: Pair, tmp_path: Path) -> None:
    from calib.recovery.work import WorkDirectory

    given: dict[str, Any] = {"tokens": None, "minutes": 0.1, "method": "continue"}
    work = WorkDirectory(
        tmp_path / "out.training", requested(pair, tmp_path / "out", **given).identity, resume=False
    )
    work.begin(3, 1, 5.0)
    work.close(keep=True)
    seen: list[tuple[int, int]] = []
    made = recovered(
        pair, tmp_path / "out", lambda _, *done: seen.append(done), resume=True, **given
    )
    assert seen[-1] == (3 * SEQ_LEN * 2, 3 * SEQ_LEN * 2)
    assert made.before == 5.0


def test_self_data_shares_its_minutes_with_the_writing(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages: dict[str, int] = {}

    def note(stage: str, done: int, total: int) -> None:
        stages[stage] = total

    made = recovered(pair, out, note, tokens=None, minutes=0.05, method="self-data")
    assert stages["writing"] == 2  # seconds
    assert 1 < made.writing_seconds <= made.seconds
    assert made.tokens > 0
    lines = (tmp_path / "out.self-data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) % 16 == 0
