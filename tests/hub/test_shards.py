"""Shards of the hub on the disk: there when used, never more than two, none afterwards."""

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import CheckpointError, OutputError
from surgery.files.safetensors_header import TensorRef, encode_header
from surgery.hub.remote_file import RemoteFile
from surgery.hub.shards import CAPACITY, USE, HubShards, Shards
from surgery.hub.skeleton import HUB_FOLDER, LIBRARY, Manifest, Skeleton

NAMES = [f"{letter}.safetensors" for letter in "abcde"]
CONTENT = {
    name: encode_header([("t", "U8", (10_000 + n,))], {}) + bytes([n]) * (10_000 + n)
    for n, name in enumerate(NAMES)
}


@pytest.fixture
def skeleton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made(tmp_path, monkeypatch)


def made(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A skeleton whose hub is a table in memory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(assets))
    path = assets / LIBRARY / "a--b"
    (path / HUB_FOLDER).mkdir(parents=True)
    shards: dict[str, tuple[int, str | None]] = {}
    for name, content in CONTENT.items():
        shards[name] = len(content), hashlib.sha256(content).hexdigest()
        length = int.from_bytes(content[:8], "little")
        (path / HUB_FOLDER / f"{name}.header").write_bytes(content[8 : 8 + length])
    (path / HUB_FOLDER / "manifest.json").write_bytes(
        msgspec.json.encode(Manifest("a/b", "c", shards))
    )

    def blocks(self: RemoteFile, start: int, stop: int) -> Any:
        for position in range(start, stop, 4096):
            assert on_disk(path) <= CAPACITY
            yield CONTENT[self.name][position : min(stop, position + 4096)]

    monkeypatch.setattr(RemoteFile, "blocks", blocks)
    return path


def on_disk(path: Path) -> int:
    """Shards that are there, in whole or in part."""
    whole = {p.name for p in path.glob("*.safetensors")}
    return len(
        whole | {p.name.removesuffix(".incomplete") for p in (path / HUB_FOLDER).glob("*.incom*")}
    )


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sets(st.sampled_from(NAMES), min_size=1, max_size=2), max_size=12),
    announced=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_step_has_its_shards_and_the_disk_at_most_two(
    tmp_path_factory: pytest.TempPathFactory, steps: list[set[str]], announced: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        path = made(tmp_path_factory.mktemp("s") / "s", patch)
        waits = random.Random(seed)
        with Shards.of(path) as shards:
            if announced:
                shards.expect(steps)
            for step in steps:
                with shards.lease(step):
                    time.sleep(waits.choice([0, 0, 0.002]))
                    for name in step:
                        assert (path / name).read_bytes() == CONTENT[name]
                    assert on_disk(path) <= CAPACITY
        assert on_disk(path) == 0


def test_each_is_downloaded_once_where_the_order_allows_it(
    skeleton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    download = RemoteFile.download

    def counted(self: RemoteFile, *arguments: Any) -> None:
        fetched.append(self.name)
        download(self, *arguments)

    monkeypatch.setattr(RemoteFile, "download", counted)
    a, b, c = NAMES[:3]
    steps = [{a}, {a, b}, {b}, {a}, {b}, {b, c}, {c}]
    with Shards.of(skeleton) as shards:
        shards.expect(steps)
        for step in steps:
            with shards.lease(step):
                pass
    assert fetched == [a, b, c]


def test_the_next_one_comes_while_one_is_used(skeleton: Path) -> None:
    a, b, c = NAMES[:3]
    with Shards.of(skeleton) as shards:
        shards.expect([{a}, {b}, {c}])
        with shards.lease({a}):
            until(lambda: (skeleton / b).exists())
            time.sleep(0.02)
            assert not (skeleton / c).exists()


def test_what_an_interrupted_run_left_is_used_or_deleted(skeleton: Path) -> None:
    a, b, c, d, _ = NAMES
    (skeleton / a).write_bytes(CONTENT[a])
    (skeleton / d).write_bytes(CONTENT[d])
    (skeleton / HUB_FOLDER / f"{b}.incomplete").write_bytes(CONTENT[b][:4096])
    (skeleton / HUB_FOLDER / f"{c}.incomplete").write_bytes(CONTENT[c][:4096])
    inode = (skeleton / a).stat().st_ino
    with Shards.of(skeleton) as shards:
        shards.expect([{a}, {b}])
        assert not (skeleton / d).exists()
        assert not (skeleton / HUB_FOLDER / f"{c}.incomplete").exists()
        with shards.lease({a}):
            assert (skeleton / a).stat().st_ino == inode
        with shards.lease({b}):
            assert (skeleton / b).read_bytes() == CONTENT[b]
    assert on_disk(skeleton) == 0


def test_after_an_error_shards_are_kept_for_the_resumed_run(skeleton: Path) -> None:
    shards = Shards.of(skeleton)
    with pytest.raises(RuntimeError), shards, shards.lease({NAMES[0]}):
        raise RuntimeError
    with Shards.of(skeleton) as shards:
        shards.expect([])
        assert on_disk(skeleton) == 0


def test_another_process_keeps_what_it_uses(skeleton: Path) -> None:
    a = NAMES[0]
    with Shards.of(skeleton) as first, first.lease({a}):
        with Shards.of(skeleton) as second, second.lease({a}):
            pass
        assert (skeleton / a).exists()
    assert on_disk(skeleton) == 0


def test_the_last_user_deletes_the_shard_whoever_came_first(skeleton: Path) -> None:
    a = NAMES[0]
    with Shards.of(skeleton) as second:
        with Shards.of(skeleton) as first, first.lease({a}), second.lease({a}):
            assert len(list((skeleton / HUB_FOLDER).glob(f"{a}.*{USE}"))) == 2
        with second.lease({a}):
            assert (skeleton / a).exists()
    assert on_disk(skeleton) == 0
    assert not list((skeleton / HUB_FOLDER).glob(f"*{USE}"))


def test_a_killed_user_keeps_nothing(skeleton: Path) -> None:
    a = NAMES[0]
    (skeleton / a).write_bytes(CONTENT[a])
    (skeleton / HUB_FOLDER / f"{a}.killed{USE}").touch()
    with Shards.of(skeleton) as shards, shards.lease({a}):
        pass
    assert on_disk(skeleton) == 0
    assert not list((skeleton / HUB_FOLDER).glob(f"*{USE}"))


def test_a_small_tensor_does_not_wait_for_its_shard(skeleton: Path) -> None:
    a, start = NAMES[0], len(CONTENT[NAMES[0]]) - 10_000
    ref = TensorRef("t", skeleton / a, "U8", (100,), start + 50)
    with Shards.of(skeleton) as shards:
        with shards.tensor(ref) as here:
            assert here.path.read_bytes()[here.start :][:100] == CONTENT[a][start + 50 :][:100]
            assert not (skeleton / a).exists()
        with shards.lease({a}), shards.tensor(ref) as here:
            assert here == ref
    assert list((skeleton / HUB_FOLDER).glob("tensor*")) == []


def test_a_shard_with_another_header_is_refused(skeleton: Path) -> None:
    (skeleton / HUB_FOLDER / f"{NAMES[0]}.header").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="is not the shard whose header was read"):  # noqa: SIM117
        with Shards.of(skeleton) as shards, shards.lease({NAMES[0]}):
            pass


def test_no_space_for_two_shards_is_reported_before_the_work(
    skeleton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 20_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with Shards.of(skeleton) as shards, pytest.raises(OutputError, match="no space for two shards"):
        shards.expect([{NAMES[0]}])


def test_a_local_directory_has_its_shards(tmp_path: Path) -> None:
    shards = Shards.of(tmp_path)
    assert not isinstance(shards, HubShards)
    with shards, shards.lease({"a"}):
        pass


def test_a_checkpoint_that_brings_a_manifest_keeps_its_shards(
    skeleton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = skeleton / NAMES[0]
    shard.write_bytes(CONTENT[shard.name])
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(skeleton / "elsewhere"))
    shards = Shards.of(skeleton)
    assert not shards.remote
    with shards, shards.lease({shard.name}):
        pass
    assert shard.read_bytes() == CONTENT[shard.name]


def test_a_damaged_skeleton_is_refused(skeleton: Path) -> None:
    (skeleton / HUB_FOLDER / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is a damaged copy of a model on the hub"):
        Skeleton.at(skeleton)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)
