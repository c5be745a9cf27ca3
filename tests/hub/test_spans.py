"""Removed experts are not downloaded where the server gives ranges."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.api import apply_plan
from surgery.apply.cost import apply_cost
from surgery.apply.edits import edits
from surgery.apply.shard import ShardTask, from_spans, spans_of
from surgery.planning.plan import Plan
from surgery.verify.files import verify_files
from tests.support import quantized, tiny
from tests.support.hub_commands import command
from tests.support.hub_server import Fault, Hub, Repo, serve
from tests.support.plans import layout_of, random_plan

EXPERTS = ("--num-experts", 4, "--expert-criterion", "random")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    return tiny.save(root / "model", "deepseek_v3", sharded=True, n_routed_experts=8)


@pytest.fixture(scope="module")
def hub(mixture: Path) -> Iterator[Hub]:
    with serve({"models/org/tiny": Repo(mixture)}) as running:
        yield running


@pytest.fixture(scope="module")
def plan(hub: Hub, mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    made = command(hub.url, path.parent, "plan", "org/tiny@main", *EXPERTS, "-o", path)
    assert made.returncode == 0, made.stderr
    return path


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "no ranges"])
def test_only_kept_bytes_are_downloaded(
    hub: Hub, mixture: Path, plan: Path, tmp_path: Path, whole: bool
) -> None:
    hub.forget()
    hub.faults += [Fault(r"\.safetensors$", whole=True, times=10**6)] * whole
    applied = command(hub.url, plan.parent, "apply", plan, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    loaded = Plan.load(plan)
    assert verify_files(tmp_path / "out", loaded, mixture).ok
    sent = sum(n for path, n in hub.sent.items() if path.endswith(".safetensors"))
    everything = sum(file.stat().st_size for file in mixture.glob("*.safetensors"))
    if whole:
        assert sent >= everything
    else:
        assert sent <= 1.02 * loaded.after.nbytes
        assert loaded.after.nbytes < 0.8 * everything
    left = [*plan.parent.rglob("*.spans*"), *plan.parent.rglob("model-*.safetensors")]
    assert left == []


def test_with_checksums_whole_shards_are_fetched_and_compared(
    hub: Hub, plan: Path, tmp_path: Path
) -> None:
    hub.forget()
    hub.faults += [Fault(r"\.safetensors$", damage=True, times=10**6)]
    take = ("apply", plan, "-o", tmp_path / "out", "--checksum")
    refused = command(hub.url, plan.parent, *take)
    assert refused.returncode == 2, refused.stdout
    assert "damaged" in refused.stderr
    assert not (tmp_path / "out").exists()
    hub.forget()
    applied = command(hub.url, plan.parent, *take)
    assert applied.returncode == 0, applied.stderr


def test_a_broken_connection_ends_in_the_same_bytes(
    hub: Hub, mixture: Path, plan: Path, tmp_path: Path
) -> None:
    hub.forget()
    hub.faults += [Fault(r"\.safetensors$", cut=300, times=4)]
    applied = command(hub.url, plan.parent, "apply", plan, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    assert verify_files(tmp_path / "out", Plan.load(plan), mixture).ok


def test_spans_of_packed_experts_hold_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.apply.shard.SPAN_BYTES", 64)
    source = quantized.save_mxfp4(tmp_path / "source", num_local_experts=8)
    plan, layout = random_plan(source, 640, 1.0, experts=4), layout_of(source)
    (name, tensors), *rest = edits(plan, layout).items()
    assert not rest
    task = ShardTask(tmp_path, source / name, tensors, {})
    spans = spans_of(task)
    assert spans is not None
    data = (source / name).read_bytes()
    cut = b"".join(data[start:stop] for start, stop in spans)
    (tmp_path / "cut").write_bytes(cut)
    assert len(cut) <= 1.02 * plan.after.nbytes
    moved = from_spans(task, tmp_path / "cut")
    whole = {t.name: t for t in task.tensors}
    for tensor in moved.tensors:
        assert (tensor.dtype, tensor.shape) == (whole[tensor.name].dtype, whole[tensor.name].shape)
        assert tensor.nbytes == whole[tensor.name].nbytes
    channels = random_plan(tiny.save(tmp_path / "plain", "gpt_oss"), 512, 0.5)
    (tensors,) = edits(channels, layout_of(tmp_path / "plain")).values()
    task = ShardTask(tmp_path, tmp_path / "plain" / name, tensors, {})
    assert spans_of(task) is not None


def test_windows_without_kept_positions_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.apply.shard.WINDOW_BYTES", 1024)
    source = quantized.save_mxfp4(tmp_path / "source", num_local_experts=8)
    plan, layout = random_plan(source, 640, 1.0, experts=4), layout_of(source)
    predicted = apply_cost(plan, layout, 1)
    assert predicted.read_bytes <= 1.03 * plan.after.nbytes
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert verify_files(tmp_path / "out", plan, source).ok
