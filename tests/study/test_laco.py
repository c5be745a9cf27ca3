"""LaCo: which layers are collapsed, and how many are kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.streaming.hidden_states import SpilledStates
from calib.streaming.settings import PassSettings
from calib.study.laco import COLLAPSED, collapse_layers
from surgery.errors import SurgeryError
from surgery.layout.layout import Layout
from tests.support import tiny
from tests.support.plans import layout_of

SETTINGS = PassSettings(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("laco") / "model"
    return layout_of(tiny.save(path, num_hidden_layers=9))


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, tiny.TOKENS, 12) for _ in range(3)]


@pytest.mark.parametrize("count", [9, 8, 6, 4, 3])
def test_as_many_layers_are_kept_as_asked_for(layout: Layout, count: int) -> None:
    groups = collapse_layers(layout, windows(), count, SETTINGS)
    assert len(groups) == count
    assert [layer for group in groups for layer in group] == list(range(9))
    assert max(map(len, groups)) <= COLLAPSED


def test_hidden_states_are_in_files_where_asked_for(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    class Noted(SpilledStates):
        def __init__(self, directory: Path) -> None:
            made.append(directory)
            super().__init__(directory)

    in_memory = collapse_layers(layout, windows(), 7, SETTINGS)
    monkeypatch.setattr("calib.streaming.batches.SpilledStates", Noted)
    settings = replace(SETTINGS, hidden="file", spill=tmp_path)
    assert collapse_layers(layout, windows(), 7, settings) == in_memory
    assert made
    assert all(tmp_path in directory.parents for directory in made)
    assert not list(tmp_path.iterdir())


def test_the_topmost_run_above_the_threshold_is_collapsed_first(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cosines(_: object, __: object, tried: list[list[list[int]]], *___: object) -> list[float]:
        return [0.97 if len(groups[2]) > 1 or len(groups[4]) > 1 else 0.5 for groups in tried]

    monkeypatch.setattr("calib.study.laco._cosines", cosines)
    groups = collapse_layers(layout, windows(), 6, SETTINGS)
    assert groups == [[0], [1], [2], [3], [4, 5, 6, 7], [8]]


def test_too_few_layers_are_refused(layout: Layout) -> None:
    with pytest.raises(SurgeryError, match="laco: cannot collapse so many layers"):
        collapse_layers(layout, windows(), 1, SETTINGS)
