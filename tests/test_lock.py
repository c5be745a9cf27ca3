"""Two runs to one output: the second is refused at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.contents import snapshot
from tests.support.plans import random_plan

PAUSED = """
import os, signal
import surgery.shard as shard
from surgery.cli import main
real = shard.stream_edit
def pause(edit, source, output):
    shard.stream_edit = real
    os.kill(os.getpid(), signal.SIGSTOP)
    real(edit, source, output)
shard.stream_edit = pause
main()
"""
"""apply that stops in its first shard until it gets SIGCONT."""


def start(plan: Path, output: Path, *options: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, "apply", plan, "-o", output, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def state(process: subprocess.Popen[str]) -> str:
    text = Path(f"/proc/{process.pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at states in /proc")
def test_the_second_of_two_runs_is_refused_and_the_first_goes_on(
    tmp_path: Path, llama: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    program = "from surgery.cli import main; main()"
    with start(plan, out, "--jobs", "1", code=PAUSED) as first:
        while state(first) != "T":
            assert first.poll() is None
            time.sleep(0.005)
        for options in ((), ("--resume",)):
            with start(plan, out, *options, code=program) as second:
                _, message = second.communicate(timeout=60)
            assert second.returncode == 2
            assert message.count("\n") == 1
            assert "out.partial: is being written by another run; wait for it, or stop" in message
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out"}
    with start(plan, tmp_path / "again", code=program) as third:
        assert third.wait() == 0
    assert snapshot(out) == snapshot(tmp_path / "again")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at states in /proc")
def test_the_lock_of_a_killed_run_is_gone(tmp_path: Path, llama: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    with start(plan, out, code=PAUSED) as first:
        while state(first) != "T":
            time.sleep(0.005)
        first.kill()
    with start(plan, out, "--resume", code="from surgery.cli import main; main()") as second:
        assert second.wait() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out"}
