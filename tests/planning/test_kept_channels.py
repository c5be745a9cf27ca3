"""The channels that a plan keeps can be read, with their share of the statistics."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.apply.edits import kept_parts
from surgery.planning.choice import choose_sizes
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.request import CutRequest, SizeRequest
from surgery.stats.channels import CRITERIA, ChannelOptions, bucket_weights
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of, random_plan, random_stats


@pytest.mark.parametrize("key", ["llama", "qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("layers", [None, "0,2"])
def test_channels_are_those_that_apply_keeps(key: str, layers: str | None, tmp_path: Path) -> None:
    layout = layout_of(tiny.save(tmp_path / "model", key))
    stats = random_stats(layout)
    widths = {name: size // 2 for name, size in layout.widths.items()}
    request = CutRequest(SizeRequest(widths=widths, layers=layers))
    plan = plan_cut(layout, choose_sizes(layout, request), stats)
    facts = plan.channel_facts()
    kept = [part.channels for part in kept_parts(plan, layout)]
    weights = bucket_weights(stats, plan.ids())
    assert len(facts) == len(kept) == plan.after.num_hidden_layers
    for number, (entry, expected) in enumerate(zip(facts, kept, strict=True)):
        assert entry["layer"] == number
        (source,) = entry["from"]
        assert source == (plan.layers[number][0] if layers else number)
        for axis, chosen in expected.items():
            found = entry["axes"][axis]
            assert found["channels"] == layout.channels_of(axis)
            assert found["kept"] == [indices.tolist() for indices in chosen]
            sums = np.einsum("b,bek->ek", weights, stats.layers[source][axis].sum_sq)
            left = sum(row[indices].sum() for row, indices in zip(sums, chosen, strict=True))
            assert found["share"] == pytest.approx(left / sums.sum(), abs=1e-6)
    lines = plan.channel_table().splitlines()
    assert len(lines) == 2 + sum(len(entry["axes"]) for entry in facts)
    assert max(map(len, lines)) <= 100
    assert json.loads(json.dumps(facts)) == facts


@given(st.sampled_from(list(CRITERIA)), st.integers(1, tiny.INTERMEDIATE_SIZE))
def test_the_share_that_is_measured_chooses_best(llama: Path, criterion: str, width: int) -> None:
    layout = layout_of(llama)
    stats = random_stats(layout)

    def shares(name: str) -> list[float]:
        request = CutRequest(
            SizeRequest(intermediate_size=width), channels=ChannelOptions(criterion=name)
        )
        plan = plan_cut(layout, choose_sizes(layout, request), stats)
        found = plan.provenance.channel_shares
        assert found is not None
        return [axes["ffn"] for axes in found.kept]

    for best, other in zip(shares("common-act2"), shares(criterion), strict=True):
        assert 0 < other <= best + 1e-6
        assert best <= 1


def test_inspect_shows_channels_by_layer(llama: Path, tmp_path: Path, run: Run) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    random_plan(llama, 512, 64).save(plan)
    assert run("apply", plan, "-o", out).exit_code == 0
    shown = run("inspect", out, "--channels")
    assert shown.exit_code == 0, shown.output
    assert shown.output == run("inspect", plan, "--channels").output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["layer", "axis", "kept", "of", "share", "kept", "channels"]
    assert [line.split()[:4] for line in lines[1:-1]] == [
        [str(layer), "ffn", "64", str(tiny.INTERMEDIATE_SIZE)] for layer in range(tiny.LAYERS)
    ]
    assert lines[-1].startswith("share of Σ act² over the kept tokens that stays: ")
    found = json.loads(run("inspect", plan, "--channels", "--json").output)
    assert found == Plan.load(plan).channel_facts()
    run("plan", llama, "--intermediate-size", 64, "-o", plan, "--force")
    assert_refused(run("inspect", plan, "--channels"), "predicts sizes only", "with --stats")
