"""What plan predicts of apply is what apply --json measures."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from surgery.apply.cost import apply_cost
from surgery.apply.run import JOBS
from surgery.apply.shard import ShardTask, write_shard
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.planning.plan import Plan
from surgery.process import Advance
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import digests
from tests.support.plans import random_plan
from tools.shapes import write_headers_only, write_tokenizer

SLACK = 1_000_000
"""Headers and the files beside the weights, which are read more than once."""


def test_bytes_are_those_that_the_kernel_counts(tmp_path: Path, run: Run) -> None:
    """Of a model with a short and a long kind of pieces: ranges and gathered windows."""
    from tools.published import llama_config

    config = llama_config(512, 2048, 4, 8, 8, 4096)
    source = write_tokenizer(write_headers_only(tmp_path / "model", config, 3), config)
    random_plan(source, 2048, 1024).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    cost = apply_cost(plan, read_layout(Checkpoint.open(source)), JOBS)
    assert cost.written_bytes == cost.disk_bytes == plan.after.nbytes
    assert plan.after.nbytes < cost.read_bytes <= plan.before.nbytes
    result = run("apply", tmp_path / "plan.json", "-o", tmp_path / "out", "--json")
    facts = json.loads(result.stdout)
    assert facts["nbytes"] == plan.after.nbytes
    assert set(facts["stage_seconds"]) == {"prepare", "shards", "files"}
    assert facts["seconds"] > 0
    assert facts["peak_rss_bytes"] > 0
    if not Path("/proc/self/io").exists():
        pytest.skip("only Linux counts the bytes of a process")
    assert 0 <= facts["read_bytes"] - cost.read_bytes < SLACK
    assert 0 <= facts["written_bytes"] - cost.written_bytes < SLACK


def test_plan_says_it(tmp_path: Path, llama: Path, run: Run) -> None:
    sizes = ("--vocab-size", 512, "--intermediate-size", 96)
    result = run("plan", llama, *sizes, "-o", tmp_path / "plan.json")
    assert "apply will read " in result.output
    written = Plan.load(tmp_path / "plan.json").after.nbytes
    assert f"write {written / 1e6:,.1f} MB" in result.output


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    source = tiny.save(tmp_path / "model", sharded=True)
    random_plan(source, 512, 64).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_dry_run_says_what_apply_takes_and_writes_nothing(plan_path: Path, run: Run) -> None:
    folder = plan_path.parent
    out, before = folder / "deep" / "out", digests(folder)
    dry = run("apply", plan_path, "-o", out, "--dry-run", "--json")
    facts = json.loads(dry.stdout)
    table = run("apply", plan_path, "-o", out, "--dry-run").stdout
    assert digests(folder) == before
    assert not out.parent.exists()
    low, high = facts["seconds"]
    assert 0 < low < high
    made = json.loads(run("apply", plan_path, "-o", out, "--json").stdout)
    assert facts["cost"]["written_bytes"] == made["nbytes"]
    assert facts["output"] == made["output"]
    shards = len(list(out.glob("*.safetensors")))
    assert (facts["shards"], facts["finished"]) == (shards, 0)
    assert facts["free_bytes"] > 0
    assert table.startswith(Plan.load(plan_path).table().partition("\nnote: ")[0])
    assert f"{out}: {shards} shards to write" in table
    assert table.endswith("nothing was written\n")


def test_a_dry_run_is_refused_as_apply_is(
    plan_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plan_path.parent
    out, partial = folder / "out", folder / "out.partial"
    dry = ("apply", plan_path, "-o", out, "--dry-run")
    out.mkdir()
    assert_refused(run(*dry), "exists already")
    out.rmdir()
    partial.mkdir()
    assert_refused(run(*dry), "from a run that was interrupted", "--resume")
    assert_refused(run(*dry, "--resume"), "has no journal")
    partial.rmdir()
    assert_refused(run(*dry, "--checksum"), "has no known checksum")
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
        assert_refused(run(*dry), "no space for the output", "1,000 free")
    (folder / "model" / "generation_config.json").write_text("{", encoding="utf-8")
    assert_refused(run(*dry), "generation_config.json")


def test_a_dry_run_counts_what_an_interrupted_run_has_left(
    plan_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = plan_path.parent, list[str]()
    out = folder / "out"
    dry = ("apply", plan_path, "-o", out, "--dry-run", "--resume")

    def second_fails(task: ShardTask, *more: Advance) -> None:
        names.append(task.source.name)
        if len(names) == 2:
            raise OSError(5, "the disk failed")
        write_shard(task, *more)

    with monkeypatch.context() as patch:
        patch.setattr("surgery.apply.run.write_shard", second_fails)
        assert run("apply", plan_path, "-o", out, "--jobs", 1).exit_code == 2
    before = digests(folder)
    facts = json.loads(run(*dry, "--json").stdout)
    table = run(*dry).stdout
    random_plan(folder / "model", 500, 64).save(folder / "other.json")
    other = run("apply", folder / "other.json", *dry[2:])
    assert_refused(other, "belongs to another plan")
    (folder / "other.json").unlink()
    assert digests(folder) == before
    assert facts["finished"] == 1
    assert f"{facts['shards']} shards to write, 1 are there already" in table
    cost, whole = facts["cost"], Plan.load(plan_path).after.nbytes
    assert 0 < cost["written_bytes"] == cost["disk_bytes"] < whole
    assert run("apply", plan_path, "-o", out, "--resume").exit_code == 0
    done = json.loads(run(*dry, "--json").stdout)
    assert (done["shards"], done["cost"]["written_bytes"]) == (0, 0)
