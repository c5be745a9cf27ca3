"""Layers that notes, searches and rankings offer are layers that a plan may keep."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.errors import BudgetError
from surgery.planning.layers import (
    check_layers,
    check_removable,
    kind_notes,
    layers_by_influence,
    needed_layers,
    parse_layers,
    pattern_layers,
)
from tests.support import tiny, tiny_encoders
from tests.support.plans import layout_of

DEPTH = 6
WINDOWS = {"layer_types": None}
NO_ROPE = {"no_rope_layers": [1, 1, 1, 0, 1, 1]}
NEEDY: dict[str, dict[str, Any]] = {
    "modernbert": {"global_attn_every_n_layers": 2, **WINDOWS},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"] * 3},
    "afmoe": {"num_dense_layers": 2, "global_attn_every_n_layers": 2, **WINDOWS},
    "qwen3_next": {"mlp_only_layers": [1, 4], "full_attention_interval": 3, **WINDOWS},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3, 5], **NO_ROPE},
    "deepseek_v2": {},
    "ernie4_5_moe": {"moe_layer_end_index": 2},
    "bamba": {"attn_layer_indices": [2, 4]},
}
"""Models that do not do without some of their layers: no shape need tell."""


def saved(path: Path, key: str) -> Path:
    save: Any = tiny_encoders.save if key == "modernbert" else tiny.save
    found: Path = save(path, key, num_hidden_layers=DEPTH, **NEEDY[key])
    return found


@pytest.mark.parametrize("key", NEEDY)
def test_no_layers_are_offered_that_a_plan_refuses(tmp_path: Path, key: str) -> None:
    layout, offered = layout_of(saved(tmp_path / "model", key)), 0
    check_removable(layout)
    rng = np.random.default_rng(0)
    for influence in (np.arange(DEPTH), -np.arange(DEPTH), *rng.random((8, DEPTH))):
        needed = needed_layers(layout, influence)
        for count in range(1, DEPTH):
            if count < len(needed):
                with pytest.raises(BudgetError, match=f"expected {len(needed)} to {DEPTH}"):
                    layers_by_influence(influence, count, needed)
                continue
            ranked = layers_by_influence(influence, count, needed)
            check_layers(layout, ranked)
            kept = pattern_layers(layout, count, influence)
            for groups in [] if kept is None else [kept]:
                check_layers(layout, groups)
            for note in kind_notes(layout, ranked, influence):
                for found in re.findall(r"`layers` (\S+) keeps the pattern", note):
                    check_layers(layout, parse_layers(found))
                    offered += 1
    assert offered or key not in ("modernbert", "afmoe", "qwen3_next", "llama4_text")


def test_what_is_needed_is_the_one_of_most_influence(tmp_path: Path) -> None:
    layout = layout_of(saved(tmp_path / "model", "afmoe"))  # layers 0 and 1 have no experts
    influence = np.array([0.1, 0.2, 0.9, 0.8, 0.7, 0.6])
    assert needed_layers(layout, influence) == [1, 2]
    assert layers_by_influence(influence, 3, [1, 2]) == [[1], [2], [3]]
    assert layers_by_influence(influence, 3) == [[2], [3], [4]]


def test_a_first_layer_that_stays_is_offered_in_the_note(tmp_path: Path) -> None:
    layout = layout_of(saved(tmp_path / "model", "modernbert"))
    influence = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    (note,) = kind_notes(layout, [[0], [2], [4]], influence)
    assert note.endswith("`layers` 0-2 keeps the pattern")
