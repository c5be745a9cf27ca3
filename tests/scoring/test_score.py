"""Scores of models on the same windows, and what of a difference may be chance."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import calib
from calib.scoring.score import LEAST_WINDOWS, Score
from surgery.errors import DataError
from tests.support.command import Run, assert_refused

COUNT = 200


def score_of(bits: np.ndarray, nbytes: int = 1000, digest: str = "text") -> Score:
    return Score(tuple(bits.tolist()), (nbytes,) * len(bits), digest, tokens=9, lossy_windows=0)


@given(st.lists(st.floats(1.0, 1e6), min_size=LEAST_WINDOWS, max_size=30), st.floats(0.5, 2.0))
def test_a_factor_on_every_window_is_no_chance(bits: list[float], factor: float) -> None:
    one = score_of(np.array(bits))
    change = score_of(np.array(bits) * factor).change_from(one)
    assert change.share == pytest.approx(factor - 1, abs=1e-9)
    assert change.margin == pytest.approx(0, abs=1e-9)
    assert one.change_from(one).clear is False


def test_margins_are_those_of_normal_noise() -> None:
    """1.96 standard errors of a mean over windows; √2 of them between two texts."""
    rng = np.random.default_rng(1)
    hard = rng.normal(1000, 200, COUNT)  # what the windows have in common
    before, after = score_of(hard), score_of(hard * 1.05 + rng.normal(0, 20, COUNT))
    error = 1.96 * np.std(hard) / math.sqrt(COUNT) / 1000
    assert before.margin == pytest.approx(math.sqrt(2) * error, rel=0.1)
    change = after.change_from(before)
    noise = np.array(after.window_bits) - hard * (1 + change.share)
    assert change.margin == pytest.approx(1.96 * np.std(noise) / math.sqrt(COUNT) / 1000, rel=0.1)
    assert change.margin is not None
    assert before.margin is not None
    assert change.margin < before.margin / 5
    assert change.clear
    assert after.change_from(before) == change


def test_what_is_not_known_is_not_said() -> None:
    few = score_of(np.ones(LEAST_WINDOWS - 1))
    broken = score_of(np.array([math.nan, *np.ones(COUNT)]))
    for score in (few, broken):
        assert score.margin is None
        assert score.change_from(score).margin is None
        assert score.change_from(score).clear is None
    with pytest.raises(DataError, match="is not the same text for both models"):
        few.change_from(replace(few, text_digest="other"))


def other(llama: Path, folder: Path) -> Path:
    """A copy of the model with fewer channels, that is with other scores."""
    import surgery
    from tests.support.plans import random_plan

    surgery.apply_plan(random_plan(llama, 512, 40), output=folder / "other")
    return folder / "other"


def test_several_models_are_scored_on_the_same_windows(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    smaller = other(llama, tmp_path)
    options = ("--data", text, "--window-bytes", 300, "--samples", 12)
    alone = [json.loads(run("score", m, *options, "--json").stdout) for m in (llama, smaller)]
    both = json.loads(run("score", llama, smaller, *options, "--json").stdout)
    own = {"seconds", "peak_rss_bytes", "change"}
    for one, together in zip(alone, both, strict=True):
        assert {k: v for k, v in one.items() if k not in own} == {
            k: v for k, v in together.items() if k not in own
        }
    assert alone[0]["change"] is None
    scores = [calib.score(m, data=text, window_bytes=300, samples=12) for m in (llama, smaller)]
    change = scores[1].change_from(scores[0])
    assert both[1]["change"] == {"share": change.share, "margin": change.margin}
    assert both[0]["bits_per_byte"] == scores[0].bits_per_byte
    assert len(scores[0].window_bits) == 12

    table = run("score", llama, smaller, llama, *options).stdout.splitlines()
    assert [line.split()[0] for line in table[1:4]] == [str(llama), str(smaller), str(llama)]
    assert table[3].endswith("+0.00%       0.00%  may be chance")
    assert "12 windows, 3,600 bytes" in table[4]
    few = run("score", llama, smaller, *options[:-1], 3).stdout
    assert "±: not known from fewer than 8 windows" in few
    single = run("score", llama, *options).stdout.splitlines()
    assert single[0].startswith(f"{scores[0].bits_per_byte:.4f} ± {scores[0].margin:.4f} bits")


def test_chats_that_become_different_text_are_not_compared(
    tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [Path(shutil.copytree(llama, tmp_path / name)) for name in ("one", "two")]
    for folder in folders:
        template = "{% for m in messages %}" + folder.name + ": {{ m.content }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello. " * 90}]}))

    def work(*_: object, **__: object) -> None:
        pytest.fail("scored a model before the texts were compared")

    monkeypatch.setattr("calib.scoring.score.score_windows", work)
    refused = run("score", *folders, "--data", chats)
    assert_refused(refused, "--data: is not the same text for both models", "chat template")
