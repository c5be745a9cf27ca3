"""What plan predicts of apply is what apply --json measures."""

import json
from pathlib import Path

import pytest

from surgery.apply.cost import apply_cost
from surgery.apply.run import JOBS
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.planning.plan import Plan
from tests.support.command import Run
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
