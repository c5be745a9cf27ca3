"""Without what only Linux has, and with what Windows refuses, commands write the same bytes."""

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calib.streaming.hidden_states import reserve
from surgery import process
from surgery.process import release_freed_memory, reuse_freed_memory
from tests.support.command import Run
from tests.support.contents import snapshot

ROOT = Path(__file__).parents[2]

GONE = {
    "sys.modules": ("fcntl", "resource"),
    "os": ("posix_fallocate",),
    "mmap": ("MADV_DONTNEED",),
}
"""What is taken away: modules, and names of modules."""

ELSEWHERE = """
import errno, mmap, os, pathlib, shutil, sys
import psutil  # which needs what Linux has, on Linux

for name in GONE["sys.modules"]:
    sys.modules[name] = None
for module in (os, mmap):
    for name in GONE[module.__name__]:
        delattr(module, name)

# As Windows does it: directories are not opened, what is open to read only is not synced, and what
# is open or mapped is neither deleted nor renamed nor replaced.
shutil._use_fd_functions = False

def refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

def in_use(path):
    path = os.path.realpath(path)
    used = []
    for name in os.listdir("/proc/self/fd"):
        try:
            used.append(os.readlink("/proc/self/fd/" + name))
        except OSError:
            pass
    with open("/proc/self/maps", errors="replace") as lines:
        used += [line.split(maxsplit=5)[5].rstrip() for line in lines if "/" in line]
    return any(other == path or other.startswith(path + "/") for other in used)

real_open, real_fsync = os.open, os.fsync

def without_directories(path, flags, *rest, **more):
    if not isinstance(path, int) and os.path.isdir(path):
        refuse(path)
    return real_open(path, flags, *rest, **more)

def writable_only(descriptor):
    os.write(descriptor, b"")
    real_fsync(descriptor)

def guarded(function):
    def call(*paths, **more):
        for path in paths:
            if in_use(path):
                refuse(path)
        return function(*paths, **more)
    return call

os.open, os.fsync = without_directories, writable_only
for name in ("unlink", "remove", "rename", "replace"):
    setattr(os, name, guarded(getattr(os, name)))

import surgery.process
surgery.process.IO_COUNTERS = pathlib.Path("no such file")
import calib.statistics.resume
calib.statistics.resume.CAN_DELETE_MAPPED = False
"""
"""Code that makes this process one of another system."""

MAIN = """
import json, sys
from surgery.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""
"""Code that runs several commands."""


def run(*commands: tuple[object, ...], before: str = "", **settings: str) -> str:
    """Run ``commands`` in one process and return what they print."""
    words = [[str(word) for word in command] for command in commands]
    result = subprocess.run(
        [sys.executable, "-c", before + MAIN, json.dumps(words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def all_commands(place: Path, llama: Path, text: Path, before: str) -> str:
    (place / "spill").mkdir(parents=True)
    stats, plan, out = place / "stats.safetensors", place / "plan.json", place / "out"
    calibrate = ("calibrate", llama, "--data", text, "--samples", 8, "--seq-len", 64)
    sizes = ("--vocab-size", 512, "--intermediate-size", 64)
    return run(
        (*calibrate, "-o", stats),
        (*calibrate, "--spill", place / "spill", "-o", place / "spilled.safetensors"),
        ("plan", llama, "--stats", stats, *sizes, "-o", plan),
        ("apply", plan, "-o", out, "--json"),
        ("verify", out),
        before=before,
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc to play Windows")
def test_on_another_system_the_bytes_are_the_same(tmp_path: Path, llama: Path, text: Path) -> None:
    all_commands(tmp_path / "here", llama, text, "")
    told = all_commands(tmp_path / "there", llama, text, f"GONE = {GONE!r}\n{ELSEWHERE}")
    assert '"peak_rss_bytes": null' in told
    here, there = (tmp_path / "here", tmp_path / "there")
    assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}
    for name in ("stats.safetensors", "spilled.safetensors", "plan.json"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert snapshot(here / "out") == snapshot(there / "out")
    assert not list((there / "spill").iterdir())


def test_a_console_that_lacks_a_character_shows_its_number(tmp_path: Path, llama: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "σ"
    sizes = ("--vocab-size", 512, "--intermediate-size", 96)
    told = run(
        ("plan", llama, *sizes, "-o", plan),
        ("apply", plan, "-o", out),
        PYTHONIOENCODING="cp1252",
    )
    assert "\\u03c3: " in told
    assert out.is_dir()


def test_no_c_library_is_asked_where_it_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(name: object) -> None:
        raise TypeError("of Windows")

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", nameless)
        patch.setattr(os, "name", "nt")
        reuse_freed_memory()
        release_freed_memory()


def test_disk_is_reserved_where_the_system_has_no_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run left in the file stays; the rest is written, so that it has its place."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = tmp_path / "hidden"
    for before, nbytes in ((b"left", 100_000), (b"left", 4), (b"left over", 4)):
        path.write_bytes(before)
        with open(path, "a+b") as file:
            reserve(file.fileno(), nbytes)
        assert path.read_bytes() == b"left".ljust(nbytes, b"\0")


def test_what_no_system_counts_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(process, "IO_COUNTERS", Path("no such file"))
    monkeypatch.delattr(psutil.Process, "io_counters", raising=False)
    assert process.moved_bytes() is None


class Unreadable:
    """A file that the system shows to nobody."""

    def read_text(self, *, encoding: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/proc/self/io")


def test_apply_works_where_its_own_counters_cannot_be_read(
    bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "IO_COUNTERS", Unreadable())
    made = run("apply", "plan.json", "-o", "out", "--json")
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts["parameters"] > 0
    assert not {"read_bytes", "written_bytes", "written_bytes_per_second"} & facts.keys()


def test_windows_tells_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Info:
        peak_wset = 12_345

    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: Info)
    assert process.peak_rss_bytes() == 12_345
