"""Damaged plans, and those of another checkpoint, are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Run
from tests.support.damage import (
    APPLY,
    DOWN,
    Case,
    Damage,
    assert_refused_and_nothing_written,
    change,
    config,
    cut,
    each,
    nothing,
    plan_key,
    remove,
    write,
)


def kept_channels(layer: int, **axes: list[str]) -> Damage:
    """Let the plan keep other channels of ``layer``."""
    return change("plan.json", lambda data: data["kept_channels"][layer].update(axes))


def rename(data: dict[str, Any], old: str, new: str) -> None:
    data[new] = data.pop(old)


CASES = [
    Case("source changed after planning", config(rms_norm_eps=1e-5), APPLY,
         ("model", "not the checkpoint", "expected fingerprint", "found", "plan again")),
    Case("source gone", lambda root: (root / "model").rename(root / "moved"), APPLY,
         ("model", "neither a directory nor", "--source")),
    Case("plan not there", remove("plan.json"), APPLY,
         ("plan.json", "No such file", "name the plan's file")),
    Case("plan cut", cut("plan.json", 300), APPLY, ("plan.json", "not a plan", "found", "again")),
    Case("plan is no JSON", write("plan.json", b"\xff\xfe"), APPLY,
         ("plan.json", "not a plan", "found", "plan again")),
    Case("plan with an unknown field", plan_key(None, extra=1), APPLY,
         ("plan.json", "not a plan", "extra", "plan again")),
    Case("plan of the next format", plan_key(None, format=5), APPLY,
         ("plan.json", "format", "expected 4", "found 5", "plan again")),
    Case("plan with a base that is no hub id", plan_key(None, base_model="../x"), APPLY,
         ("plan.json", "base_model", "expected org/name", "correct it")),
    Case("plan keeps fewer tokens than it says", plan_key("after", vocab_size=513), APPLY,
         ("plan.json", "kept_tokens", "expected 513", "found 512", "plan again")),
    Case("plan of the first format", plan_key("after", intermediate_size=64), APPLY,
         ("plan.json", "not a plan", "intermediate_size", "plan again")),
    Case("plan keeps fewer channels than it says", kept_channels(1, ffn=["0-62"]), APPLY,
         ("plan: kept_channels of layer 1: ffn", "expected 64", "found 63", "plan again")),
    Case("plan keeps channels that are not there", kept_channels(1, ffn=["33-96"]), APPLY,
         ("kept_channels of layer 1: ffn", "not a set of indices", "range 33-96 of 96 indices",
          "plan again")),
    Case("plan keeps no channels", kept_channels(2, ffn=["most"]), APPLY,
         ("kept_channels of layer 2: ffn", "not a set of indices", "most", "plan again")),
    Case("plan keeps channels of experts", kept_channels(0, ffn=["0-63", "0-63"]), APPLY,
         ("kept_channels of layer 0: ffn", "as many experts", "expected 1", "found 2", "again")),
    Case("plan keeps channels of no expert", kept_channels(0, ffn=[]), APPLY,
         ("kept_channels of layer 0: ffn", "as many experts", "expected 1", "found 0", "again")),
    Case("plan keeps channels of another axis",
         change("plan.json", lambda data: rename(data["kept_channels"][1], "ffn", "shared")),
         APPLY, ("plan: axes of kept_channels of layer 1", "expected ['ffn']", "found ['shared']",
                 "plan again")),
    Case("plan keeps channels of an axis too many", kept_channels(0, expert=["0-63"]), APPLY,
         ("plan: axes of kept_channels of layer 0", "expected ['ffn']", "found ['expert', 'ffn']",
          "plan again")),
    Case("plan for other channels than it keeps",
         plan_key("after", widths={"intermediate_size": 65}), APPLY,
         ("plan: after.", "plan again")),
    Case("plan for more channels than there are",
         plan_key("before", widths={"intermediate_size": 128}), APPLY,
         ("plan: before.widths", "'intermediate_size': 96", "'intermediate_size': 128", "again")),
    Case("plan for a width that the source lacks",
         plan_key("after", widths={"intermediate_size": 64, "moe_intermediate_size": 64}), APPLY,
         ("plan: after.widths", "expected", "found", "moe_intermediate_size", "plan again")),
    Case("plan with a width that the source lacks",
         plan_key("after", widths={"intermediate_size": 64, "extra": 1}), APPLY,
         ("plan: after.widths", "expected", "found", "plan again")),
    Case("plan leaves tensors out", plan_key(None, dropped=[DOWN]), APPLY,
         ("plan: dropped", "expected []", DOWN, "plan again")),
    Case("plan without widths after the cut", plan_key("after", widths={}), APPLY,
         ("plan.json", "after.widths.intermediate_size", "expected 1 to 96", "found 0")),
    Case("plan of a model without parameters", plan_key("before", parameters=0),
         "inspect plan.json --removed",
         ("plan.json", "before.parameters", "expected at least 1", "found 0", "plan again")),
    Case("plan of fewer than no bytes", plan_key("after", nbytes=-1), "inspect plan.json --removed",
         ("plan.json", "after.nbytes", "expected at least 1", "found -1", "plan again")),
    Case("plan keeps no tokens", plan_key(None, kept_tokens=""), APPLY,
         ("plan.json", "kept_tokens", "expected 512", "found 0", "plan again")),
    Case("plan keeps no indices", plan_key(None, kept_tokens="all"), APPLY,
         ("plan.json", "kept_tokens", "not a set of indices", "found", "plan again")),
    Case("plan lacks a layer", change("plan.json", lambda data: data["kept_channels"].pop()),
         APPLY, ("plan", "kept_channels", "expected 3", "found 2", "plan again")),
    Case("plan for more rows than there are",
         each(plan_key("before", vocab_size=1280), plan_key(None, kept_tokens="768-1279")), APPLY,
         ("plan", "1280", "640", "plan again")),
    Case("plan for absurdly many rows",
         each(plan_key("before", vocab_size=10**15), plan_key("after", vocab_size=10**15),
              plan_key(None, kept_tokens=f"0-{10**15 - 1}")), APPLY, ("plan.json", "plan again")),
    Case("plan with tokens below the embedding", plan_key(None, rowless_tokens=-1), APPLY,
         ("plan", "rowless_tokens", "plan again")),
    Case("plan predicts other bytes", plan_key("after", nbytes=1), APPLY,
         ("plan", "nbytes", "found 1", "plan again")),
    Case("plan without statistics", plan_key(None, kept_channels=[]), APPLY,
         ("plan", "are not chosen", "--stats")),
    Case("plan without a place", nothing, "apply plan.json", ("plan.json", "no output", "-o DIR")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)


def test_a_source_that_has_moved_is_named(bench: Path, run: Run) -> None:
    (bench / "model").rename(bench / "moved")
    assert run(*APPLY.split(), "--source", "moved").exit_code == 0
