"""Two runs to one output: the second is refused at once."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery.errors import OutputError
from surgery.files.atomic import NO_LOCKS, FileLock, lock_output
from tests.support import ROOT
from tests.support.contents import snapshot
from tests.support.plans import random_plan

PAUSED = """
import os, signal
import surgery.apply.shard as shard
from surgery.cli.main import main
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
    program = "from surgery.cli.main import main; main()"
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
    with start(plan, out, "--resume", code="from surgery.cli.main import main; main()") as second:
        assert second.wait() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out"}


def test_an_output_is_locked_once_and_its_lock_goes(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out.lock"
    lock = lock_output(out, path)
    with pytest.raises(OutputError, match="out: is being written by another run"):
        lock_output(out, path)
    lock.remove()
    assert not path.exists()
    lock_output(out, path).remove()


def test_a_lock_whose_file_was_deleted_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that held it deletes it after the next one has opened it."""
    path, real = tmp_path / "out.lock", FileLock.try_acquire
    first = lock_output(tmp_path / "out", path)

    def late(lock: FileLock) -> bool:
        monkeypatch.setattr(FileLock, "try_acquire", real)
        first.remove()
        return real(lock)

    monkeypatch.setattr(FileLock, "try_acquire", late)
    second = lock_output(tmp_path / "out", path)
    with pytest.raises(OutputError):
        lock_output(tmp_path / "out", path)
    second.remove()


@pytest.mark.parametrize("code", [*NO_LOCKS, errno.EIO])
def test_without_locks_of_the_file_system_nothing_keeps_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def none(*_: object, **__: object) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("filelock.lock_descriptor", none)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            lock_output(tmp_path / "out", tmp_path / "lock")
        return
    for _ in range(2):
        lock_output(tmp_path / "out", tmp_path / "lock")
    with pytest.raises(OSError, match=os.strerror(code)):
        FileLock(tmp_path / "lock").acquire()
