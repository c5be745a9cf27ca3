"""prune is killed at a layer or at a shard, and continues there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calib.statistics.calibrate import _StatsAccumulator
from tests.support import ROOT, tiny
from tests.support.command import Run
from tests.support.contents import snapshot

KILLED = """
import os, sys
import {module} as module
from surgery.cli.main import main
calls, real = [], {function}
def dies(*arguments, **options):
    calls.append(1)
    if len(calls) > {after}:
        os._exit(9)
    return real(*arguments, **options)
{function} = dies
main(sys.argv[1:])
"""
STAGES = {
    "a layer": ("calib.statistics.calibrate", "module._StatsAccumulator._finish", 1),
    "a shard": ("surgery.apply.shard", "module.stream_edit", 12),
}


def killed(stage: str, command: list[str]) -> None:
    module, function, after = STAGES[stage]
    code = KILLED.format(module=module, function=function, after=after)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 9, ended.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_prune_continues(
    tmp_path: Path, text: Path, run: Run, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = tiny.save(tmp_path / "model", sharded=True)
    take = ["prune", model, "--data", text, "--seq-len", 64, "--samples", 4, "--device", "cpu"]
    take += ["--vocab-size", 512, "--intermediate-size", 64]
    whole, out = tmp_path / "a" / "out", tmp_path / "b" / "out"
    assert run(*take, "-o", whole).exit_code == 0
    killed(stage, [*map(str, take), "-o", str(out)])
    assert not out.exists()

    def work(*_: object, **__: object) -> None:
        pytest.fail("looked at what was there only after work")

    with monkeypatch.context() as patch:
        patch.setattr("calib.pipeline.prepare_calibration", work)
        refused = run(*take, "-o", out)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.output

    passed: list[int] = []
    real = _StatsAccumulator._finish

    def finish(self: _StatsAccumulator, layer: int) -> None:
        passed.append(layer)
        real(self, layer)

    monkeypatch.setattr(_StatsAccumulator, "_finish", finish)
    resumed = run(*take, "-o", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert passed == ([1, 2] if stage == "a layer" else [])
    beside = [path.with_name("out.stats.safetensors").read_bytes() for path in (whole, out)]
    assert beside[0] == beside[1]
    assert snapshot(out) == snapshot(whole)
    assert not list(out.parent.glob("*.partial*"))
    assert run(*take, "-o", out).exit_code == 2
    assert run(*take, "-o", out, "--resume").exit_code == 0
