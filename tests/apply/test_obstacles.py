"""What can go wrong around apply: no half output, the source untouched, a message, a way on."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from surgery.api import apply_plan, make_plan
from surgery.apply.companions import files_left_out
from surgery.apply.edits import Edit
from surgery.apply.shard import stream_edit
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.files.shard_file import ShardFile
from surgery.planning.plan import Plan
from tests.support import ROOT, tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.plans import random_plan

MB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", sharded=True)


@pytest.fixture
def plan(tmp_path: Path, source: Path) -> Path:
    path = tmp_path / "plan.json"
    random_plan(source, 512, 64).save(path)
    return path


def program(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, after the statements ``before``."""
    code = f"import os\nfrom surgery.cli.main import main\nimport surgery.api\n{before}\n"
    return subprocess.run(
        [sys.executable, "-c", code + "main()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def check_message(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


@contextmanager
def small_disk(place: Path, nbytes: int) -> Iterator[Path]:
    """A file system of ``nbytes`` at ``place``; skips where none may be mounted."""
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a small file system takes root and mount(8)")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("nbytes", "name"), [(20_000, "tokenizer.json"), (30_000, "model-")])
def test_a_file_size_limit(
    plan: Path, source: Path, tmp_path: Path, nbytes: int, name: str
) -> None:
    """The kernel refuses in the middle of a file (EFBIG): one beside the weights, or a shard."""
    before, out = snapshot(source), tmp_path / "out"
    pytest.importorskip("resource")
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({nbytes}, {nbytes}))"
    result = program("apply", plan, "-o", out, before=limit)
    check_message(result, f"out/{name}", "cannot be written", "File too large", "--resume")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "model"}
    assert program("apply", plan, "-o", out, "--resume").returncode == 0
    assert snapshot(source) == before


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_disk_that_others_fill_while_apply_runs(
    plan: Path, source: Path, tmp_path: Path, jobs: int
) -> None:
    """There was space at the start; the third shard finds none."""
    before = snapshot(source)
    assert program("apply", plan, "-o", tmp_path / "whole").returncode == 0
    fill = """
import surgery.apply.shard as shard
real, shards = shard.stream_edit, set()
def fill(edit, source, output):
    shards.add(edit.source.path)
    if len(shards) == 3 and not os.path.exists(FILL):
        with open(FILL, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    real(edit, source, output)
shard.stream_edit = fill
"""
    with small_disk(tmp_path / "disk", 2 * MB) as disk:
        filler, out = disk / "filler", disk / "out"
        arguments = ("apply", plan, "-o", out, "--jobs", jobs)
        result = program(*arguments, before=fill.replace("FILL", repr(str(filler))))
        check_message(result, "cannot be written", "No space left on device", "--resume")
        assert not out.exists()
        result = program(*arguments, "--resume")
        check_message(result, "space", "--resume")  # still full
        filler.unlink()
        assert program(*arguments, "--resume").returncode == 0
        assert snapshot(out) == snapshot(tmp_path / "whole")
        assert [path.name for path in disk.iterdir()] == ["out"]
    assert snapshot(source) == before


def test_a_disk_that_is_too_small(plan: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        result = program("apply", plan, "-o", disk / "out")
        check_message(result, "no space for the output", "free space")
        assert not list(disk.iterdir())


def _exchange(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


Damage = Callable[[Path], object]
HARM: dict[str, tuple[Damage, str]] = {
    "gone": (Path.unlink, "No such file or directory"),
    "shorter": (lambda shard: os.truncate(shard, 9_000), "shard ended early"),
    "a directory": (_exchange, "Is a directory"),
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("harm", HARM)
def test_a_shard_of_the_source_is_lost_while_apply_runs(
    plan: Path, source: Path, tmp_path: Path, harm: str, jobs: int
) -> None:
    """In the first shard, before the last one is opened."""
    last = sorted(source.glob("*.safetensors"))[-1]
    before, (damage, words) = last.read_bytes(), HARM[harm]
    loaded, out, done = Plan.load(plan), tmp_path / "out", Event()

    def lose(_: str, written: int, __: int) -> None:
        if written and not done.is_set():
            done.set()
            damage(last)

    with pytest.raises(CheckpointError, match=words) as caught:
        apply_plan(loaded, source=source, output=out, jobs=jobs, progress=lose)
    assert last.name in str(caught.value)
    assert "`resume`" in str(caught.value)
    assert not out.exists()
    if last.is_dir():
        last.rmdir()
    last.write_bytes(before)
    apply_plan(loaded, source=source, output=out, resume=True)
    apply_plan(loaded, source=source, output=tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["gone", "shorter"])
def test_a_shard_of_the_source_is_lost_between_plan_and_apply(
    plan: Path, source: Path, tmp_path: Path, run: Run, harm: str
) -> None:
    HARM[harm][0](sorted(source.glob("*.safetensors"))[-1])
    result = run("apply", plan, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "download" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "model"}


@contextmanager
def locked(place: Path) -> Iterator[Callable[[], object]]:
    """A directory that may not be written to until what this yields is called."""
    if os.geteuid():
        place.mkdir(mode=0o555)
        yield partial(place.chmod, 0o755)
        return
    with small_disk(place, 2 * MB):  # modes mean nothing to root
        remount = ["mount", "-o", "remount,ro", str(place)]
        subprocess.run(remount, check=True)
        remount[2] = "remount,rw"
        yield partial(subprocess.run, remount, check=True)


def test_a_directory_that_may_not_be_written(plan: Path, tmp_path: Path, run: Run) -> None:
    with locked(tmp_path / "locked") as unlock:
        for output, named in (("out", "out.partial.journal"), ("a/out", "a")):
            result = run("apply", plan, "-o", tmp_path / "locked" / output)
            assert result.exit_code == 2
            assert f"locked/{named}: cannot be made: found " in result.output
            assert "choose another output" in result.output
            assert not list((tmp_path / "locked").iterdir())
        unlock()
        assert run("apply", plan, "-o", tmp_path / "locked" / "out").exit_code == 0


def test_parents_of_the_output_are_made(plan: Path, tmp_path: Path, run: Run) -> None:
    assert run("apply", plan, "-o", tmp_path / "a" / "b" / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_broken_disk_is_blamed_on_the_source(
    source: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="cannot be read any more: found Input/out"):
        apply_plan(Plan.load(plan), source=source, output=tmp_path / "out")


def test_a_journal_that_cannot_be_written_stays_readable(
    source: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the second shard is noted."""
    real, notes = os.write, []

    def full(file: int, data: bytes) -> int:
        if bytes(data[:9]) == b'{"shard":':
            notes.append(data)
            if len(notes) == 2:
                return real(file, data[:5])
        return real(file, data)

    loaded, out = Plan.load(plan), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Exception, match=r"journal: cannot be written: found No space"):
            apply_plan(loaded, source=source, output=out, jobs=1)
    assert (tmp_path / "out.partial.journal").read_bytes().count(b"\n") == 2
    edited: set[Path] = set()

    def note(edit: Edit, shard: ShardFile, output: int) -> None:
        edited.add(edit.source.path)
        stream_edit(edit, shard, output)

    monkeypatch.setattr("surgery.apply.shard.stream_edit", note)
    apply_plan(loaded, source=source, output=out, resume=True)
    assert len(edited) == 4


def test_a_cluster_that_does_not_answer_is_one_line(plan: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        before = f"os.environ['RAY_ADDRESS'] = '127.0.0.1:{taken.getsockname()[1]}'"
        result = program("apply", plan, "-o", tmp_path / "out", "--engine", "ray", before=before)
    check_message(result, "--engine ray: no cluster answers", "RAY_ADDRESS")


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_is_no_cluster_is_one_line(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        before = f"""
import surgery.cluster
surgery.cluster.SECONDS = 0.2
os.environ['RAY_ADDRESS'] = '127.0.0.1:{server.getsockname()[1]}'
"""
        if answer is not None:
            pool.submit(lambda: server.accept()[0].sendall(answer))
        result = program("apply", plan, "-o", tmp_path / "out", "--engine", "ray", before=before)
    check_message(result, "--engine ray: no cluster answers", "RAY_ADDRESS")


def test_links_out_of_the_model_are_not_copied(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nobody's business")
    names = ["LICENSE", "configuration.json", "normalizer.json", "sentence_bert_config.json"]
    for name in names:
        (source / name).symlink_to(secret)
    (source / "NOTICE.txt").write_text("be kind")
    (source / "NOTICE").symlink_to("NOTICE.txt")
    made = random_plan(source, 512, 64)
    apply_plan(made, source=source, output=tmp_path / "out")
    assert not {*names} & {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "NOTICE").read_text() == "be kind"
    assert files_left_out(Checkpoint.open(source), made.ids()) == names


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_needed_file_behind_a_link_out_is_refused(
    source: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(source / name, tmp_path / "secret")
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: is no file of the model, but a link"):
        make_plan(source, intermediate_size=64, criterion="random")


def test_links_into_the_hub_s_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    shutil.copytree(source, snapshot)
    (blobs / "0123").write_text("the licence")
    (snapshot / "LICENSE").symlink_to(Path("../../blobs/0123"))
    apply_plan(random_plan(snapshot, 512, 64), source=snapshot, output=tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"
