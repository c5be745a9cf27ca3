"""Shards read by position: the right bytes on every system, and no harm where a file shrinks."""

import ctypes
import mmap
import os
import sys
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
from surgery.files.shard_file import Buffer, ShardFile
from surgery.process import release_freed_memory
from surgery.verify.files import verify_files
from tests.support.contents import snapshot
from tests.support.plans import random_plan

MB = 1 << 20


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of 64 MB."""
    path = tmp_path / "big"
    path.write_bytes(np.random.default_rng(0).bytes(64 * MB))
    return path


def take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only what every system has."""
    monkeypatch.delattr(os, "preadv", raising=False)
    for name in ("MAP_PRIVATE", "MAP_ANONYMOUS"):
        monkeypatch.delattr(mmap, name, raising=False)


def test_the_output_is_the_same_with_and_without_the_calls_of_linux(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(llama, 512, 64)
    apply_plan(plan, source=llama, output=tmp_path / "whole")
    take_away(monkeypatch)
    apply_plan(plan, source=llama, output=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    report = verify_files(tmp_path / "out", plan, llama)
    assert report.ok, report.table()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only glibc keeps freed memory, and releases it on request",
)
def test_freed_memory_is_released() -> None:
    blocks = [bytes([number % 255 + 1]) * 2048 for number in range(20_000)]
    del blocks[:-1]  # the last one holds what lies below it
    before = anonymous_bytes()
    release_freed_memory()
    assert before - anonymous_bytes() > 20 * MB


def anonymous_bytes() -> int:
    """Resident bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kilobytes) * 1024


def test_a_buffer_begins_at_a_page() -> None:
    buffer = Buffer()
    for nbytes in (1, MB, 3 * MB + 5, 7):
        taken = buffer.take(nbytes)
        assert len(taken) == nbytes
        assert taken.ctypes.data % mmap.PAGESIZE == 0


def test_elements_that_are_not_aligned(tmp_path: Path) -> None:
    values = np.arange(64 * 32, dtype=np.uint32).reshape(64, 32)
    path = tmp_path / "shard"
    path.write_bytes(b"odd" + values.tobytes())
    kept = np.array([0, 5, 31])
    edit = Edit(TensorRef("t", path, "F32", values.shape, 3), 1, kept)
    with ShardFile(path) as shard:
        assert b"".join(map(bytes, edit_windows(edit, shard))) == values[:, kept].tobytes()


def test_a_file_that_is_too_short_is_an_error(big: Path) -> None:
    with ShardFile(big) as shard:
        assert len(shard.window(0, MB, Buffer())) == MB
        os.truncate(big, 10 * MB)
        with pytest.raises(CheckpointError, match="shard ended early"):
            list(shard.windows(9 * MB + 1, MB, MB))
        os.truncate(big, 64 * MB)
        assert len(list(shard.windows(0, 64 * MB, MB))) == 64


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read any more: found No such file"):
        ShardFile(tmp_path / "missing")


def test_memory_for_weights_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(monkeypatch)
    made = pages((3, 4), torch.float32).fill_(2)
    assert made.sum() == 24
