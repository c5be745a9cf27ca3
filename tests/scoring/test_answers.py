"""Answers are compared by pairs, and say how much of a difference may be chance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.scoring.answers import Answers, TaskAnswers
from calib.scoring.score import LEAST_WINDOWS
from surgery.errors import DataError


def answers_of(*rights: np.ndarray, digest: str = "items") -> Answers:
    tasks = []
    for number, right in enumerate(rights):
        each = tuple(map(bool, right))
        tasks.append(TaskAnswers(f"t{number}", digest, 0.25, each, each))
    return Answers(tuple(tasks))


@given(st.lists(st.booleans(), min_size=LEAST_WINDOWS, max_size=30))
def test_the_same_answers_are_all_of_them_for_sure(right: list[bool]) -> None:
    answers = answers_of(np.array([True, *right]))
    share = answers.share_of(answers)
    assert share.share == 1
    assert not share.margin
    assert not share.clear


def test_margins_are_those_of_paired_items() -> None:
    """The ± of a difference of shares; two tasks of unlike size count alike in the mean."""
    rng = np.random.default_rng(2)
    before = [rng.random(n) < 0.6 for n in (400, 100)]
    after = [right & (rng.random(len(right)) < 0.8) for right in before]
    first, second = answers_of(*before), answers_of(*after)
    assert second.accuracy == pytest.approx(np.mean([np.mean(right) for right in after]))
    share = second.share_of(first)
    assert share.share == pytest.approx(second.accuracy / first.accuracy)
    variances = []
    for one, two in zip(before, after, strict=True):
        rest = two.astype(float) - share.share * one.astype(float)
        variances.append(np.var(rest) / len(rest) / 4)
    error = 1.96 * math.sqrt(sum(variances)) / first.accuracy
    assert share.margin == pytest.approx(error, rel=0.1)
    assert share.clear
    single = [right.mean() * (1 - right.mean()) / len(right) / 4 for right in before]
    assert first.margin == pytest.approx(1.96 * math.sqrt(sum(single)), rel=0.1)


def test_what_is_not_known_is_not_said() -> None:
    few = answers_of(np.ones(LEAST_WINDOWS - 1))
    assert (few.margin, few.share_of(few).margin, few.share_of(few).clear) == (None, None, None)
    with pytest.raises(DataError, match="are not the same for both models"):
        few.share_of(answers_of(np.ones(LEAST_WINDOWS - 1), digest="other"))
    with pytest.raises(DataError, match="no item that the reference answers right"):
        few.share_of(answers_of(np.zeros(LEAST_WINDOWS - 1)))
    facts = few.facts(answers_of(np.zeros(LEAST_WINDOWS - 1)))
    assert facts["mean"]["share"] is None
    assert facts["mean"]["acc_norm"] == 1
