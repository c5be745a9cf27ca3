"""The few lines that differ between devices, as far as a machine without them can test."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.statistics.sums import FEW_TOKENS, ChannelSums
from calib.streaming.batches import Tokens
from calib.streaming.weights import Transfer
from tests.support import tiny
from tests.support.calibration import take_stats
from tests.support.command import Run

CPU = torch.device("cpu")
NORMS = torch.zeros(1, 1, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    scale=st.integers(-12, 12),
    pieces=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_compensated_sums_keep_the_error_they_state(
    tokens: int, scale: int, pieces: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    act = torch.randn(tokens, 3, generator=generator) * 2.0**scale
    act[::7] *= 1000  # attention sinks
    buckets = torch.randint(0, 2, (tokens,), generator=generator)
    exact, found = (ChannelSums(2, 1, 3, CPU, compensated=c) for c in (False, True))
    for sums in (exact, found):
        for part in torch.arange(tokens).chunk(pieces):
            group = Tokens(part, part % 3, 3, last=int(part[-1]) == tokens - 1)
            sums.add(0, group, buckets[part], act[part])
    bound = (FEW_TOKENS + 4) * 2.0**-24
    for name in ("sum_sq", "sum_abs", "sum_l2"):
        expected, close = (getattr(sums.numbers(NORMS), name) for sums in (exact, found))
        assert close.dtype == np.float64
        assert np.all(np.abs(close - expected) <= bound * expected)


def test_many_tokens_are_added_without_losing_the_late_ones() -> None:
    """Plain float32 stops growing at 2²⁴ times a term."""
    sums = ChannelSums(1, 1, 1, CPU, compensated=True)
    one, many = (torch.zeros(size, dtype=torch.int64) for size in (1, 4096))
    sums.add(0, Tokens(one, one, 1, last=False), one, torch.full((1, 1), 2.0**13))
    for number in range(8):
        sums.add(0, Tokens(many, many, 1, last=number == 7), many, torch.ones(4096, 1))
    expected = 2**26 + 8 * 4096
    assert sums.numbers(NORMS).sum_sq.item() == expected
    assert sums.numbers(NORMS).sum_l2.item() == pytest.approx(expected**0.5, rel=2.0**-24)


class Stream:
    """Replaces a CUDA stream and logs its calls."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append("synchronize")


def test_weights_are_copied_on_a_stream_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of steps, not CUDA itself: copy on the stream, wait for it, record its use."""
    path = tiny.save(tmp_path / "model", "qwen3_moe")
    expected = take_stats(path).layers
    log: list[str] = []

    @contextmanager
    def entered(_: object) -> Any:
        log.append("enter")
        yield
        log.append("leave")

    def stubbed(self: Transfer, device: torch.device) -> None:
        self._device, self._stream = device, Stream(log)

    monkeypatch.setattr(Transfer, "__init__", stubbed)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "computing")
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(stream), raising=False
    )
    found = take_stats(path).layers
    steps = [step for step in log if step != "computing"]
    assert steps == ["enter", "leave", "synchronize"] * tiny.LAYERS
    assert log.count("computing") > len(steps)
    for old, new in zip(expected, found, strict=True):
        for axis in old:
            assert np.array_equal(old[axis].sum_sq, new[axis].sum_sq)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_unavailable_device_is_refused(
    llama: Path, text: Path, run: Run, device: str, tmp_path: Path
) -> None:
    if getattr(torch, device).is_available() if device == "cuda" else mps_is_available():
        pytest.skip("it is available")
    result = run("calibrate", llama, "--data", text, "--device", device, "-o", tmp_path / "s")
    assert result.exit_code == 2
    assert f"--device {device}: is not available" in result.output


def mps_is_available() -> bool:
    return torch.backends.mps.is_available()


def test_sums_are_float64_unless_there_is_none() -> None:
    assert ChannelSums(1, 1, 2, CPU).sum_sq.total.dtype == torch.float64
    assert ChannelSums(1, 1, 2, CPU, compensated=True).sum_sq.total.dtype == torch.float32
