"""A calibration that is killed anywhere can be resumed, and ends in the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from calib.statistics.resume import ResumeDirectory
from surgery.stats.channel_stats import ChannelStats
from tests.support import tiny
from tests.support.command import Run

LAYERS = 12
KILLS = 12
ARGUMENTS = ("--seq-len", "64", "--samples", "40")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with many layers."""
    return tiny.save(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=LAYERS)


# One child forks a calibration for each trial, so that torch is imported once and not at each.
TRIAL = """
import os, signal, sys, time
import calib.statistics.calibrate, surgery.text.documents
from surgery.cli.main import main
import transformers.models.llama.modeling_llama
for line in sys.stdin:
    delay, *arguments = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(end.code or 0)
    end = time.monotonic() + float(delay)
    status = (0, 0)
    while time.monotonic() < end and not status[0]:
        status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not status[0]:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status[1]), flush=True)
"""


class Trials:
    """Calibrations in processes of their own that are killed after a while."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", TRIAL]
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, delay: float, *arguments: object) -> int:
        """Run for ``delay`` seconds at most and return the exit status, -9 where killed."""
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write("\t".join(map(str, (delay, *arguments))) + "\n")
        self._child.stdin.flush()
        return int(self._child.stdout.readline())

    def end(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each trial")
@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "spill"])
def test_killed_at_random_points_it_ends_in_the_same_bytes(
    tmp_path: Path, deep: Path, text: Path, spilled: bool
) -> None:
    out, whole = tmp_path / "stats.safetensors", tmp_path / "whole.safetensors"
    (tmp_path / "spill").mkdir()
    spill = ("--spill", tmp_path / "spill") if spilled else ()
    options = ("calibrate", deep, "--data", text, *ARGUMENTS, *spill)
    trials, choose = Trials(), random.Random(spilled)
    try:
        assert trials(600, *options, "-o", whole) == 0
        start = time.monotonic()
        shutil.copy(whole, tmp_path / "first")
        assert trials(600, *options, "-o", whole, "--force") == 0
        needed = time.monotonic() - start
        killed = kept = 0
        while killed < KILLS:
            before = finished(out)
            status = trials(choose.uniform(0, needed), *options, "-o", out, "--resume")
            assert status in (0, -signal.SIGKILL)
            assert finished(out) >= before or out.exists()
            killed += status != 0
            kept += finished(out) > 0
            if status == 0:
                assert out.read_bytes() == whole.read_bytes()
                assert not out.with_name("stats.safetensors.partial").exists()
                out.unlink()
        assert kept
        assert trials(600, *options, "-o", out, "--resume") == 0
    finally:
        trials.end()
    assert out.read_bytes() == whole.read_bytes() == (tmp_path / "first").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name, "first", "spill"}
    assert not list((tmp_path / "spill").iterdir())


def finished(out: Path) -> int:
    """Layers whose sums are on the disk."""
    return len(list(out.with_name(f"{out.name}.partial").glob("layer_*.safetensors")))


def interrupted(path: Path, text: Path, out: Path, *extra: str) -> None:
    """Leave the directory of a run that fails at its third layer."""
    from click.testing import CliRunner

    from calib.streaming.layers import Layers
    from surgery.cli.main import main

    patch = pytest.MonkeyPatch()
    load = Layers._load

    def failing(self: Layers, index: int, *rest: object) -> None:
        if index == 2:
            raise OSError(5, "Input/output error", "shard")
        load(self, index, *rest)  # type: ignore[arg-type]

    with patch.context() as scope:
        scope.setattr(Layers, "_load", failing)
        options = ["--data", str(text), *ARGUMENTS, "-o", str(out), *extra]
        result = CliRunner().invoke(main, ["calibrate", str(path), *options])
    assert result.exit_code == 2, result.output
    assert finished(out) == 2
    assert not out.with_name(f"{out.name}.partial.lock").exists()


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_resumes_to_the_same_bytes(
    tmp_path: Path, text: Path, run: Run, key: str
) -> None:
    """What its routed experts put out is kept with the sums of their channels."""
    model = tiny.save(tmp_path / "model", key)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "stats.safetensors"
    take = ("calibrate", model, "--data", text, *ARGUMENTS)
    assert run(*take, "-o", whole).exit_code == 0
    interrupted(model, text, out)
    resumed = run(*take, "-o", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming: 2 of" in resumed.stderr
    assert out.read_bytes() == whole.read_bytes()


def test_an_interrupted_run_is_not_overwritten(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "stats.safetensors"
    interrupted(llama, text, out)
    result = run("calibrate", llama, "--data", text, *ARGUMENTS, "-o", out)
    assert result.exit_code == 2
    assert "continue it with --resume, or delete it" in result.output


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--vocab-sizes", "400"), "--vocab-sizes"),
        (("--vocab-size", "400"), "--vocab-size"),
        (("--dtype", "bfloat16"), "--dtype"),
        (("--seq-len", "48"), "--seq-len"),
        (("--samples", "39"), "--samples"),
        (("--seed", "3"), "--seed"),
        (("--vocab-by", "frequency"), "order of the vocabulary"),
        (("--spill", "elsewhere"), "--spill"),
    ],
)
def test_what_changed_is_named(
    tmp_path: Path,
    llama: Path,
    text: Path,
    run: Run,
    changed: tuple[str, ...],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    out = tmp_path / "stats.safetensors"
    interrupted(llama, text, out)
    options = ("--data", text, *ARGUMENTS, *changed, "-o", out, "--resume")
    result = run("calibrate", llama, *options)
    assert result.exit_code == 2
    assert "belongs to a run with another" in result.output
    assert named in result.output
    assert finished(out) == 2
    assert run("calibrate", llama, *options[:-1]).exit_code == 2
    again = ("--data", text, *ARGUMENTS, "-o", out, "--resume")
    assert run("calibrate", llama, *again).exit_code == 0


def test_another_model_or_text_is_named(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    out, copy = tmp_path / "stats.safetensors", tmp_path / "copy"
    interrupted(llama, text, out)
    shutil.copytree(llama, copy)
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.25}))
    other = tmp_path / "other.txt"
    other.write_text(tiny.prose(24_000)[12_000:], encoding="utf-8")
    for model, data, named in ((copy, text, "another model:"), (llama, other, "another text")):
        result = run("calibrate", model, "--data", data, *ARGUMENTS, "-o", out, "--resume")
        assert result.exit_code == 2
        assert named in result.output


def test_outputs_of_one_name_do_not_share_hidden_states(tmp_path: Path) -> None:
    for name in ("a", "b", "spill"):
        (tmp_path / name).mkdir()
    with (
        ResumeDirectory(
            tmp_path / "a" / "stats", {}, resume=False, spill=tmp_path / "spill"
        ) as one,
        ResumeDirectory(
            tmp_path / "b" / "stats", {}, resume=False, spill=tmp_path / "spill"
        ) as other,
    ):
        assert one.hidden != other.hidden
        one.remove()
        assert other.hidden.is_dir()


@pytest.mark.parametrize("restarted", [False, True], ids=["killed", "power lost"])
def test_a_kill_before_the_disk_has_a_layer_loses_only_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """What a process had written outlives it; the machine's memory does not outlive a restart."""
    out, left = tmp_path / "stats.safetensors", tmp_path / "left"
    reached = threading.Event()
    with ResumeDirectory(out, {"model": "a"}, resume=False) as directory:
        directory.add(0, {}, 1.0)
        directory.add(1, {}, 2.0, reached.wait)  # a slow disk
        shutil.copytree(directory.path, left / directory.path.name)
        reached.set()
    if restarted:
        monkeypatch.setattr("calib.statistics.resume.boot_id", lambda: "another")
    with ResumeDirectory(left / out.name, {"model": "a"}, resume=True) as again:
        assert again.finished == (1 if restarted else 2)
        assert again.sums(again.finished - 1)[1] == float(again.finished)
    monkeypatch.setattr("calib.statistics.resume.boot_id", lambda: "")
    with ResumeDirectory(left / out.name, {"model": "a"}, resume=True) as third:
        assert third.finished == again.finished


@pytest.mark.parametrize("damage", [b"", b"{", b'{"identity": {}, "finished": "two"}'])
def test_a_damaged_state_is_refused(
    tmp_path: Path, llama: Path, text: Path, run: Run, damage: bytes
) -> None:
    out = tmp_path / "stats.safetensors"
    interrupted(llama, text, out)
    (out.with_name(out.name + ".partial") / "state.json").write_bytes(damage)
    result = run("calibrate", llama, "--data", text, *ARGUMENTS, "-o", out, "--resume")
    assert result.exit_code == 2
    assert "cannot be resumed" in result.output


def test_a_run_in_progress_is_left_alone(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    out = tmp_path / "stats.safetensors"
    other = ResumeDirectory(out, {}, resume=False)
    result = run("calibrate", llama, "--data", text, *ARGUMENTS, "-o", out, "--resume")
    assert result.exit_code == 2
    assert "is being written by another run" in result.output
    other.remove()


def test_a_finished_run_is_finished(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    """A run that was killed after its last step does not start again with --resume."""
    out = tmp_path / "stats.safetensors"
    options = ("calibrate", llama, "--data", text, *ARGUMENTS, "-o", out, "--resume")
    assert run(*options).exit_code == 0
    written = out.stat().st_mtime_ns
    out.with_name(out.name + ".partial").mkdir()
    assert run(*options).exit_code == 0
    assert out.stat().st_mtime_ns == written
    assert not out.with_name(out.name + ".partial").exists()
    assert ChannelStats.load(out).info.samples == 40
