"""Predictions from headers, and caps that are kept or refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.estimate import MB, WindowLengths, predict, within_caps
from calib.streaming.settings import ComputeOptions, PassSettings
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
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
    dry = run("calibrate", path, *options[:-1], tmp_path / "none", "--dry-run", "--json")
    assert json.loads(dry.stdout) == facts["predicted"]
    assert not (tmp_path / "none").exists()
    table = run("calibrate", path, *options[:-1], tmp_path / "none", "--dry-run").output
    assert "peak memory" in table


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
