"""Streaming, resuming, and an output that appears whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.api import apply_plan
from surgery.apply.edits import Edit
from surgery.apply.shard import edit_windows, stream_edit
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef, encode_header, read_header
from surgery.files.shard_file import ShardFile
from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.plans import random_plan

ITEMSIZE_DTYPE = {1: ("U8", np.uint8), 2: ("BF16", np.uint16), 4: ("F32", np.uint32)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_selection_in_any_window_is_numpy_take(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    chosen = data.draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))
    indices = np.array(sorted(chosen))
    dtype, numpy_dtype = ITEMSIZE_DTYPE[data.draw(st.sampled_from([1, 2, 4]))]
    array = np.random.default_rng(0).integers(0, 200, shape).astype(numpy_dtype)
    path = tmp_path_factory.mktemp("edit") / "shard"
    path.write_bytes(b"pad" + array.tobytes())
    wanted = np.take(array, indices, axis=dim)
    edit = Edit(TensorRef("t", path, dtype, shape, 3), dim, indices)
    assert edit.nbytes == wanted.nbytes
    with pytest.MonkeyPatch.context() as patch, ShardFile(path) as source:
        patch.setattr("surgery.apply.shard.WINDOW_BYTES", data.draw(st.integers(1, 64)))
        found = b"".join(bytes(window) for window in edit_windows(edit, source))
        with open(path.with_name("out"), "wb") as output:
            stream_edit(edit, source, output.fileno())
    assert found == wanted.tobytes()
    assert path.with_name("out").read_bytes() == wanted.tobytes()


def test_header_round_trip(tmp_path: Path) -> None:
    tensors = [("a", "BF16", (2, 3)), ("β", "F32", ()), ("empty", "U8", (0, 4))]
    raw = encode_header(tensors, {"format": "pt"})
    assert len(raw) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(raw + bytes(12 + 4))
    header = read_header(tmp_path / "x.safetensors")
    assert sorted((t.name, t.dtype, t.shape) for t in header.tensors) == sorted(tensors)
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("finished", range(5))
def test_a_run_stopped_by_a_full_disk_resumes_to_the_same_bytes(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    plan, out, partial = tmp_path / "plan.json", tmp_path / "out", tmp_path / "out.partial"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", tmp_path / "whole").exit_code == 0
    real = stream_edit
    opened: set[Path] = set()
    written: set[Path] = set()

    def note(edit: Edit, source: ShardFile, output: int) -> None:
        written.add(edit.source.path)
        real(edit, source, output)

    def full(edit: Edit, source: ShardFile, output: int) -> None:
        opened.add(edit.source.path)
        if len(opened) > finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(edit, source, output)

    with monkeypatch.context() as patch:
        patch.setattr("surgery.apply.shard.stream_edit", full)
        result = run("apply", plan, "-o", out, "--jobs", 1)
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert not out.exists()
    assert partial.exists() == (finished > 0)  # nothing is left where there is nothing to resume
    monkeypatch.setattr("surgery.apply.shard.stream_edit", note)
    assert run("apply", plan, "-o", out, "--resume").exit_code == 0
    assert len(opened) == finished + 1
    assert len(written) == 5 - finished  # finished shards are not written again
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert not partial.exists()


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, llama: Path, run: Run) -> None:
    """SIGKILL in the middle of the third shard."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    script = f"""
import os, signal
import surgery.apply.shard as shard
from surgery.cli.main import main
real, shards = shard.stream_edit, set()
def kill(edit, source, output):
    shards.add(edit.source.path)
    if len(shards) == 3:
        os.write(output, b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(edit, source, output)
shard.stream_edit = kill
main(["apply", {str(plan)!r}, "-o", {str(out)!r}, "--jobs", "1"])
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    assert not out.exists()
    refused = run("apply", plan, "-o", out)
    assert refused.exit_code == 2
    assert "continue it with --resume, or delete it" in refused.output
    assert run("apply", plan, "-o", out, "--resume").exit_code == 0
    assert run("apply", plan, "-o", tmp_path / "whole").exit_code == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_partial_directory_without_a_journal_is_left_alone(
    tmp_path: Path, llama: Path, run: Run
) -> None:
    """It may be the user's."""
    plan, partial = tmp_path / "plan.json", tmp_path / "out.partial"
    random_plan(llama, 512, 64).save(plan)
    partial.mkdir()
    (partial / "novel.txt").write_text("Call me Ishmael.")
    result = run("apply", plan, "-o", tmp_path / "out", "--resume")
    assert result.exit_code == 2
    assert "out.partial: cannot be resumed: it has no journal" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out.partial"}
    assert (partial / "novel.txt").read_text() == "Call me Ishmael."


def test_a_finished_run_may_be_resumed(tmp_path: Path, llama: Path, run: Run) -> None:
    """So a script may repeat one command until it succeeds; another plan is refused as ever."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", out).exit_code == 0
    inode = (out / "config.json").stat().st_ino
    assert run("apply", plan, "-o", out, "--resume").exit_code == 0
    assert (out / "config.json").stat().st_ino == inode
    random_plan(llama, 500, 64).save(plan)
    result = run("apply", plan, "-o", out, "--resume")
    assert result.exit_code == 2
    assert "exists already" in result.output


def test_a_finished_shard_that_was_lost_is_written_again(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a journal may know more than the directory."""
    plan, out, partial = tmp_path / "plan.json", tmp_path / "out", tmp_path / "out.partial"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("surgery.apply.run._provenance", lambda *_: 1 / 0)
        assert run("apply", plan, "-o", out).exit_code == 1
    shards = sorted(partial.glob("*.safetensors"))
    assert len(shards) == 5
    shards[0].unlink()
    os.truncate(shards[1], 100)
    with open(tmp_path / "out.partial.journal", "ab") as journal:
        journal.write(b'{"sha')
    assert run("apply", plan, "-o", out, "--resume").exit_code == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    plan = random_plan(source, 512, 64)
    shard = source / "model.safetensors"

    def shrink(_: str, done: int, __: int) -> None:
        if done:
            os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: shard ended early"):
        apply_plan(plan, source=source, output=tmp_path / "out", progress=shrink)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
