"""Pairs of sizes that meet a target, coarse to fine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.study.search import coarse, fine, parse_candidates
from surgery.errors import SurgeryError
from surgery.layout.layout import Layout
from surgery.planning.sizes import TOLERANCE, Sizes, Steps, pairs_at, split
from tests.support import tiny
from tests.support.plans import layout_of

PAIRS = [Sizes(1000 + 10 * n, {"intermediate_size": 400 - n}) for n in range(60)]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("model") / "model"
    return layout_of(tiny.save(path, hidden_size=64, intermediate_size=512, vocab_size=1536))


@given(most=st.integers(2, 70), also=st.integers(0, 59), best=st.integers(0, 59))
def test_coarse_has_both_ends_and_fine_lies_around_the_best(
    most: int, also: int, best: int
) -> None:
    first = coarse(PAIRS, PAIRS[also], most)
    assert first[0] == PAIRS[0]
    assert first[-1] == PAIRS[-1]
    assert PAIRS[also] in first
    assert len(first) <= min(most + 1, len(PAIRS))
    assert first == sorted(first, key=PAIRS.index)
    winner = first[best % len(first)]
    second = fine(PAIRS, first, winner, most)
    indices = [PAIRS.index(pair) for pair in first]
    here = first.index(winner)
    low, high = indices[max(0, here - 1)], indices[min(len(indices) - 1, here + 1)]
    assert all(pair not in first and low < PAIRS.index(pair) < high for pair in second)
    assert second or high - low <= 2 or len(first) == len(PAIRS)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_pairs_meet_the_target_and_hold_the_rule_s(layout: Layout, ratio: float) -> None:
    steps = Steps(32, 32)
    pairs = pairs_at(layout, ratio, 300, steps)
    full = layout.parameters(layout.vocab_size, layout.widths)
    for sizes in pairs:
        removed = 1 - layout.parameters(sizes.vocab_size, sizes.widths) / full
        assert abs(removed - ratio) <= TOLERANCE
    assert split(layout, ratio, 300, steps) in pairs
    assert len({pair.vocab_size for pair in pairs}) == len(pairs)


def test_a_vocabulary_that_need_not_be_pruned_is_kept_whole(layout: Layout) -> None:
    whole = [pair for pair in pairs_at(layout, 0.2, 300, Steps(32, 8)) if pair.vocab_size == 1536]
    assert whole


def test_candidates_by_hand(layout: Layout) -> None:
    found = parse_candidates("1024:256,512:384,1024:256", layout, "intermediate_size")
    assert found == [
        Sizes(512, {"intermediate_size": 384}),
        Sizes(1024, {"intermediate_size": 256}),
    ]
    for text in ("", "1:", "a:b", "1024", "1024:256,", "9" * 30 + ":1"):
        with pytest.raises(SurgeryError, match="are no pairs of sizes"):
            parse_candidates(text, layout, "intermediate_size")
