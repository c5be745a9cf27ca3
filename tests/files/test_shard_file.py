"""Shards mapped and read: the same bytes, few pages, and no harm where a file shrinks."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.streaming.weights import pages
from surgery.api import apply_plan
from surgery.apply.edits import Edit
from surgery.apply.shard import edit_windows
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import IO, Buffer, MappedShardFile, ShardFile, open_shard
from surgery.process import release_freed_memory
from surgery.verify.files import verify_files
from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.plans import random_plan

ROOT = Path(__file__).parents[2]
MB = 1 << 20
KINDS: Sequence[IO] = ("mmap", "read")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of 64 MB."""
    path = tmp_path / "big"
    path.write_bytes(np.random.default_rng(0).bytes(64 * MB))
    return path


def take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only what every system has."""
    for name in ("preadv", "copy_file_range", "posix_fallocate", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("MADV_DONTNEED", "MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "MAP_POPULATE"):
        monkeypatch.delattr(mmap, name, raising=False)


@pytest.mark.parametrize("io", KINDS)
@pytest.mark.parametrize("poor", [False, True])
def test_the_output_is_the_same_with_and_without_the_calls_of_linux(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, io: IO, poor: bool
) -> None:
    plan = random_plan(llama, 512, 64)
    apply_plan(plan, source=llama, output=tmp_path / "whole", io="read")
    if poor:
        take_away(monkeypatch)
    apply_plan(plan, source=llama, output=tmp_path / "out", io=io)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    report = verify_files(tmp_path / "out", plan, llama, io=io)
    assert report.ok, report.table()


@pytest.mark.parametrize("poor", [False, True])
def test_mapped_windows_do_not_stay_in_memory(
    big: Path, monkeypatch: pytest.MonkeyPatch, poor: bool
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux reports which pages of a file are resident")
    if poor:
        take_away(monkeypatch)
    most, found, before = 0, [], resident_bytes("RssFile")
    with open_shard(big, "mmap") as shard:
        for window in shard.windows(5, 63 * MB, MB):
            found.append(bytes(window[::4096]))
            most = max(most, resident_bytes("RssFile") - before)
    assert MB / 2 < most < 8 * MB
    assert b"".join(found) == big.read_bytes()[5 : 5 + 63 * MB : 4096]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only glibc keeps freed memory, and releases it on request",
)
def test_freed_memory_is_released() -> None:
    blocks = [bytes([number % 255 + 1]) * 2048 for number in range(20_000)]
    del blocks[:-1]  # the last one holds what lies below it
    before = resident_bytes("RssAnon")
    release_freed_memory()
    assert before - resident_bytes("RssAnon") > 20 * MB


def resident_bytes(kind: str) -> int:
    """Resident bytes of this process: ``RssFile`` of mapped files, ``RssAnon`` of its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{kind}:"))
    return int(kilobytes) * 1024


def test_a_mapped_window_is_no_copy(big: Path) -> None:
    buffer = Buffer()
    with open_shard(big, "mmap") as shard, shard.window(4097, MB, buffer) as data:
        assert not data.flags.writeable
        assert not np.shares_memory(data, buffer.take(MB))
        assert data.tobytes() == big.read_bytes()[4097 : 4097 + MB]
    with open_shard(big, "read") as shard, shard.window(4097, MB, buffer) as data:
        assert np.shares_memory(data, buffer.take(MB))


@pytest.mark.parametrize("io", KINDS)
def test_elements_that_are_not_aligned(tmp_path: Path, io: IO) -> None:
    values = np.arange(64 * 32, dtype=np.uint32).reshape(64, 32)
    path = tmp_path / "shard"
    path.write_bytes(b"odd" + values.tobytes())
    kept = np.array([0, 5, 31])
    edit = Edit(TensorRef("t", path, "F32", values.shape, 3), 1, kept)
    with open_shard(path, io) as shard:
        assert b"".join(map(bytes, edit_windows(edit, shard))) == values[:, kept].tobytes()


@pytest.mark.parametrize("io", KINDS)
def test_a_file_that_is_too_short_is_an_error_before_it_is_touched(big: Path, io: IO) -> None:
    with open_shard(big, io) as shard:
        with shard.window(0, MB, Buffer()) as data:
            assert len(data) == MB
        os.truncate(big, 10 * MB)
        with pytest.raises(CheckpointError, match="shard ended early"):
            list(shard.windows(9 * MB + 1, MB, MB))
        os.truncate(big, 64 * MB)
        assert len(list(shard.windows(0, 64 * MB, MB))) == 64


def test_what_cannot_be_mapped_is_read(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(19, "No such device")

    with monkeypatch.context() as patch, open_shard(big, "mmap") as shard:
        patch.setattr(mmap, "mmap", refuse)
        found = b"".join(map(bytes, shard.windows(0, 2 * MB, MB)))
    assert found == big.read_bytes()[: 2 * MB]


def test_nothing_is_mapped_after_closing(big: Path) -> None:
    """Windows replaces no file that is mapped."""
    with open_shard(big, "mmap") as shard:
        assert isinstance(shard, MappedShardFile)
        list(shard.windows(0, 2 * MB, MB))
        if Path("/proc/self/maps").exists():
            assert str(big) in Path("/proc/self/maps").read_text()
    if Path("/proc/self/maps").exists():
        assert str(big) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", [ShardFile, MappedShardFile])
def test_a_missing_shard(tmp_path: Path, kind: type[ShardFile]) -> None:
    with pytest.raises(CheckpointError, match="cannot be read any more: found No such file"):
        kind(tmp_path / "missing")


def test_memory_for_weights_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(monkeypatch)
    made = pages((3, 4), torch.float32).fill_(2)
    assert made.sum() == 24


SHRINK = """
import os
import surgery.apply.shard as shard
import surgery.apply.shard as stream
from surgery.cli.main import main
edited, seen, take, stream_edit = None, set(), stream.np.take, shard.stream_edit
def note(edit, source, output):
    global edited
    edited = edit.source.path
    stream_edit(edit, source, output)
def shrink(*arguments, **options):
    seen.add(edited)
    if len(seen) == 2:
        os.truncate(edited, 4096)
    return take(*arguments, **options)
shard.stream_edit, stream.np.take = note, shrink
main(["apply", {plan!r}, "-o", {out!r}, "--jobs", "1"])
"""
"""A shard shrinks within a window, after the check of its size."""


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot shrink there")
def test_a_shard_that_shrinks_within_a_window_and_comes_back_is_resumed(
    tmp_path: Path, run: Run
) -> None:
    """SIGBUS kills the process; the output of a second run has the right bytes."""
    source = tiny.save(tmp_path / "model", sharded=True, hidden_size=64, intermediate_size=512)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(source, 512, 256).save(plan)
    assert run("apply", plan, "-o", tmp_path / "whole").exit_code == 0
    before = {path: path.read_bytes() for path in source.glob("*.safetensors")}
    script = SHRINK.format(plan=str(plan), out=str(out))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert ended.returncode == -signal.SIGBUS
    (harmed,) = (path for path, data in before.items() if path.stat().st_size != len(data))
    harmed.write_bytes(before[harmed])
    assert not out.exists()
    assert run("apply", plan, "-o", out, "--resume").exit_code == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")
