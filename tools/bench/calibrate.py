"""Children of the calibration benchmarks: all take the same statistics and print their figures.

python -m tools.bench.calibrate streamed|full|shares MODEL TEXT SAMPLES SEQ_LEN STATS
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calib.statistics import calibrate as calib_calibrate
from calib.statistics import prepare as calib_calibration
from calib.statistics.options import CalibrationOptions
from calib.statistics.prepare import prepare_calibration, run_calibration
from calib.statistics.sums import ChannelSums
from calib.streaming.batches import Batch, Tokens, micro_batches
from calib.streaming.ffn import pieces
from calib.streaming.hidden_states import HiddenStates
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import WeightReader
from calib.text.windows import token_windows
from surgery.api import open_layout
from surgery.families.schema import FFN
from surgery.layout.layout import Layout
from surgery.stats.channel_stats import PARTS, ChannelStats
from surgery.text.documents import Source, TextOptions, read_documents
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of

SLACK_BYTES = 400_000_000
"""What the bound allows beside weights and hidden states: the interpreter, torch, activations."""

Figures = dict[str, Any]


def streamed(model: str, text: str, samples: int, seq_len: int, stats: Path) -> Figures:
    """Calibrate as the command does and save the statistics; count bytes and seconds inside."""
    layout = open_layout(model)
    readers: list[WeightReader] = []
    seconds: list[float] = []
    inner = calib_calibration.take_statistics

    class CountedReader(WeightReader):
        def __enter__(self) -> "CountedReader":
            readers.append(self)
            return self

    def timed(*arguments: Any, **options: Any) -> ChannelStats:
        start = time.perf_counter()
        result = inner(*arguments, **options)
        seconds.append(time.perf_counter() - start)
        return result

    calib_calibrate.WeightReader = CountedReader  # type: ignore[misc]
    calib_calibration.take_statistics = timed
    sampled = TextOptions((Source(text),), samples, seq_len)
    compute, options = ComputeOptions("cpu", "float32"), CalibrationOptions(output=stats)
    prepared = prepare_calibration(layout, rarity_of(layout), sampled, compute, options)
    result = run_calibration(prepared, compute, options)
    return {
        "pass_seconds": seconds[0],
        "bytes_read": readers[0].bytes_read,
        **_sizes(layout, result),
    }


def shares(model: str, text: str, samples: int, seq_len: int, stats: Path) -> Figures:
    """Calibrate as the command does; say how much of the pass its statistics take."""
    accumulator = calib_calibrate._StatsAccumulator
    places: list[tuple[Any, str]] = [
        (accumulator, "_add_channels"),
        (accumulator, "_add_outputs"),
        (accumulator, "_add_cosines"),
        (calib_calibrate, "weight_norms"),
    ]
    taken = {name: 0.0 for _, name in places}

    def timed(name: str, inner: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments)
            taken[name] += time.perf_counter() - start
            return result

        return call

    for place, name in places:
        setattr(place, name, timed(name, getattr(place, name)))
    total = streamed(model, text, samples, seq_len, stats)["pass_seconds"]
    return {
        "pass_seconds": total,
        "statistics_over_pass": sum(taken.values()) / total,
        **{f"{name.strip('_')}_over_pass": seconds / total for name, seconds in taken.items()},
    }


def full(model: str, text: str, samples: int, seq_len: int, stats: Path) -> Figures:
    """Load the whole model, take the statistics of ``stats`` with hooks, compare the two."""
    layout = open_layout(model)
    expected = ChannelStats.load(stats)
    tokenizer = load_tokenizer(layout.checkpoint.path)
    windows = token_windows(read_documents(text), tokenizer, samples, seq_len)
    start = time.perf_counter()
    decoder = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).model
    loaded = time.perf_counter()
    sums = _hooked_pass(decoder, windows, expected, layout.channels_of(FFN))
    done = time.perf_counter()
    pairs = [
        (getattr(own.numbers(torch.empty(0)), part), getattr(axes[FFN], part))
        for own, axes in zip(sums, expected.layers, strict=True)
        for part in PARTS
        if part != "weight_norm"
    ]
    return {
        "load_seconds": loaded - start,
        "pass_seconds": done - loaded,
        "identical": all(np.array_equal(a, b) for a, b in pairs),
        "largest_difference": max(float(np.max(np.abs(a - b)) / np.max(b)) for a, b in pairs),
        "finite": bool(all(np.isfinite(a).all() for a, _ in pairs)),
    }


@torch.no_grad()
def _hooked_pass(
    decoder: nn.Module, windows: Sequence[np.ndarray], like: ChannelStats, channels: int
) -> list[ChannelSums]:
    """Run ``decoder`` over the micro-batches that streaming makes, a pre-hook on each down_proj."""
    count = len(like.info.bucket_edges)
    buckets = torch.from_numpy(like.bucket_of)
    sums: list[ChannelSums] = []
    current: list[torch.Tensor] = []

    def watch(layer: int, act: torch.Tensor) -> None:
        for tokens in pieces(*act.shape):
            shown = Tokens.of(current[-1], tokens)
            sums[layer].add(0, shown, buckets[shown.ids], act[:, tokens].flatten(0, -2))

    for number, layer in enumerate(decoder.get_submodule("layers").children()):
        sums.append(ChannelSums(count, 1, channels, torch.device("cpu")))
        layer.get_submodule("mlp.down_proj").register_forward_pre_hook(
            lambda module, inputs, number=number: watch(number, inputs[0])
        )
    for part in micro_batches(_batches(windows), channels):
        current.append(part.ids)
        decoder(input_ids=part.ids, use_cache=False)
    return sums


def _batches(windows: Sequence[np.ndarray]) -> list[Batch]:
    """Group windows by length as ``StreamedDecoder.embed`` does, without hidden states."""
    return [
        Batch(torch.from_numpy(np.stack([w for w in windows if len(w) == n])), HiddenStates(), 0)
        for n in dict.fromkeys(map(len, windows))
    ]


def _sizes(layout: Layout, stats: ChannelStats) -> Figures:
    """What the bound on anonymous memory and the bytes to read are made of."""
    layers = [list(tensors.values()) for tensors in layout.of_layer]
    largest = max(sum(tensor.parameters for tensor in layer) for layer in layers)
    embedding = layout.by_name[layout.family.embedding]
    used, hidden_size = int(np.count_nonzero(stats.token_counts)), embedding.shape[1]
    computed = 4
    parts = {
        "two_layers_bytes": 2 * largest * computed,
        "hidden_bytes": stats.info.tokens * hidden_size * computed,
        "embedding_bytes": used * hidden_size * computed,
        "slack_bytes": SLACK_BYTES,
    }
    return {
        "windows": stats.info.samples,
        "tokens": stats.info.tokens,
        "threads": torch.get_num_threads(),
        "file_bytes": layout.checkpoint.nbytes,
        "needed_bytes": sum(tensor.nbytes for layer in layers for tensor in layer)
        + used * hidden_size * embedding.itemsize,
        "bound_bytes": sum(parts.values()),
        "bound": parts,
    }


if __name__ == "__main__":
    mode, model, text, samples, seq_len, stats = sys.argv[1:]
    run = {"streamed": streamed, "full": full, "shares": shares}[mode]
    print(json.dumps(run(model, text, int(samples), int(seq_len), Path(stats))))
