"""Pairs of sizes that meet a target, coarse to fine."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.study.search import coarse, fine, parse_candidates
from surgery.errors import SurgeryError
from surgery.layout.layout import Layout
from surgery.planning.shapes import expert_choices, parameters_of
from surgery.planning.sizes import (
    NOTHING_FIXED,
    TOLERANCE,
    FixedSizes,
    Sizes,
    Steps,
    _nearest,
    _unreachable,
    nearest_to_rule,
    sizes_at,
    split,
)
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
    first = coarse(PAIRS, [PAIRS[also]], most)
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


@given(
    lines=st.lists(st.integers(1, 12), min_size=2, max_size=9),
    most=st.integers(4, 30),
    best=st.integers(0, 200),
)
def test_coarse_and_fine_go_by_experts_and_rows(lines: list[int], most: int, best: int) -> None:
    """``lines`` are how many V' there are for each E'; the last keeps all experts."""
    numbers = [*range(1, len(lines)), 0]
    found = [
        Sizes(1000 + 7 * n, {"moe_intermediate_size": 40 - n}, experts=experts)
        for experts, count in zip(numbers, lines, strict=True)
        for n in range(count)
    ]
    first = coarse(found, [found[0]], most)
    assert first == sorted(first, key=found.index)
    assert len(first) <= max(most, 2 * (most // 2)) + 1
    tried = list(dict.fromkeys(sizes.experts for sizes in first))
    assert (tried[0], tried[-1]) == (numbers[0], numbers[-1])
    for experts in tried:
        line = [sizes for sizes in found if sizes.experts == experts]
        ends = {sizes.vocab_size for sizes in first if sizes.experts == experts}
        assert {line[0].vocab_size, line[-1].vocab_size} <= ends
    winner = first[best % len(first)]
    second = fine(found, first, winner, most)
    here = tried.index(winner.experts)
    low, high = (numbers.index(tried[max(0, n)]) for n in (here - 1, min(here + 1, len(tried) - 1)))
    assert all(low <= numbers.index(sizes.experts) <= high for sizes in second)
    assert not [sizes for sizes in second if sizes in first]
    near = [
        numbers.index(sizes.experts) for sizes in found if sizes.vocab_size == winner.vocab_size
    ]
    between = [n for n in near if low < n < high and n != numbers.index(winner.experts)]
    assert second or not between or len(first) == len(found)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_pairs_meet_the_target_and_hold_the_rule_s(layout: Layout, ratio: float) -> None:
    steps = Steps(32, 32)
    pairs = sizes_at(layout, ratio, 300, steps)
    full = layout.parameters(layout.vocab_size, layout.widths)
    for sizes in pairs:
        removed = 1 - layout.parameters(sizes.vocab_size, sizes.widths) / full
        assert abs(removed - ratio) <= TOLERANCE
    assert split(layout, ratio, 300, steps) in pairs
    assert len({pair.vocab_size for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_triples_meet_the_target_at_every_number_of_experts(tmp_path: Path, key: str) -> None:
    layout = layout_of(tiny.save(tmp_path / "model", key, num_local_experts=16))
    full, steps = layout.parameters(layout.vocab_size, layout.widths), Steps(8, 4)
    counts = [0 if count == layout.experts else count for count in expert_choices(layout)]
    found = sizes_at(layout, 0.3, 300, steps, experts=counts)
    assert found == sorted(found, key=lambda s: (s.experts or layout.experts, s.vocab_size))
    assert [sizes for sizes in found if not sizes.experts] == sizes_at(layout, 0.3, 300, steps)
    assert len({sizes.experts for sizes in found}) > 2
    assert len({tuple(sizes.widths.values()) for sizes in found}) > 2
    for sizes in found:
        assert 1 - parameters_of(layout, sizes) / full == pytest.approx(0.3, abs=TOLERANCE)
    for experts in {sizes.experts for sizes in found}:
        line = [sizes for sizes in found if sizes.experts == experts]
        assert nearest_to_rule(layout, 0.3, line) in line
    whole_but_experts = FixedSizes(layout.vocab_size, layout.widths)
    (alone,) = sizes_at(layout, 0.3, 300, steps, whole_but_experts, counts)
    assert alone.experts
    assert (alone.vocab_size, alone.widths) == (layout.vocab_size, layout.widths)
    with pytest.raises(SurgeryError, match="whole experts and the sizes"):
        sizes_at(layout, 0.999, 300, steps, experts=counts)


def test_a_vocabulary_that_need_not_be_pruned_is_kept_whole(layout: Layout) -> None:
    whole = [pair for pair in sizes_at(layout, 0.2, 300, Steps(32, 8)) if pair.vocab_size == 1536]
    assert whole


def test_candidates_by_hand(layout: Layout) -> None:
    found = parse_candidates("1024:256,512:384,1024:256", layout, "intermediate_size")
    assert found == [
        Sizes(512, {"intermediate_size": 384}),
        Sizes(1024, {"intermediate_size": 256}),
    ]
    with pytest.raises(SurgeryError, match="no routed experts"):
        parse_candidates("1024:3:256", layout, "intermediate_size")
    for text in (
        "",
        "1:",
        "1:2:3:4",
        "a:b",
        "1024",
        "1024:256,",
        "9" * 30 + ":1",
        "0:256",
        "8:0",
        "640:0:64",
    ):
        with pytest.raises(SurgeryError, match="are no pairs of sizes"):
            parse_candidates(text, layout, "intermediate_size")


def test_candidates_of_a_mixture_by_hand(tmp_path: Path) -> None:
    mixture = layout_of(tiny.save(tmp_path / "model", "qwen3_moe", num_experts=8))
    found = parse_candidates("600:16,500:5:24,640:8:24", mixture, "moe_intermediate_size")
    assert [(sizes.vocab_size, sizes.experts) for sizes in found] == [(500, 5), (600, 0), (640, 0)]
    assert [sizes.widths["moe_intermediate_size"] for sizes in found] == [24, 16, 24]
    with pytest.raises(SurgeryError, match="expected 2 to 8"):
        parse_candidates("600:1:16", mixture, "moe_intermediate_size")


def listed(low: int, high: int, step: int) -> list[int]:
    """Every size: multiples of the step from ``low`` on, and ``high``."""
    return sorted({*(size for size in range(low, high + 1) if size % step == 0), high})


@given(
    low=st.integers(1, 60),
    more=st.integers(0, 300),
    step=st.integers(1, 90),
    halves=st.integers(-400, 1200),
    off=st.sampled_from([0.0, 0.0, 0.1, -1e-9]),
)
def test_the_nearest_size_is_that_of_the_listing(
    low: int, more: int, step: int, halves: int, off: float
) -> None:
    high, wanted = low + more, halves / 2 + off
    expected = min(listed(low, high, step), key=lambda size: abs(size - wanted))
    assert _nearest(wanted, low, high, step) == expected


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(0.3, 0.999),
    smallest=st.sampled_from([300, 700, 1536]),
    vocab=st.sampled_from([7, 64, 400, 2000]),
    width=st.sampled_from([9, 32, 300, 600]),
)
def test_the_nearest_ratio_is_that_of_all_pairs(
    layout: Layout, ratio: float, smallest: int, vocab: int, width: int
) -> None:
    full = layout.parameters(layout.vocab_size, layout.widths)
    removed = [
        1 - layout.parameters(rows, {"intermediate_size": channels}) / full
        for rows in listed(smallest, layout.vocab_size, vocab)
        for channels in listed(1, layout.widths["intermediate_size"], width)
    ]
    nearest = min(removed, key=lambda share: abs(share - ratio))
    error = str(_unreachable(layout, ratio, smallest, Steps(vocab, width), NOTHING_FIXED))
    said = re.search(r"at most ([0-9.]+); nearest is ([0-9.]+)", error)
    assert said is not None
    most, near = map(float, said.groups())
    assert most == pytest.approx(max(removed), abs=6e-5)
    assert abs(near - ratio) == pytest.approx(abs(nearest - ratio), abs=6e-5)


def test_steps_of_one_take_no_time_at_the_width_of_a_large_model(tmp_path: Path) -> None:
    """All pairs of V' and I' of an 8B model are 1.8 billion."""
    sizes_of_8b: dict[str, Any] = {"vocab_size": 128_256, "intermediate_size": 14_336}
    large = layout_of(tiny.save(tmp_path / "model", hidden_size=32, **sizes_of_8b))
    start = time.process_time()
    sizes = split(large, 0.2, 3000, Steps(1, 1))
    removed = 1 - large.parameters(sizes.vocab_size, sizes.widths) / large.parameters(
        large.vocab_size, large.widths
    )
    assert removed == pytest.approx(0.2, abs=1e-3)
    with pytest.raises(SurgeryError, match="cannot be met"):
        split(large, 0.99999, 3000, Steps(1, 1))
    assert time.process_time() - start < 20
