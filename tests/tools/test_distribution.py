"""Figures 1, 4 and 5 of the paper: shares that add up, and vocabulary that shrinks with size."""

from pathlib import Path

import pytest

from tools.distribution import FIGURES, PARTS, draw, shares

EXPECTED = {"0.5B": 494e6, "1.5B": 1544e6, "70B": 70.6e9, "270M": 268e6, "1B": 1e9}


@pytest.mark.parametrize("title", FIGURES)
def test_the_vocabulary_has_a_smaller_share_of_a_larger_model(tmp_path: Path, title: str) -> None:
    sizes = [*FIGURES[title]][:2] + [*FIGURES[title]][-1:]
    found = {size: shares(FIGURES[title][size], tmp_path / size) for size in sizes}
    for size, each in found.items():
        assert sum(each[part] for part in PARTS) == pytest.approx(1)
        if size in EXPECTED and title != "Figure 4: Llama 3":
            assert each["parameters"] == pytest.approx(EXPECTED[size], rel=0.01)
    vocabulary = [each["vocabulary"] for each in found.values()]
    assert vocabulary == sorted(vocabulary, reverse=True)
    draw({title: found, "again": found}, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 5000
