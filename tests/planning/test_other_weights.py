"""Statistics and plans of another checkpoint with the same shapes are refused."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery import apply_plan, make_plan, open_model
from surgery.checkpoint.checkpoint import same_weights
from surgery.errors import PlanError, StatsError
from tests.support import tiny
from tests.support.plans import random_stats

FILE = "model.safetensors"


def trained_on(source: Path, path: Path) -> Path:
    """Copy a checkpoint as it is some steps later: other weights, all else the same."""
    shutil.copytree(source, path)
    tensors = {name: tensor * 1.001 for name, tensor in load_file(source / FILE).items()}
    save_file(tensors, path / FILE, {"format": "pt"})
    return path


def test_they_are_refused_by_name(tmp_path: Path) -> None:
    first = tiny.save(tmp_path / "checkpoint-500")
    later = trained_on(first, tmp_path / "checkpoint-1000")
    copy = shutil.copytree(first, tmp_path / "copy")
    layouts = [open_model(path).layout for path in (first, later)]
    assert layouts[0].checkpoint.fingerprint == layouts[1].checkpoint.fingerprint
    stats = random_stats(layouts[0])
    with pytest.raises(StatsError, match="same shapes with other weights"):
        make_plan(later, stats=stats, intermediate_size=64)
    plan = make_plan(copy, stats=stats, intermediate_size=64)
    first.rename(tmp_path / "away")
    later.rename(copy.with_name("other"))
    copy.rename(tmp_path / "kept")
    (tmp_path / "other").rename(copy)
    with pytest.raises(PlanError, match="other weights"):
        apply_plan(plan, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(st.sampled_from([None, "sample:a", "sample:b", "hub:a"]), st.sampled_from([None, "hub:a"]))
def test_only_the_same_kind_is_compared(first: str | None, second: str | None) -> None:
    kinds = [value and value[:3] for value in (first, second)]
    comparable = None not in kinds and kinds[0] == kinds[1]
    assert same_weights(first, second) is ((first == second) if comparable else None)
