"""What calibrate, score and search take over the bare forward of the same windows, in turns.

python -m tools.bench.forward MODEL TEXT SAMPLES SEQ_LEN WINDOWS CANDIDATES REPEAT
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from calib.scoring.score import score_windows
from calib.statistics import calibrate as calibrate_module
from calib.statistics.calibrate import take_statistics
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import prepare_calibration
from calib.statistics.sums import ChannelSums
from calib.streaming import decoder as decoder_module
from calib.streaming import ends as ends_module
from calib.streaming.batches import micro_batches
from calib.streaming.layers import Layers
from calib.streaming.settings import ComputeOptions, Timings
from calib.study.search import coarse, search_sizes, search_space
from calib.study.study import open_study
from surgery.api import open_layout
from surgery.planning.request import CutRequest, SizeRequest
from surgery.text.documents import Source, TextOptions
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tools.bench.calibrate import _batches

PLACES: dict[str, tuple[Any, str]] = {
    "build the model": (ends_module, "empty_model"),
    "read weights": (Layers, "_read"),
    "load weights": (Layers, "_load"),
    "sums of activations": (ChannelSums, "add"),
    "block influence": (calibrate_module, "cosine_sum"),
    "look for NaN": (decoder_module, "all_finite"),
}
"""What calibrate does beside the forward → the function that does it."""

RATIO = 0.2
"""Of the search."""

Stages = dict[str, Callable[[], object]]


def stages_of(path: str, text: str, samples: int, seq_len: int, windows: int, count: int) -> Stages:
    """Return what is measured, by name; all weights and windows of the forward are in memory."""
    layout, compute = open_layout(path), ComputeOptions("cpu", "float32")
    options = TextOptions((Source(text),), samples, seq_len, windows=windows)
    prepared = prepare_calibration(
        layout, rarity_of(layout), options, compute, CalibrationOptions(output=None)
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    channels = max(layout.channels_of(axis) for axis in layout.family.widths)

    @torch.no_grad()
    def forward() -> None:
        for part in micro_batches(_batches(prepared.windows), channels):
            model.base_model(input_ids=part.ids, use_cache=False)

    def calibrate() -> None:
        take_statistics(replace(prepared, timings=Timings()))

    stages: Stages = {"forward": forward, "calibrate": calibrate}
    if count:
        space = search_space(layout, CutRequest(SizeRequest(ratio=RATIO)))
        space = replace(space, sizes=coarse(space.sizes, most=count), most=count)
        study_text = open_study(layout, space.choice, options, compute).text
        tokenizer = load_tokenizer(layout.checkpoint.path)
        read = [tokenizer.decode(window.tolist()) for window in prepared.windows]
        scored = [*read, *study_text.heldout]
        settings = prepared.settings
        stages["score"] = lambda: score_windows(layout, scored, tokenizer, settings)
        stages["search"] = lambda: search_sizes(
            open_study(layout, space.choice, options, compute), space
        )
    return stages


@contextmanager
def timed_places(taken: dict[str, float]) -> Iterator[None]:
    """Add to ``taken`` the CPU time of each of ``PLACES`` until the block ends."""

    def timed(name: str, inner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*arguments)
            finally:
                taken[name] += time.thread_time() - start

        return call

    own = {name: getattr(place, attribute) for name, (place, attribute) in PLACES.items()}
    for name, (place, attribute) in PLACES.items():
        setattr(place, attribute, timed(name, own[name]))
    try:
        yield
    finally:
        for name, (place, attribute) in PLACES.items():
            setattr(place, attribute, own[name])


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time that ``run`` takes in all threads of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(stages: Stages, repeat: int) -> dict[str, Any]:
    """Run all stages in turns, once to warm up; return medians of CPU seconds, and their ratios."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    parts: list[dict[str, float]] = []
    for number in range(repeat + 1):
        for name, run in stages.items():
            taken = dict.fromkeys(PLACES, 0.0)
            with timed_places(taken):
                seconds = cpu_seconds(run)
            if number:
                times[name].append(seconds)
            if number and name == "calibrate":
                parts.append(taken)
    facts: dict[str, Any] = {
        name: {"user_seconds": median(found), "least_seconds": min(found)}
        for name, found in times.items()
    }
    pairs = (("calibrate", "forward"), ("search", "score"))
    for above, below in pairs:
        if above in times:
            both = zip(times[above], times[below], strict=True)
            facts[f"{above}_over_{below}"] = median(one / other for one, other in both)
    for name in PLACES:
        found = [part[name] / time for part, time in zip(parts, times["forward"], strict=True)]
        facts[f"{name}, of a forward"] = median(found)
    return facts


def main(arguments: Sequence[str]) -> None:
    """Measure on one thread and print JSON."""
    torch.set_num_threads(1)
    path, text, *numbers = arguments
    samples, seq_len, windows, count, repeat = map(int, numbers)
    stages = stages_of(path, text, samples, seq_len, windows, count)
    print(json.dumps(measured(stages, repeat)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    main(sys.argv[1:])
