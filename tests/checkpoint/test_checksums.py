"""A flipped bit in a source shard is found by apply --checksum, wherever the checksum is known."""

import hashlib
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from surgery.api import apply_plan
from surgery.checkpoint import checksums
from surgery.errors import CheckpointError
from surgery.planning.plan import Plan
from surgery.planning.sizes import Sizes, whole
from tests.support import fp8, tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.layers import plan_of
from tests.support.plans import layout_of, plan_to, random_plan


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def by_sums(source: Path) -> None:
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    with open(source / "SHA256SUMS", "wb") as sums:
        subprocess.run(["sha256sum", *shards], cwd=source, stdout=sums, check=True)


def by_cache(source: Path) -> None:
    """As the hub's cache: links to files that are named by their digest."""
    blobs = source.parent / "blobs"
    blobs.mkdir()
    for path in source.glob("*.safetensors"):
        blob = blobs / sha256(path)
        path.rename(blob)
        path.symlink_to(Path("..") / "blobs" / blob.name)


def by_metadata(source: Path) -> None:
    """As hf download --local-dir."""
    directory = source / ".cache" / "huggingface" / "download"
    directory.mkdir(parents=True)
    for path in source.glob("*.safetensors"):
        text = f"{'0' * 40}\n{sha256(path)}\n1700000000.5\n"
        (directory / f"{path.name}.metadata").write_text(text)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("known", [by_sums, by_cache, by_metadata])
def test_a_flipped_bit_is_found(tmp_path: Path, run: Run, known: object) -> None:
    assert callable(known)
    source, plan, out = tiny.save(tmp_path / "model", sharded=True), tmp_path / "p", tmp_path / "o"
    known(source)
    random_plan(source, 512, 64).save(plan)
    apply = ("apply", plan, "-o", out, "--checksum")
    shard = sorted(source.glob("*.safetensors"))[2]
    flip(shard, shard.stat().st_size - 1)
    result = run(*apply)
    assert result.exit_code == 2
    assert f"{shard.name}: is damaged: its checksum differs: expected SHA-256 " in result.output
    assert not out.exists()
    flip(shard, shard.stat().st_size - 1)
    assert run(*apply, "--resume").exit_code == 0
    assert run("apply", plan, "-o", tmp_path / "plain").exit_code == 0
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes()
    assert not (out / "SHA256SUMS").exists()


def test_without_a_known_checksum_nothing_is_begun(tmp_path: Path, llama: Path, run: Run) -> None:
    random_plan(llama, 512, 64).save(tmp_path / "plan.json")
    result = run("apply", tmp_path / "plan.json", "-o", tmp_path / "out", "--checksum")
    assert result.exit_code == 2
    assert ".safetensors: has no known checksum" in result.output
    assert "sha256sum *.safetensors > SHA256SUMS" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_sums_that_do_not_name_a_shard(tmp_path: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "model")
    random_plan(source, 512, 64).save(tmp_path / "plan.json")
    for content in (b"", b"\xff\xfe", b"0" * 64 + b"  other.safetensors\n", b"junk\n"):
        (source / "SHA256SUMS").write_bytes(content)
        result = run("apply", tmp_path / "plan.json", "-o", tmp_path / "out", "--checksum")
        assert result.exit_code == 2
        assert len(result.output.splitlines()) == 1
        assert "SHA256SUMS" in result.output


def collapsing(path: Path) -> Plan:
    """Removes a layer and adds another one, which has shards of its own, to the first."""
    return plan_of(tiny.save(path, sharded=True), [[0, 2]])


def dequantizing(path: Path) -> Plan:
    """Multiplies scales into weights, from a shard that leaves nothing else in the output."""
    layout = layout_of(fp8.save(path, apart=True))
    return plan_to(layout, Sizes(512, whole(layout).widths, True), None)


@pytest.mark.parametrize("case", [collapsing, dequantizing])
def test_every_byte_of_the_output_is_of_a_shard_that_was_checked_once(
    tmp_path: Path, case: Callable[[Path], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the plan's own digest of small shards would find the bit, too
    plan = msgspec.structs.replace(case(tmp_path / "model"), weights=None)
    by_sums(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    reads: Counter[str] = Counter()

    def counted(path: Path) -> str:
        reads[path.name] += 1
        return sha256(path)

    monkeypatch.setattr(checksums, "file_digest", counted)
    apply_plan(plan, output=tmp_path / "good", checksum=True)
    assert set(reads.values()) == {1}
    refused = set()
    for number, shard in enumerate(shards):
        output = tmp_path / str(number)
        flip(shard, shard.stat().st_size - 1)
        try:
            apply_plan(plan, output=output, checksum=True)
        except CheckpointError as error:
            refused.add(Path(error.where).name)
        else:  # nothing of it is in the output
            assert snapshot(output) == snapshot(tmp_path / "good")
        flip(shard, shard.stat().st_size - 1)
        assert (shard.name in refused) == (shard.name in reads)


def test_what_an_unchecked_run_left_is_checked_when_it_is_resumed(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "model", sharded=True), tmp_path / "out"
    plan = random_plan(source, 512, 64)
    by_sums(source)
    shard = min(source.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.apply.run._provenance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # all shards are written by then
            apply_plan(plan, output=out)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        apply_plan(plan, output=out, resume=True, checksum=True)
    assert not out.exists()
