"""prune calibrates only where it must, continues after a kill, and says what it takes."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calib.statistics.calibrate import _StatsAccumulator
from surgery.api import plan_model
from surgery.families.schema import Family
from surgery.families.table import FAMILIES
from surgery.hub.shards import Shards
from surgery.layout.layout import Layout
from surgery.planning import selection
from surgery.planning.request import CutRequest, SizeRequest
from surgery.stats.channels import ChannelOptions
from tests.support import ROOT, tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import digests, snapshot
from tests.support.plans import layout_of, random_stats

KILLED = """
import os, sys
import {module} as module
from surgery.cli.main import main
calls, real = [], {function}
def dies(*arguments, **options):
    calls.append(1)
    if len(calls) > {after}:
        os._exit(9)
    return real(*arguments, **options)
{function} = dies
main(sys.argv[1:])
"""
TEXT = ("--data", "text.txt", "--samples", "2", "--seq-len", "32")
SIZES = ("--vocab-size", "512", "--intermediate-size", "64")
STAGES = {
    "a layer": ("calib.statistics.calibrate", "module._StatsAccumulator._finish", 1),
    "a shard": ("surgery.apply.shard", "module.stream_edit", 12),
}


def killed(stage: str, command: list[str]) -> None:
    module, function, after = STAGES[stage]
    code = KILLED.format(module=module, function=function, after=after)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 9, ended.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_prune_continues(
    tmp_path: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = tiny.save(tmp_path / "model", sharded=True)
    take = ["prune", model, "--data", text, "--seq-len", 64, "--samples", 4, "--device", "cpu"]
    take += ["--vocab-size", 512, "--intermediate-size", 64]
    whole, out = tmp_path / "a" / "out", tmp_path / "b" / "out"
    assert run(*take, "-o", whole).exit_code == 0
    killed(stage, [*map(str, take), "-o", str(out)])
    assert not out.exists()

    def work(*_: object, **__: object) -> None:
        pytest.fail("looked at what was there only after work")

    with monkeypatch.context() as patch:
        patch.setattr("calib.pipeline.prepare_calibration", work)
        refused = run(*take, "-o", out)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.output

    passed: list[int] = []
    real = _StatsAccumulator._finish

    def finish(self: _StatsAccumulator, layer: int) -> None:
        passed.append(layer)
        real(self, layer)

    monkeypatch.setattr(_StatsAccumulator, "_finish", finish)
    resumed = run(*take, "-o", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    found = {"a layer": "1 of 3 layers", "a shard": "3 of 3 layers"}[stage]
    assert f"resuming: {found} finished before" in resumed.stderr
    assert "of 5 shards finished before" in resumed.stderr
    assert passed == ([1, 2] if stage == "a layer" else [])
    beside = [path.with_name("out.stats.safetensors").read_bytes() for path in (whole, out)]
    assert beside[0] == beside[1]
    assert snapshot(out) == snapshot(whole)
    assert not list(out.parent.glob("*.partial*"))
    assert run(*take, "-o", out).exit_code == 2
    assert run(*take, "-o", out, "--resume").exit_code == 0


@pytest.mark.parametrize(
    "sizes",
    [
        ("--vocab-size", 512),
        ("--layers", "0,2"),
        ("--intermediate-size", 64, "--criterion", "random"),
        ("--drop-script", "Latin"),
    ],
)
def test_what_no_text_chooses_needs_no_text(
    llama: Path, text: Path, tmp_path: Path, run: Run, sizes: tuple[object, ...]
) -> None:
    made = run("prune", llama, *sizes, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert not (tmp_path / "out.stats.safetensors").exists()
    idle = run("prune", llama, *sizes, "--seq-len", 64, "-o", tmp_path / "idle")
    assert_refused(idle, "--seq-len: has no effect where nothing is chosen")
    assert run("plan", llama, *sizes, "-o", tmp_path / "plan.json").exit_code == 0
    assert run("apply", tmp_path / "plan.json", "-o", tmp_path / "steps").exit_code == 0
    weights = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    for name, content in weights.items():
        assert (tmp_path / "steps" / name).read_bytes() == content
    shown = run("prune", llama, *sizes, "--data", text, "-o", tmp_path / "shown")
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--intermediate-size", 64),
            ("--data", "is needed to choose channels, experts"),
        ),
        (("--num-hidden-layers", 2), ("--data", "is needed to choose channels, experts")),
        (("--ratio", 0.2, "--multiple-of", 8), ("--data", "is needed")),
        (("--vocab-size", 512, "--vocab-by", "frequency"), ("needs a text to count tokens in",)),
        (("--vocab-size", 512, "--field", "text"), ("--field", "no effect without --data")),
    ],
)
def test_what_a_text_chooses_needs_one(
    llama: Path, tmp_path: Path, run: Run, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run("prune", llama, *options, "-o", tmp_path / "out"), *words)
    assert not list(tmp_path.iterdir())


def test_random_channels_are_the_same_with_and_without_statistics(llama: Path) -> None:
    layout = layout_of(llama)
    request = CutRequest(
        SizeRequest(intermediate_size=64), channels=ChannelOptions(criterion="random")
    )
    plans = [plan_model(layout, request, stats) for stats in (None, random_stats(layout))]
    assert plans[0].kept_channels == plans[1].kept_channels != []


@pytest.mark.parametrize(
    "sizes",
    [
        ("--ratio", 0.2, "--multiple-of", 8),
        ("--ratio", 0.3, "--vocab-size", 560, "--multiple-of", 8),
        ("--vocab-size", 512, "--intermediate-size", 64, "--vocab-by", "frequency"),
        ("--ratio", 0.15, "--only", "channels", "--multiple-of", 8),
        ("--num-hidden-layers", 2, "--vocab-size", 560),
    ],
)
def test_the_steps_give_the_bytes_of_prune(
    llama: Path, text: Path, tmp_path: Path, run: Run, sizes: tuple[object, ...]
) -> None:
    take = ("--data", text, "--seq-len", 64, "--samples", 6)
    pruned, steps = tmp_path / "pruned", tmp_path / "steps"
    assert run("prune", llama, *take, *sizes, "-o", pruned).exit_code == 0
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    made = run("calibrate", llama, *take, *sizes, "-o", stats)
    assert made.exit_code == 0, made.output
    made = run("plan", llama, "--data", text, *sizes, "--stats", stats, "-o", plan)
    assert made.exit_code == 0, made.output
    assert run("apply", plan, "-o", steps).exit_code == 0
    assert snapshot(steps) == snapshot(pruned)


@pytest.mark.parametrize(
    ("function", "command"),
    [
        (
            "calib.statistics.calibrate._StatsAccumulator._finish",
            ("calibrate", "model", *TEXT, "-o", "kept"),
        ),
        ("surgery.apply.shard.stream_edit", ("apply", "plan.json", "-o", "out")),
        ("surgery.apply.shard.stream_edit", ("prune", "model", *SIZES, *TEXT, "-o", "a out")),
    ],
)
def test_ctrl_c_names_the_command_that_continues(
    bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch, function: str, command: tuple[str, ...]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, interrupt)
        ended = run(*command)
    assert ended.exit_code == 130, ended.output
    again = ended.stderr.splitlines()[-1].removeprefix("interrupted; continue with: ")
    words = shlex.split(again)
    assert words == ["compact-surgery", *map(str, command), "--resume"]
    continued = run(*words[1:])
    assert continued.exit_code == 0, continued.output
    assert "finished before" in continued.stderr


TAKE = ("--seq-len", 64, "--samples", 4, "--device", "cpu")


@pytest.mark.parametrize(
    ("key", "cut"),
    [
        ("llama", ("--vocab-size", 512, "--intermediate-size", 64)),
        ("llama", ("--num-hidden-layers", 2)),
        ("llama", ("--intermediate-size", 64, "--repair", "reconstruct")),
        ("mixtral", ("--intermediate-size", 64, "--min-expert-tokens", 0)),
        ("bloom", ("--vocab-size", 512)),
    ],
)
def test_a_dry_run_says_what_prune_makes_and_writes_nothing(
    tmp_path: Path, text: Path, run: Run, key: str, cut: tuple[object, ...]
) -> None:
    model, out = tiny.save(tmp_path / "model", key), tmp_path / "new" / "out"
    take = () if key == "bloom" else TAKE
    command = ("prune", model, "--data", text, *take, *cut, "-o", out)
    before = digests(tmp_path)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, (dry.output, dry.exception)
    assert digests(tmp_path) == before
    made = run(*command)
    assert made.exit_code == 0, (made.output, made.exception)
    sizes = ["vocab_size", "parameters", "bytes of weights"]
    sizes += [] if key == "bloom" else ["intermediate_size"]
    sizes += ["layers"] if "--num-hidden-layers" in cut else []
    rows = [{line[:20].strip(): line for line in each.stdout.splitlines()} for each in (dry, made)]
    assert all(rows[0][size] == rows[1][size] for size in sizes)
    lines = {line.split()[0]: line for line in dry.stdout.splitlines() if line}
    assert lines["apply"].split()[-2:] == ["0", "MB"]
    assert ("repair" in lines) == ("--repair" in cut)
    assert ("calibrate" in lines) == (key != "bloom")
    assert ("calibration says which" in dry.stdout) == ("--num-hidden-layers" in cut)
    assert dry.stdout.endswith("nothing was written\n")
    assert "`" not in dry.stdout
    if key != "bloom":
        assert "text: 4 windows, 256 tokens" in dry.stdout
    refused = run(*command, "--dry-run")
    assert_refused(refused, "exists already")


@pytest.mark.parametrize(
    "sizes",
    [
        ("--num-experts", 3),
        ("--num-experts", 3, "--vocab-size", 512, "--intermediate-size", 64),
        ("--ratio", 0.2, "--only", "experts"),
    ],
)
def test_a_dry_run_of_removed_experts_has_the_sizes_of_the_result(
    tmp_path: Path, text: Path, run: Run, sizes: tuple[object, ...]
) -> None:
    model = tiny.save(tmp_path / "model", "mixtral")
    command = ("prune", model, "--data", text, *TAKE, *sizes, "-o", tmp_path / "out")
    foretold = run(*command, "--dry-run")
    assert foretold.exit_code == 0, foretold.output
    assert not (tmp_path / "out").exists()
    made = run(*command)
    assert made.exit_code == 0, made.output
    for line in ("parameters", "bytes of weights"):
        before, after = (
            next(row for row in shown.stdout.splitlines() if row.startswith(line))
            for shown in (foretold, made)
        )
        assert before == after


def test_a_finished_prune_says_the_time_of_each_stage(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    command = ("prune", llama, "--data", text, *TAKE, "--intermediate-size", 64)
    made = run(*command, "-o", tmp_path / "out")
    pattern = r"^calibrate [\d.]+ s, plan [\d.]+ s, apply [\d.]+ s, verify [\d.]+ s, together .* s$"
    assert re.search(pattern, made.stdout, re.MULTILINE)
    assert_refused(
        run(*command, "-o", tmp_path / "other", "--dry-run", "--resume"), "has no effect"
    )


def test_a_criterion_of_weights_alone_reads_them_once(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = tiny.save(tmp_path / "model", "mixtral"), list[int]()

    def noted(layout: Layout, layer: int, shards: Shards) -> np.ndarray:
        read.append(layer)
        return measured(layout, layer, shards)

    measured = selection._aimer
    monkeypatch.setattr(selection, "_aimer", noted)
    by = ("--num-experts", 3, "--expert-criterion", "aimer")
    made = run("prune", model, *by, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert read == list(range(tiny.LAYERS))


def test_what_transformers_would_not_load_is_not_written(
    tmp_path: Path, llama: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry forgets the channels of up_proj; plan and apply cannot see that."""
    family = FAMILIES["llama"]
    assert isinstance(family, Family)
    wrong = tuple(
        replace(slot, axes=()) if "up_proj.weight" in slot.name else slot for slot in family.slots
    )
    monkeypatch.setitem(FAMILIES, "llama", replace(family, slots=wrong))
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    result = run("prune", llama, "--data", text, *TEXT[2:], *SIZES, "-o", out)
    assert_refused(result, "would not load the output", "up_proj.weight is [96, 32]", "[64, 32]")
    assert not out.exists()
    drawn = ("--criterion", "random", *SIZES)
    assert run("plan", llama, *drawn, "-o", plan).exit_code == 0
    assert run("apply", plan, "-o", out).exit_code == 0
    verified = run("verify", out)
    assert verified.exit_code == 1
    assert "FAULT    transformers builds the same shapes" in verified.output
