"""apply is killed anywhere, any number of times, and ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT, tiny
from tests.support.contents import snapshot
from tests.support.killing import journaled, run_apply, whole_shards
from tests.support.plans import random_plan

KILLS = 10
"""Random moments for each number of jobs, beside the last ones."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of a model in a dozen shards, with what it makes in ``whole`` beside it."""
    root = tmp_path_factory.mktemp("killed")
    source = tiny.save(root / "model", sharded=True, num_hidden_layers=8)
    random_plan(source, 512, 64).save(root / "plan.json")
    assert len(list(source.glob("*.safetensors"))) >= 8
    return root / "plan.json"


@cache
def lines_of(plan: Path, jobs: int) -> int:
    """Lines that an uninterrupted run takes; its output is what all others are compared with."""
    whole = plan.parent / "whole"
    again = plan.parent / f"again-{jobs}"
    code, lines = run_apply(plan, "-o", again, "--jobs", jobs)
    assert code == 0
    assert lines > 1_000  # of every watched module some
    if whole.exists():
        assert snapshot(again) == snapshot(whole)
    else:
        again.rename(whole)
    return lines


class Attempts:
    """Runs to one output, one after the other, and what must hold between them."""

    def __init__(self, plan: Path, output: Path, jobs: int) -> None:
        self.plan, self.output, self.jobs = plan, output, jobs
        self.partial = output.with_name(output.name + ".partial")
        self.journal = output.with_name(output.name + ".partial.journal")
        self.seen: dict[str, set[tuple[int, int]]] = {}
        """Shard → each file that was ever there under its name."""

    def run(self, kill_at: int | None) -> int:
        """One more run, killed or not; return its exit code."""
        place = self.output if self.output.exists() else self.partial
        before, kept = whole_shards(place), journaled(self.journal)
        arguments = (self.plan, "-o", self.output, "--resume", "--jobs", self.jobs)
        code, _ = run_apply(*arguments, kill_at=kill_at)
        place = self.output if self.output.exists() else self.partial
        after = whole_shards(place)
        for name, file in after.items():
            self.seen.setdefault(name, set()).add(file)
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert len(after.keys() - journaled(self.journal)) <= self.jobs or place == self.output
        if self.output.exists():
            assert not self.partial.exists()
            assert snapshot(self.output) == snapshot(self.plan.parent / "whole")
        return code

    def finish(self, kills: int) -> None:
        """The last run; nothing but the output is left, and little was done twice."""
        assert self.run(None) == 0
        assert snapshot(self.output) == snapshot(self.plan.parent / "whole")
        left = {path.name for path in self.output.parent.iterdir()}
        assert left == {self.output.name}
        assert sum(len(files) - 1 for files in self.seen.values()) <= kills * self.jobs


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_any_line_it_resumes_to_the_same_bytes(
    plan: Path, tmp_path: Path, jobs: int
) -> None:
    lines = lines_of(plan, jobs)
    random_lines = random.Random(jobs).sample(range(1, lines), KILLS)
    for number, kill_at in enumerate(random_lines):
        attempts = Attempts(plan, tmp_path / f"{number}" / "out", jobs)
        assert attempts.run(kill_at) == -signal.SIGKILL, kill_at
        attempts.finish(1)


def test_killed_at_one_of_the_last_lines_it_resumes_without_a_shard_written_again(
    plan: Path, tmp_path: Path
) -> None:
    """Among them those around the rename and those that delete the journal."""
    lines = lines_of(plan, 1)
    for kill_at in range(lines - 44, lines + 1, 4):
        attempts = Attempts(plan, tmp_path / f"{kill_at}" / "out", 1)
        assert attempts.run(kill_at) == -signal.SIGKILL, kill_at
        attempts.finish(0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_again_and_again_it_arrives(plan: Path, tmp_path: Path, jobs: int) -> None:
    """Resumed runs are killed as well, until one is through."""
    lines = lines_of(plan, jobs)
    generator = random.Random(jobs)
    attempts = Attempts(plan, tmp_path / "place" / "out", jobs)
    kills = 0
    while attempts.run(generator.randrange(1, lines // 2)) == -signal.SIGKILL:
        kills += 1
        assert kills < 100
    assert kills >= 2
    attempts.finish(kills)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_the_program_itself_killed_after_some_shards(
    plan: Path, tmp_path: Path, share: float
) -> None:
    """Without any instrument: the signal comes when the directory has so many shards."""
    lines_of(plan, 2)
    shards = len(list((plan.parent / "model").glob("*.safetensors")))
    output = tmp_path / "place" / "out"
    partial = output.with_name("out.partial")
    command = [
        sys.executable,
        "-c",
        "from surgery.cli.main import main; main()",
        "apply",
        str(plan),
    ]
    command += ["-o", str(output), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(whole_shards(partial)) < share * shards:
            time.sleep(0.0002)
        process.kill()
    attempts = Attempts(plan, output, 2)
    attempts.finish(1)
