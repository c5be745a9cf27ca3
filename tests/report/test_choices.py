"""What the sliders say, evaluated in Python: parameters, bytes and shares of any model's plan."""

import base64
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery.families.schema import EXPERT
from surgery.layout.layout import Layout
from surgery.planning.shapes import shape_of
from surgery.planning.sizes import Sizes, split
from surgery.report.choices import Choices, Mark, choices_of
from surgery.stats.channel_stats import ChannelStats, RoutedSums
from surgery.vocabulary.order import rarity_of
from tests.support import fp8, quantized, tiny
from tests.support.plans import layout_of, plan_to, random_stats

WIDE: dict[str, Any] = {"intermediate_size": 512}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: tiny.save(path, **WIDE),
    "gemma3": lambda path: tiny.save(path, "gemma3_text", tied=True, **WIDE),
    "gpt2": lambda path: tiny.save(path, "gpt2", tied=True, n_inner=512),
    "qwen2_moe": lambda path: tiny.save(path, "qwen2_moe", moe_intermediate_size=256),
    "deepseek_v3": lambda path: tiny.save(path, "deepseek_v3", **WIDE),
    "fp8": lambda path: fp8.save(path),
    "awq": lambda path: quantized.save(path, "awq"),
}


def stats_of(layout: Layout) -> ChannelStats:
    """Random statistics, with random sums of the experts' outputs."""
    stats, rng = random_stats(layout), np.random.default_rng(1)
    for axes in stats.layers:
        if EXPERT in axes:
            shape = axes[EXPERT].tokens.shape
            routed = RoutedSums(*(rng.random(shape) for _ in range(5)))
            axes[EXPERT] = replace(axes[EXPERT], routed=routed)
    return stats


def choices_for(layout: Layout, *marks: Mark) -> Choices:
    plan = plan_to(layout, Sizes(layout.vocab_size, layout.widths), None)
    return choices_of(layout, plan, stats_of(layout), rarity_of(layout), marks)


def total(facts: dict[str, Any], name: str, rows: int, place: tuple[int, int, int, int]) -> int:
    """What the page's script adds up."""
    v, e, i, count = place
    table = facts[name]
    found = table["rest"] - (rows - facts["vocab"][v]) * table["row"]
    layers = facts["influence"][:count]
    return int(found + sum(table["kinds"][facts["kind_of"][layer]][e][i] for layer in layers))


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_plan(name: str, tmp_path: Path) -> None:
    layout = layout_of(MODELS[name](tmp_path / "model"))
    facts = choices_for(layout).facts
    depth, seen = layout.num_hidden_layers, set()
    for v, rows in enumerate(facts["vocab"]):
        for e, experts in enumerate(facts["experts"]):
            for i, widths in enumerate(facts["widths"]):
                for count in facts["layers"]:
                    kept = sorted(facts["influence"][:count])
                    layers = [[layer] for layer in kept] if count < depth else []
                    cut = experts if experts != layout.experts else 0
                    shape = shape_of(layout, Sizes(rows, widths, False, layers, cut))
                    place = (v, e, i, count)
                    found = total(facts, "parameters", layout.vocab_size, place)
                    assert found == shape.parameters, place
                    assert total(facts, "nbytes", layout.vocab_size, place) == shape.nbytes, place
                    seen.add(shape.nbytes)
    assert len(seen) > 1


def test_shares_are_those_of_the_plan(tmp_path: Path) -> None:
    model = MODELS["qwen2_moe"](tmp_path / "model")
    layout = layout_of(model)
    choices, stats = choices_for(layout), stats_of(layout)
    facts = choices.facts
    raw = gzip.decompress(base64.b64decode(choices.tables["shares"]))
    sizes = [len(facts[key]) for key in ("vocab", "experts", "widths", "rows")]
    shares = np.frombuffer(raw, "<f4").reshape(sizes)
    for v, e, i in [(0, 0, 0), (1, 1, 0), (len(facts["vocab"]) - 1, 0, 0)]:
        plan = surgery.make_plan(
            model,
            stats=stats,
            vocab_size=facts["vocab"][v],
            num_experts=facts["experts"][e],
            widths=facts["widths"][i],
        )
        wanted = plan.provenance.channel_shares
        assert wanted is not None
        for n, (layer, axis) in enumerate(facts["rows"]):
            assert shares[v, e, i, n] == pytest.approx(wanted.kept[layer][axis], abs=2e-6)


def test_the_rule_and_a_search_are_marked(tmp_path: Path) -> None:
    layout = layout_of(MODELS["llama"](tmp_path / "model"))
    best, other = Mark("best", 600, {"intermediate_size": 100}), Mark("other", 9999, {"a": 1})
    facts = choices_for(layout, best, other).facts
    names = [mark["name"] for mark in facts["marks"]]
    assert names[-1] == "best"
    for mark in facts["marks"][:-1]:
        ratio = float(mark["name"].removeprefix("rule of thumb, ").rstrip("%")) / 100
        sizes = split(layout, ratio, facts["must_keep"])
        assert (mark["vocab"], mark["widths"]) == (sizes.vocab_size, dict(sizes.widths))
    assert len(names) > 1


def test_the_order_is_the_rarity(tmp_path: Path) -> None:
    layout = layout_of(MODELS["llama"](tmp_path / "model"))
    packed = choices_for(layout).tables["order"]
    found = np.frombuffer(gzip.decompress(base64.b64decode(packed)), "<i4").cumsum()
    assert np.array_equal(found, rarity_of(layout).order)
