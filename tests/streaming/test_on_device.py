"""What runs on a card, on each device at hand: the same tests for the CPU and for CUDA."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import calib
import surgery
from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import PassSettings
from surgery.stats.channel_stats import ChannelStats
from surgery.vocabulary.order import rarity_of
from tests.support import fp8, quantized, tiny
from tests.support.calibration import CPU, EDGES, SEQ_LEN, sample_windows
from tests.support.plans import layout_of, random_plan

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""By dtype: how far a sum of squared activations may be from another, in parts of the largest of
its layer. A unit in the last place of bfloat16 is 0.4 %, and errors of some layers add up."""


def statistics(path: Path, settings: PassSettings) -> ChannelStats:
    layout = layout_of(path)
    buckets, windows = rarity_of(layout).buckets(EDGES), sample_windows(path)
    return take_statistics(Calibration(layout, windows, SEQ_LEN, buckets, EDGES, settings))


def sums(stats: ChannelStats) -> list[np.ndarray]:
    """Σ act² of each layer and channel axis."""
    return [axes[axis].sum_sq.sum(axis=0) for axes in stats.layers for axis in sorted(axes)]


def assert_near(found: list[np.ndarray], expected: list[np.ndarray], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= bound * np.abs(other).max()


@torch.no_grad()
def hooked_sums(path: Path, device: torch.device, dtype: torch.dtype) -> list[np.ndarray]:
    """The same sums by hooks on the whole model, loaded by transformers on the device."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval()
    layers = model.model.layers
    found = [np.zeros((1, tiny.INTERMEDIATE_SIZE)) for _ in layers]

    def add(index: int, act: torch.Tensor) -> None:
        found[index] += act.double().pow(2).flatten(0, -2).sum(dim=0).cpu().numpy()

    for index, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, n=index: add(n, args[0]))
    for window in sample_windows(path):
        model(torch.from_numpy(window)[None].to(device))
    return found


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("hidden", ["memory", "device"])
def test_streamed_statistics_equal_hooks_on_a_full_load(
    tmp_path: Path, device: torch.device, dtype: torch.dtype, hidden: str
) -> None:
    path = tiny.save(tmp_path / "model", "llama", dtype=dtype)
    found = sums(statistics(path, PassSettings(device, dtype, hidden=hidden)))
    assert_near(found, hooked_sums(path, device, dtype), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_device_agrees_on_the_statistics(
    tmp_path: Path, device: torch.device, dtype: torch.dtype
) -> None:
    path = tiny.save(tmp_path / "model", "qwen3", dtype=dtype)
    found = statistics(path, PassSettings(device, dtype))
    expected = statistics(path, PassSettings(CPU, torch.float32))
    assert_near(sums(found), sums(expected), BOUNDS[dtype])
    assert np.array_equal(found.token_counts, expected.token_counts)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantized_weights_are_the_same_numbers_on_every_device(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    if kind == "fp8":
        path = fp8.save(tmp_path / "model", "llama")
    else:
        path = quantized.save_mxfp4(tmp_path / "model")
    settings = PassSettings(device, torch.float32)
    plain = (fp8 if kind == "fp8" else quantized).plain(path, tmp_path / "plain")
    expected = sums(statistics(plain, replace(settings, device=CPU)))
    assert_near(sums(statistics(path, settings)), expected, 0.02 if kind == "fp8" else 1e-4)


def test_scores_and_logits_are_the_same_on_every_device(
    tmp_path: Path, device: torch.device, llama: Path, text: Path
) -> None:
    one, other = (
        calib.score(llama, data=text, samples=4, window_bytes=300, device=each)
        for each in (device.type, "cpu")
    )
    assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-5)
    plan = random_plan(llama, 512, 40)
    surgery.apply_plan(plan, output=tmp_path / "out")
    checked = calib.compare_logits(tmp_path / "out", plan=plan, source=llama, device=device.type)
    assert checked.ok
