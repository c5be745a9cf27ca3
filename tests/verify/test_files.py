"""verify compares config.json with what apply makes of the source's."""

from pathlib import Path
from typing import Any

import pytest

from surgery.api import apply_plan, verify_checkpoint
from surgery.planning.plan import Plan
from tests.support import tiny
from tests.support.command import Run
from tests.support.json_files import change
from tests.support.plans import random_plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_group", 4),
        ("num_experts_per_tok", 3),
        ("routed_scaling_factor", 1.25),
        ("norm_topk_prob", False),
        ("rms_norm_eps", 0.5),
        ("hidden_act", "relu"),
    ],
)
def test_a_key_that_changes_what_the_model_computes_is_a_fault(
    tmp_path: Path, key: str, value: Any
) -> None:
    source, out = tiny.save(tmp_path / "model", "deepseek_v3", n_routed_experts=8), tmp_path / "out"
    plan = random_plan(source, 640, 1.0, experts=6)
    apply_plan(plan, output=out)
    assert verify_checkpoint(out, plan=plan).ok
    change(out / "config.json", lambda config: config.update({key: value}))
    report = verify_checkpoint(out, plan=plan)
    assert not report.ok
    assert f"config.json: {key}: expected " in report.table()


def test_copies_of_the_number_of_experts_are_rewritten(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "model", "llama4", num_local_experts=8), tmp_path / "out"
    change(source / "config.json", lambda config: config.update(num_local_experts=8))
    apply_plan(random_plan(source, 640, 1.0, experts=5), output=out)
    found: dict[str, Any] = {}
    change(out / "config.json", found.update)
    assert found["num_local_experts"] == found["text_config"]["num_local_experts"] == 5


def test_the_plan_within_an_output_can_be_named(llama: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    plan = random_plan(llama, 512, 64)
    apply_plan(plan, output=out)
    assert Plan.load(out / "compact_surgery.json").digest == plan.digest
    options = ("--plan", out / "compact_surgery.json", "--source", llama)
    verified = run("verify", out, *options)
    assert verified.exit_code == 0, verified.output
    assert "skipped" not in verified.output
