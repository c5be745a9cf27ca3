"""Parts and shards as Ray tasks: the bytes of one machine's run, with a node lost in between."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ray_tasks, tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.plans import random_plan

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
Lose = Callable[[Path], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, where the driver is, and two nodes of one CPU, all on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {
        **NODE,
        "num_cpus": 0,
        "include_dashboard": False,
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(**NODE)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def lose_node(cluster: Any) -> Iterator[Lose]:
    """Start to wait for the node that a task names in a directory, and remove it; later add one."""
    waiting: list[threading.Thread] = []

    def lose(place: Path) -> None:
        end = time.monotonic() + 100
        while not (place / ray_tasks.VICTIM).exists() and time.monotonic() < end:
            time.sleep(0.05)
        victim = (place / ray_tasks.VICTIM).read_text()
        node = next(node for node in cluster.worker_nodes if node.node_id == victim)
        cluster.remove_node(node, allow_graceful=False)

    def start(place: Path) -> None:
        waiting.append(threading.Thread(target=lose, args=(place,)))
        waiting[-1].start()

    yield start
    for thread in waiting:
        thread.join()
        cluster.wait_for_nodes(60)  # until the lost one counts as lost
        cluster.add_node(**NODE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, as tasks do on nodes of one CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibrate(run: Run, model: Path, text: Path, output: Path, *more: object) -> bytes:
    calibration = ("--data", text, "--seq-len", 64, "--samples", 12, "-o", output)
    result = run("calibrate", model, *calibration, *more)
    assert result.exit_code == 0, result.output
    return output.read_bytes()


def merged_parts(run: Run, model: Path, text: Path, folder: Path, count: int) -> bytes:
    """What ``count`` machines and ``stats merge`` make."""
    names = [folder / f"part {number}" for number in range(1, count + 1)]
    for number, name in enumerate(names, 1):
        calibrate(run, model, text, name, "--part", f"{number}/{count}")
    assert run("stats", "merge", *names, "-o", folder / "merged").exit_code == 0
    return (folder / "merged").read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_calibrate_survives_a_lost_node(
    tmp_path: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch, lose_node: Lose
) -> None:
    model, out = tiny.save(tmp_path / "model", "mixtral", sharded=True), tmp_path / "out"
    expected = merged_parts(run, model, text, tmp_path, 4)
    monkeypatch.setattr("calib.statistics.prepare.part_task", ray_tasks.stalled_part)
    out.mkdir()
    lose_node(out)
    found = calibrate(run, model, text, out / "stats", "--engine", "ray", "--parts", 4)
    assert found == expected
    assert ray_tasks.attempts(out) == 5
    assert not list(out.glob("*.parts"))


@pytest.mark.usefixtures("cluster", "one_thread")
def test_calibrate_makes_a_part_for_each_node(
    tmp_path: Path, llama: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged_parts(run, llama, text, tmp_path, 2)
    monkeypatch.chdir(llama.parent)  # the nodes' working directory is another
    assert calibrate(run, Path(llama.name), text, tmp_path / "out", "--engine", "ray") == expected


@pytest.mark.usefixtures("cluster")
def test_an_error_on_a_node_is_one_line(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    options = ("--data", text, "--seq-len", 64, "--samples", 2, "-o", tmp_path / "out")
    result = run("calibrate", llama, *options, "--engine", "ray", "--device", "cuda")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "--device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_apply_survives_a_lost_node(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch, lose_node: Lose
) -> None:
    plan = tmp_path / "plan.json"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", tmp_path / "one").exit_code == 0
    monkeypatch.setattr("surgery.apply.run.write_shard", ray_tasks.stalled_shard)
    lose_node(tmp_path)
    result = run("apply", plan, "-o", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 0, result.output
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "one")
    shards = len(list((tmp_path / "one").glob("*.safetensors")))
    assert ray_tasks.attempts(tmp_path) == shards + 1


@pytest.mark.usefixtures("cluster")
def test_apply_on_a_cluster_resumes_where_a_disk_was_full(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, or on the cluster: both keep the same journal."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", tmp_path / "one").exit_code == 0
    for engine in ("local", "ray"):
        with monkeypatch.context() as patch:
            patch.setattr("surgery.apply.run.write_shard", ray_tasks.full_disk)
            result = run("apply", plan, "-o", out, "--engine", "ray")
        assert result.exit_code == 2
        assert "No space left on device" in result.stderr
        assert not out.exists()
        assert len(list(tmp_path.glob("out.partial/*.safetensors"))) == 4
        result = run("apply", plan, "-o", out, "--engine", engine, "--resume")
        assert result.exit_code == 0, result.output
        assert snapshot(out) == snapshot(tmp_path / "one")
        out.rename(tmp_path / engine)


@pytest.mark.usefixtures("cluster")
def test_a_task_that_is_always_lost_is_named(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.json"
    random_plan(llama, 512, 64).save(plan)
    monkeypatch.setattr("surgery.apply.run.RETRIES", 1)
    monkeypatch.setattr("surgery.apply.run.write_shard", ray_tasks.dying_shard)
    result = run("apply", plan, "-o", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert "model-0000" in lines[0]
    assert "was lost" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}


@pytest.mark.parametrize("command", ["calibrate", "apply"])
def test_without_the_library_it_says_what_to_install(
    tmp_path: Path,
    llama: Path,
    text: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    if command == "apply":
        random_plan(llama, 512, 64).save(tmp_path / "plan.json")
        arguments: tuple[object, ...] = (tmp_path / "plan.json",)
    else:
        arguments = (llama, "--data", text, "--seq-len", 64, "--samples", 4)
    before = set(tmp_path.iterdir())
    result = run(command, *arguments, "-o", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 2
    assert "compact-surgery[ray]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_parts_are_for_a_cluster(tmp_path: Path, llama: Path, text: Path, run: Run) -> None:
    options = ("--data", text, "--seq-len", 64, "-o", tmp_path / "out")
    result = run("calibrate", llama, *options, "--parts", 2)
    assert result.exit_code == 2
    assert "--part K/N" in result.stderr
