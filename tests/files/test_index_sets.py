"""Index sets as text: round trips, and refusal of what encode does not write."""

import base64
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import PlanError
from surgery.files.index_sets import BITMAP, decode, encode, runs

SIZE = 100


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Draw ascending indices below a size: sparse, dense or in runs."""
    size = draw(st.integers(0, 400))
    flags = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=80))
    mask = np.repeat([flag for flag, _ in flags], [count for _, count in flags])[:size]
    return np.flatnonzero(mask), size


def bitmap(*indices: int, size: int = SIZE) -> str:
    bits = np.zeros(-(-size // 8) * 8, dtype=bool)
    bits[list(indices)] = True
    return BITMAP + base64.b64encode(np.packbits(bits).tobytes()).decode()


@given(index_sets())
def test_decode_inverts_encode(drawn: tuple[np.ndarray, int]) -> None:
    indices, size = drawn
    decoded = decode(encode(indices, size), size, "here")
    assert decoded.dtype == np.int64
    assert decoded.tolist() == indices.tolist()


@given(index_sets())
def test_text_is_never_longer_than_a_bitmap(drawn: tuple[np.ndarray, int]) -> None:
    assert len(encode(*drawn)) <= len(bitmap(size=drawn[1]))


@given(index_sets())
def test_runs_partition_the_indices(drawn: tuple[np.ndarray, int]) -> None:
    indices, _ = drawn
    starts, stops = runs(indices)
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
    assert [i for start, stop in spans for i in range(start, stop)] == indices.tolist()
    assert all(start < stop for start, stop in spans)
    assert all(stop < start for (_, stop), (start, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("indices", "text"),
    [([], ""), ([7], "7"), ([0, 1, 2], "0-2"), ([0, 1, 5, 98, 99], "0-1,5,98-99")],
)
def test_ranges_read_as_people_write_them(indices: list[int], text: str) -> None:
    assert encode(np.array(indices, dtype=np.int64), SIZE) == text
    assert decode(text, SIZE, "here").tolist() == indices


def test_a_scattered_set_is_a_bitmap() -> None:
    even = np.arange(0, SIZE, 2)
    assert encode(even, SIZE) == bitmap(*even)
    assert decode(bitmap(*even), SIZE, "here").tolist() == even.tolist()


@pytest.mark.parametrize(
    "text",
    [
        "0-99999999999999",
        f"0-{'9' * 4000}",
        f"0-{'9' * 5000}",
        "0-100",
        "100",
        "5-2",
        "-1",
        "-5-3",
        "5--3",
        "5-",
        "a",
        "1,a",
        "1,,2",
        "1,",
        "1.0",
        "+1",
        "1_0",
        " 1",
        "٣",
        "3,3",
        "3,2",
        "0-9,5-20",
        "bitmap:",
        "bitmap:zz",
        "bitmap:!!!!",
        "bitmap:é",
        bitmap(1, size=92),
        bitmap(1, size=108),
        bitmap(100, size=104),
    ],
)
def test_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"^here: .*make the plan again$") as caught:
        decode(text, SIZE, "here")
    assert len(str(caught.value)) < 300


@given(st.text("0123456789-,:bitmap=/+A ", max_size=40))
def test_any_text_is_indices_or_refused(text: str) -> None:
    try:
        indices = decode(text, SIZE, "here")
    except PlanError:
        return
    assert np.all(np.diff(indices) > 0)
    assert np.all((indices >= 0) & (indices < SIZE))


def test_repeated_ranges_take_no_memory() -> None:
    size = 100_000
    text = ",".join([f"0-{size - 1}"] * 100)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError):
            decode(text, size, "here")
        assert tracemalloc.get_traced_memory()[1] < 10 * size * 8
    finally:
        tracemalloc.stop()
