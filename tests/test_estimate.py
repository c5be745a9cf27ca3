"""Predictions from headers, and caps that are kept or refused."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.estimate import MB, Pace, Prediction, WindowLengths, predict, within_caps
from calib.statistics.calibrate import typical_windows
from calib.streaming.settings import ComputeOptions, PassSettings
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.process import SLACK, moved_bytes, spoken, spoken_range
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of
from tools.published import MIXTURES, PUBLISHED
from tools.shapes import write_headers_only

TEXT = WindowLengths.full(4, 256, 128_256)
CPU = torch.device("cpu")
SETTINGS = PassSettings(CPU, torch.float32)
predicted = partial(predict, buckets=5, journal=True)
capped = partial(within_caps, buckets=5, journal=True)


def shape(path: Path, name: str, layers: int, **changes: Any) -> Layout:
    config = (PUBLISHED | MIXTURES)[name] | {"num_hidden_layers": layers} | changes
    return layout_of(write_headers_only(path, config))


@pytest.mark.parametrize(
    ("name", "dtype", "measured"),
    [
        ("Llama-3.1-8B", torch.float32, 2312),
        ("Llama-3.1-70B", torch.float32, 7563),
        ("Qwen3-30B-A3B", torch.float32, 4234),
        ("Qwen3-30B-A3B", torch.bfloat16, 2596),
    ],
)
def test_predictions_are_near_what_was_measured(
    tmp_path: Path, name: str, dtype: torch.dtype, measured: int
) -> None:
    """Peaks in MB of ``calibrate --json`` on random checkpoints of two layers, 4 × 256 tokens."""
    settings = PassSettings(CPU, dtype)
    made = predicted(shape(tmp_path, name, 2), TEXT, settings)
    assert made.peak_memory / MB == pytest.approx(measured, rel=0.2)


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    two, four = (
        predicted(shape(tmp_path / str(n), "Llama-3.1-70B", n), TEXT, SETTINGS) for n in (2, 4)
    )
    assert two.peak_memory == four.peak_memory
    assert four.read > 1.7 * two.read


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_bytes_read_are_predicted_exactly(tmp_path: Path, text: Path, run: Run, key: str) -> None:
    path = tiny.save(tmp_path / "model", key)
    options = ("--data", text, "--seq-len", 64, "--samples", 8, "-o", tmp_path / "stats")
    facts = json.loads(run("calibrate", path, *options, "--json").stdout)
    assert facts["measured"]["read"] == facts["predicted"]["read"]
    assert facts["measured"]["peak_memory"] > 0
    stages = facts["measured"]["stages"]
    assert set(stages) >= {"read", "wait", "convert", "compute", "write", "total"}
    parts = sum(stages[name] for name in ("wait", "convert", "compute", "write"))
    assert parts <= stages["total"] <= facts["measured"]["seconds"]
    before = sorted(tmp_path.rglob("*"))
    dry = run("calibrate", path, *options[:-1], tmp_path / "none", "--dry-run", "--json")
    dry_facts = json.loads(dry.stdout)
    low, high = dry_facts.pop("seconds")
    assert 0 < low < high
    assert dry_facts == facts["predicted"]
    table = run("calibrate", path, *options[:-1], tmp_path / "none", "--dry-run").stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert table.startswith("text: 8 windows, 512 tokens\nnote: ")
    words = ("next layer", "read while this one computes", "time  ", " s\n")
    assert all(word in table for word in words)


@pytest.mark.parametrize("spill", [False, True])
def test_bytes_written_are_those_of_hidden_states_and_sums(
    tmp_path: Path, text: Path, run: Run, spill: bool
) -> None:
    path = tiny.save(tmp_path / "model")
    options = ("--data", text, "--seq-len", 64, "--samples", 8, "-o", tmp_path / "stats")
    more = ("--spill", tmp_path) if spill else ()
    facts = json.loads(run("calibrate", path, *options, *more, "--dry-run", "--json").stdout)
    states = facts["memory"].get("hidden states", 8 * 64 * 32 * 4)
    assert states == 8 * 64 * 32 * 4
    sums = (facts["disk"] - 2 * states) // 2
    assert facts["written"] == tiny.LAYERS * states + 2 * sums
    before = moved_bytes()
    assert run("calibrate", path, *options, *more).exit_code == 0
    after = moved_bytes()
    if before and after and not spill:  # what is written to a mapping is not counted
        written = after["written_bytes"] - before["written_bytes"]
        assert 0 < written - facts["written"] < 30_000  # headers, counts of tokens and the journal


def made_of(**parts: int) -> Prediction:
    return Prediction({}, {}, disk=0, read=0, written=parts.get("written", 0), to_device=0)


def test_an_estimated_time_hides_what_can_be_hidden() -> None:
    """Reading and writing while computing at least, one after the other at most; and slack."""
    pace = Pace(start=1.0, load=0.5, compute=(0.001, 0.002), write=(1e-9, 3e-9), layers=10)
    low, high = pace.seconds(made_of(written=10**9), tokens=1000)
    assert low == pytest.approx((1 - SLACK) * (1 + 10))
    assert high == pytest.approx((1 + SLACK) * (1 + 20 + 5 + 3))
    low, _ = replace(pace, load=2.0).seconds(made_of(), tokens=1000)
    assert low == pytest.approx((1 - SLACK) * (1 + 20))
    low, _ = pace.seconds(made_of(written=10**11), tokens=1000)
    assert low == pytest.approx((1 - SLACK) * (1 + 100))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.31, 0.99), "0.31 to 0.99 s"),
        ((0.02, 0.021), "0.02 to 0.021 s"),
        ((7.1, 52.4), "7.1 to 52 s"),
        ((45.0, 150.0), "0.75 to 2.5 min"),
        ((600.0, 5900.0), "10 to 98 min"),
        ((7200.0, 7201.0), "2 h"),
        ((3600.0, 360_000.0), "1 to 100 h"),
    ],
)
def test_estimated_times_as_people_say_them(seconds: tuple[float, float], text: str) -> None:
    assert spoken_range(seconds) == text


def test_times_as_people_say_them() -> None:
    times = (0.04, 9.96, 59.4, 59.6, 3599.4, 3599.6, 360_000)
    said = ["0.0 s", "10 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "100 h 0 min"]
    assert [spoken(seconds) for seconds in times] == said


def test_the_usual_windows_are_timed() -> None:
    windows = [np.arange(n) for n in (7, 64, 9, 64, 64)]
    assert [len(window) for window in typical_windows(windows, 130)] == [64, 64]
    assert [len(window) for window in typical_windows(windows, 1)] == [64]


def test_caps_choose_a_file_then_fewer_windows_then_no_next_layer(tmp_path: Path) -> None:
    layout = shape(tmp_path, "Llama-3.2-1B", 2)
    text = WindowLengths({512: 256}, 1000)
    chosen = []
    cap = predicted(layout, text, SETTINGS).peak_memory
    while True:
        try:
            settings = capped(layout, text, SETTINGS, ComputeOptions(max_memory=cap))
        except BudgetError as error:
            refused = str(error)
            break
        made = predicted(layout, text, settings)
        assert made.peak_memory <= cap
        chosen.append((settings.hidden, settings.prefetch))
        cap = made.peak_memory - 1
    assert f"at least {(cap + 1) / MB + 1:,.0f}MB" in refused
    assert chosen[0] == ("memory", True)
    assert chosen[1] == ("file", True)
    assert chosen[-1] == ("file", False)


def test_hidden_states_are_on_the_device_while_they_fit(tmp_path: Path) -> None:
    layout = shape(tmp_path, "Llama-3.2-1B", 2)
    settings = PassSettings(torch.device("cuda"), torch.bfloat16)
    text = WindowLengths.full(256, 2048, 128_256)
    assert capped(layout, text, settings, ComputeOptions()).hidden == "device"
    least = predicted(layout, text, capped(layout, text, settings, ComputeOptions())).peak_device
    smaller = capped(layout, text, settings, ComputeOptions(max_gpu_memory=least - 1))
    assert smaller.hidden == "memory"
    with pytest.raises(
        BudgetError, match="`max_gpu_memory` 1MB: cannot be kept: expected at least"
    ):
        capped(layout, text, settings, ComputeOptions(max_gpu_memory=MB))


def test_a_cap_that_cannot_be_kept_is_refused_before_the_run(
    tmp_path: Path, llama: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "stats"
    options = ("--data", text, "--seq-len", 64, "-o", out, "--max-memory")
    result = run("calibrate", llama, *options, "100MB")
    assert result.exit_code == 2
    assert "--max-memory 100MB: cannot be kept: expected at least" in result.output
    assert not list(tmp_path.iterdir())
    for wrong in ("much", "-3GB", "1e9", "1TB"):
        assert "is no size such as 8GB" in run("calibrate", llama, *options, wrong).output
    assert run("calibrate", llama, *options, "8 GB").exit_code == 0


@pytest.mark.parametrize(
    ("options", "fix"),
    [((), "fewer or shorter windows"), (("--repair", "least-squares"), "leave out --repair")],
)
def test_prune_keeps_a_cap_or_refuses_before_any_work(
    llama: Path, text: Path, tmp_path: Path, run: Run, options: tuple[str, ...], fix: str
) -> None:
    sizes = ("--ratio", 0.2, "--multiple-of", 8, *options)
    where = ("--data", text, "--samples", 8, "--seq-len", 64, "-o", tmp_path / "out")
    refused = run("prune", llama, *sizes, *where, "--max-memory", "100MB")
    assert_refused(refused, "--max-memory 100MB: cannot be kept: expected at least", fix)
    assert not list(tmp_path.iterdir())
    done = run("prune", llama, *sizes, *where, "--max-memory", "8GB", "--spill", tmp_path)
    assert done.exit_code == 0, done.output
