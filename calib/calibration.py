"""A calibration, prepared: windows cut, settings chosen, its cost known before it is run."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from calib.calibrate import Run, calibrate
from calib.device import choose_device, choose_dtype
from calib.limits import MICRO_BATCH_VALUES, Limits
from surgery.caps import within_caps
from surgery.layout import Layout
from surgery.prediction import Prediction, Settings, Text, predict
from surgery.process import peak_rss_bytes
from surgery.resources import Resources, Running
from surgery.stats import ChannelStats


@dataclass(frozen=True)
class Calibration:
    """All that a run needs."""

    layout: Layout
    windows: Sequence[np.ndarray]
    seq_len: int
    bucket_of: np.ndarray
    edges: list[int]
    vocab_size: int | None
    """Rows of the vocabulary that cut the text; None is all."""
    device: torch.device
    dtype: torch.dtype
    settings: Settings
    prediction: Prediction
    run: Run

    def take(self, progress: Callable[[int], object]) -> ChannelStats:
        """Run it."""
        with self.run.stages.timed("total"):
            return calibrate(
                self.layout,
                self.windows,
                self.bucket_of,
                self.edges,
                seq_len=self.seq_len,
                device=self.device,
                dtype=self.dtype,
                vocab_size=self.vocab_size,
                progress=progress,
                run=self.run,
            )

    def measured(self, start: float) -> dict[str, Any]:
        """What the run took, beside what was predicted."""
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {
            "settings": asdict(self.settings),
            "predicted": self.prediction.facts(),
            "measured": {
                "peak_memory": peak_rss_bytes(),
                "peak_device": gpu,
                "read": self.run.stages.bytes_read,
                "seconds": time.perf_counter() - start,
                "stages": asdict(self.run.stages),
            },
        }


def prepare(
    layout: Layout,
    windows: Sequence[np.ndarray],
    buckets: tuple[np.ndarray, list[int]],
    *,
    vocab_size: int | None,
    seq_len: int,
    device: str,
    dtype: str,
    asked: dict[str, str],
    running: Running | None,
) -> Calibration:
    """Choose device, dtype and settings.

    Raises:
        BudgetError: a cap on memory cannot be kept.
    """
    where = choose_device(device)
    computed = choose_dtype(dtype, layout.checkpoint, where)
    resources = running.resources if running else Resources()
    text = text_of(windows)
    settings = within_caps(
        layout,
        text,
        Settings(
            itemsize=computed.itemsize,
            buckets=len(buckets[1]),
            device=where.type,
            micro_batch_values=MICRO_BATCH_VALUES,
            journal=running is not None,
        ),
        resources,
    )
    limits = Limits(settings.micro_batch_values, settings.prefetch, settings.hidden)
    run = Run(
        limits,
        running.output if running else None,
        running.resume if running else False,
        resources.spill,
        asked,
    )
    made = predict(layout, text, settings)
    return Calibration(
        layout, windows, seq_len, *buckets, vocab_size, where, computed, settings, made, run
    )


def text_of(windows: Sequence[np.ndarray]) -> Text:
    """What a prediction must know of ``windows``."""
    rows = len(np.unique(np.concatenate(windows))) if len(windows) else 0
    return Text(Counter(map(len, windows)), rows)
