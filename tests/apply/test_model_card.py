"""The model card claims what the plan does, and nothing else."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.apply.model_card import model_card
from surgery.layout.layout import Layout
from surgery.planning.choice import choose_sizes
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.replacement import Replacement
from surgery.planning.request import CutRequest, SizeRequest
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import CRITERIA, ChannelOptions
from surgery.vocabulary.cost import VocabularyCost
from surgery.vocabulary.order import VocabularyOptions
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of, random_stats

LAYERS = ["all", "0-1", "0,1+2", "0+1", "by influence"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, ChannelStats]:
    layout = layout_of(tiny.save(tmp_path_factory.mktemp("card") / "model"))
    return layout, random_stats(layout)


def changed(plan: Plan) -> bool:
    return plan.after.widths != plan.before.widths


def removed_layers(plan: Plan) -> bool:
    used = {layer for group in plan.layers for layer in group}
    return bool(plan.layers) and len(used) < plan.before.num_hidden_layers


CLAIMS: dict[str, Callable[[Plan], bool]] = {
    r"(?<!arXiv )2509\.06836|COMPACT": lambda plan: (
        not plan.ids().identity or (changed(plan) and plan.provenance.criterion == "common-act2")
    ),
    r"Vocabulary:": lambda plan: not plan.ids().identity,
    r"rarest": lambda plan: not plan.ids().identity,
    r"by merge order": lambda plan: (
        plan.vocabulary is not None and plan.vocabulary.order == "merge-order"
    ),
    r"by their frequency": lambda plan: (
        plan.vocabulary is not None and plan.vocabulary.order == "frequency"
    ),
    r"FFN channels:": changed,
    r"drawn by chance": lambda plan: changed(plan) and plan.provenance.criterion == "random",
    r"least squares": lambda plan: changed(plan) and plan.replaced is not None,
    r"Removed layers:": removed_layers,
    r"ShortGPT|2403\.03853|influence": lambda plan: (
        removed_layers(plan) and plan.provenance.layers_by_influence
    ),
    r"LaCo|2402\.11187|merged": lambda plan: any(len(group) > 1 for group in plan.layers),
    r"calibration tokens": lambda plan: (
        (changed(plan) and plan.provenance.criterion != "random")
        or (removed_layers(plan) and plan.provenance.layers_by_influence)
    ),
    r"pruned by|smaller|^- pruned": lambda plan: plan.after.parameters < plan.before.parameters,
    r"^base_model:": lambda plan: plan.base is not None,
    r"bf16": lambda plan: False,
    r"multi-token prediction": lambda plan: False,
}
"""What a card may claim, and the plans for which that is so."""


@given(
    vocab_size=st.sampled_from([tiny.VOCAB_SIZE, 512]),
    order=st.sampled_from(["merge-order", "frequency"]),
    width=st.sampled_from([tiny.INTERMEDIATE_SIZE, 64]),
    criterion=st.sampled_from(list(CRITERIA)),
    layers=st.sampled_from(LAYERS),
    repaired=st.booleans(),
    base=st.sampled_from([None, "org/name"]),
)
def test_each_claim_is_made_exactly_where_it_is_so(
    source: tuple[Layout, ChannelStats],
    vocab_size: int,
    order: str,
    width: int,
    criterion: str,
    layers: str,
    repaired: bool,
    base: str | None,
) -> None:
    layout, stats = source
    named = None if layers in ("all", "by influence") else layers
    sizes = SizeRequest(
        vocab_size=vocab_size,
        intermediate_size=width,
        layers=named,
        num_hidden_layers=2 if layers == "by influence" else None,
    )
    request = CutRequest(sizes, VocabularyOptions(), ChannelOptions(criterion), base)
    choice = choose_sizes(layout, request, influence=np.arange(3.0))
    cost = VocabularyCost(order, 0, None, None, []) if vocab_size < tiny.VOCAB_SIZE else None
    plan = plan_cut(layout, choice, stats, cost=cost)
    if repaired:
        plan = msgspec.structs.replace(plan, replaced=Replacement("file", "digest", "how", []))
    card = model_card(plan, layout.checkpoint).decode()
    for claim, holds in CLAIMS.items():
        assert bool(re.search(claim, card, re.MULTILINE)) == holds(plan), (claim, card)
    assert f"# {base or 'model'}" in card


def test_what_is_dropped_by_name_is_not_called_rare(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    layout = layout_of(path)

    def claims(**options: object) -> str:
        plan = surgery.make_plan(path, **options)  # type: ignore[arg-type]
        return model_card(plan, layout.checkpoint).decode()

    dropped = claims(drop_scripts=["Latin"])
    assert "rows were removed: those of Latin." in dropped
    assert "rarest" not in dropped
    alone = surgery.make_plan(path, drop_scripts=["Latin"]).after.vocab_size
    both = claims(drop_scripts=["Latin"], vocab_size=alone - 1)
    assert "removed: those of Latin; the rarest by merge order, as in COMPACT" in both
    assert "removed: the rarest by merge order, as in" in claims(vocab_size=512)
    assert "20 of 640 rows were removed, which no token has." in claims(vocab_size=tiny.TOKENS)


def test_a_base_model_is_named_by_a_command(llama: Path, tmp_path: Path, run: Run) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    options = ("--vocab-size", 512, "-o", plan)
    assert run("plan", llama, *options, "--base-model", "org/na-me").exit_code == 0
    assert run("apply", plan, "-o", out).exit_code == 0
    card = (out / "README.md").read_text("utf-8")
    assert 'base_model: "org/na-me"' in card
    assert "# org/na-me, pruned by " in card
    for wrong in ("name", "org/name@main", "a/b/c", "../x", ""):
        refused = run("plan", llama, *options, "--base-model", wrong)
        assert_refused(refused, "--base-model: is no model's name on the hub: expected ORG/NAME")
