"""Cosines of hidden states, and the tokens that hooks see together."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics.sums import cosine_sum
from calib.streaming.batches import Tokens


@settings(max_examples=30, deadline=None)
@given(
    windows=st.integers(1, 3),
    tokens=st.integers(1, 9),
    width=st.integers(1, 5),
    values=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_cosines_are_those_of_the_library(
    windows: int, tokens: int, width: int, values: int, seed: int
) -> None:
    """Whatever the number of tokens at a time, and for bf16 too."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, windows, tokens, width, generator=generator).bfloat16()
    expected = torch.cosine_similarity(before.double(), after.double(), dim=-1).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.statistics.sums.CACHED_VALUES", values)
        assert cosine_sum(before, after) == pytest.approx(float(expected), abs=1e-9)


def test_a_state_without_direction_counts_nothing() -> None:
    before, after = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]]).split(1)
    assert cosine_sum(before, after) == pytest.approx(0.8)
    assert cosine_sum(before, torch.zeros_like(after)) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_give_no_warning(value: float) -> None:
    """The pass looks for them after the layer, and names it in one line."""
    before = torch.ones(1, 2, 3)
    after = before.clone()
    after[0, 0, 0] = value
    cosine_sum(before, after)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_parts_of_windows_hold_every_token_once(data: st.DataObject) -> None:
    windows, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    ids = torch.randperm(windows * length).view(windows, length)
    edges = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    parts = [Tokens.of(ids, slice(start, stop)) for start, stop in pairwise(edges)]
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    for window, expected in enumerate(ids):
        found = [part.ids[part.windows == window] for part in parts]
        assert torch.equal(torch.cat(found), expected)
    whole = Tokens.of(ids)
    assert torch.equal(whole.ids, ids.flatten())
    assert whole.last
    assert whole.count == windows
    positions = torch.randperm(ids.numel())[:4]
    some = Tokens.at(ids, positions)
    assert torch.equal(ids[some.windows, positions % length], some.ids)
