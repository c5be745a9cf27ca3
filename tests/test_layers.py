"""Layers that go or become one: equal to the dense model without them, or with the sum."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.equality import compare_forward
from surgery.apply import apply_plan
from surgery.budget import Sizes
from surgery.collapse import collapse
from surgery.depth import layers_by_influence, parse_layers, spelled_layers
from surgery.errors import BudgetError, FamilyError, SurgeryError
from surgery.fp8 import from_bf16, to_bf16
from surgery.layer_kinds import KINDS
from surgery.plan import Plan
from surgery.planning import make_plan
from surgery.verify import verify_files
from surgery.vocabulary import rarity_of
from tests import tiny
from tests.conftest import Run
from tests.plans import layout_of, masked_dense, random_stats
from tests.test_exact import bits, weights
from tests.tiny_configs import TINY

CPU = torch.device("cpu")


def plan_of(
    source: Path, layers: Sequence[Sequence[int]], vocab_size: int = 512, share: float = 0.6
) -> Plan:
    layout = layout_of(source)
    widths = {key: max(1, round(share * size)) for key, size in layout.widths.items()}
    sizes = Sizes(vocab_size, widths, layers=layers)
    stats = random_stats(layout)
    return make_plan(layout, rarity_of(layout), sizes, stats, criterion="act2", source=str(source))


def bypass(module: torch.nn.Module) -> None:
    """Let a layer give back what goes into it."""

    def hook(_: Any, inputs: Any, named: Any, output: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    module.register_forward_hook(hook, with_kwargs=True)


def layers_of(model: Any) -> Any:
    """The decoder layers of a loaded model: the longest list that is no vision tower's."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == tiny.LAYERS
    }
    found = [module for name, module in lists.items() if "vision" not in name]
    return found[0]


def assert_equals_bypassed(source: Path, output: Path, key: str, stays: Sequence[int]) -> None:
    dense, pruned = tiny.load(source, key), tiny.load(output, key)
    for number, layer in enumerate(layers_of(dense)):
        if number not in stays:
            bypass(layer)
    ids = torch.randint(tiny.TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = dense(input_ids=ids).logits, pruned(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.05


def whole_plan(source: Path, layers: Sequence[Sequence[int]]) -> Plan:
    return plan_of(source, layers, tiny.VOCAB_SIZE, 1.0)


@pytest.mark.parametrize("key", TINY)
def test_dropped_equals_bypassed_or_is_refused(tmp_path: Path, key: str) -> None:
    source = tiny.save(tmp_path / "source", key, sharded=True)
    if layout_of(source).family.layer_kinds is None:
        with pytest.raises(FamilyError, match="cannot go: their number says"):
            whole_plan(source, [[0], [2]])
        return
    stays = [0, 1] if key == "qwen3_next" else [0, 2]
    plan = whole_plan(source, [[layer] for layer in stays])
    apply_plan(plan, source, tmp_path / "out")
    assert verify_files(tmp_path / "out", plan, source).ok
    assert_equals_bypassed(source, tmp_path / "out", key, stays)
