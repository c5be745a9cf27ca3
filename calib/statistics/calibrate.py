"""The calibration run: take activation statistics of windows in the streamed decoder."""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from calib.estimate import Pace, Prediction, WindowLengths, predict
from calib.statistics.resume import ResumeDirectory
from calib.statistics.sums import ChannelSums, cosine_sum, weight_norms
from calib.streaming.batches import LayerHooks, Routed, Stream, Tokens
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.hidden_states import HiddenStates, SpilledStates
from calib.streaming.layers import not_finite
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.weights import WeightReader
from calib.text.windows import digest
from surgery.errors import StatsError
from surgery.families.schema import EXPERT
from surgery.files.atomic import check_file
from surgery.hub.shards import Shards
from surgery.layout.layout import Layout
from surgery.process import (
    Advance,
    Seconds,
    no_advance,
    peak_rss_bytes,
    say_resumed,
    write_pace,
)
from surgery.stats.channel_stats import AxisSums, ChannelStats, StatsInfo


@dataclass(frozen=True)
class Calibration:
    """A calibration that is ready to run."""

    layout: Layout
    windows: Sequence[np.ndarray]
    """Token ids, one int64 array per window."""
    seq_len: int
    """Tokens of a full window; only recorded in the statistics."""
    bucket_of: np.ndarray
    """int64 ``[V]``: bucket of each token."""
    bucket_edges: Sequence[int]
    """Rarity ranks at which buckets end; the last is V."""
    settings: PassSettings
    vocab_size: int | None = None
    """Rows of the vocabulary that tokenized the text; None is all."""
    output: Path | None = None
    """File for the statistics. The directory to resume a killed run from is beside it."""
    resume: bool = False
    force: bool = False
    """Whether to replace an output that is there."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """Further options that must be the same when a run is resumed."""
    timings: Timings = field(default_factory=Timings)
    """Filled by the run."""

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return sum(map(len, self.windows))

    @property
    def info(self) -> StatsInfo:
        """What the statistics were taken from."""
        return StatsInfo(
            fingerprint=self.layout.checkpoint.fingerprint,
            text_digest=digest(self.windows),
            samples=len(self.windows),
            seq_len=self.seq_len,
            tokens=self.tokens,
            bucket_edges=list(self.bucket_edges),
            dtype=str(self.settings.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            weights=self.layout.checkpoint.weights,
        )

    def prediction(self) -> Prediction:
        """Predict the memory, disk and reads of the run."""
        return predict(
            self.layout,
            WindowLengths.of(self.windows),
            self.settings,
            buckets=len(self.bucket_edges),
            journal=self.output is not None,
        )

    def seconds(self) -> Seconds | None:
        """Estimate the time of the run; None as for ``pace``."""
        pace = self.pace()
        return pace.seconds(self.prediction(), self.tokens) if pace else None

    def pace(self) -> Pace | None:
        """Take a few windows through one layer, to estimate the time of a run; writes nothing.

        None for a model on the hub, whose layers would have to be downloaded for it.
        """
        checkpoint = self.layout.checkpoint
        if Shards.of(checkpoint.path).remote:
            return None
        channels = max(self.layout.channels_of(axis) for axis in self.layout.family.widths)
        settings = replace(self.settings, prefetch=False, hidden="memory", spill=None)
        windows = typical_windows(self.windows, settings.micro_batch_values // channels)
        small = replace(self, windows=windows, settings=settings, output=None, timings=Timings())
        with WeightReader(checkpoint, settings.device, settings.dtype) as reader:
            start, load, compute = _StatsAccumulator(small, reader, None).pace()
        write = write_pace(self.output.parent) if self.output is not None else None
        return Pace(start, load, compute, write, self.layout.num_hidden_layers)

    def measured(self) -> dict[str, Any]:
        """Return the memory, bytes read and time that the run took."""
        gpu = self.settings.device.type == "cuda"
        return {
            "peak_memory": peak_rss_bytes(),
            "peak_device": torch.cuda.max_memory_allocated() if gpu else 0,
            "read": self.timings.bytes_read,
            "stages": asdict(self.timings),
        }


PROBES, PROBE_SECONDS = 5, 4.0
"""Most passes through one layer to estimate a time, and the seconds after which none is begun. The
first one, which is slow, does not count if there are others."""


def typical_windows(windows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Return some ``tokens``, at least one window, of the length that most tokens have."""
    counts = Counter(map(len, windows))
    length = max(counts, key=lambda length: length * counts[length])
    chosen = (window for window in windows if len(window) == length)
    return list(islice(chosen, max(1, tokens // length)))


def take_statistics(calibration: Calibration, progress: Advance = no_advance) -> ChannelStats:
    """Sum the squared input of every down_proj over the windows (paper eq. 4 and 5), by bucket.

    Args:
        calibration: The run. Without an output, the statistics are only returned.
        progress: Called with the windows that have passed a layer.

    Raises:
        DataError: a token without a row in the embedding.
        CheckpointError: config.json and the tensors do not fit together, or a layer gives NaN or
            infinity.
        OutputError: there is an interrupted run, or the run to resume had other options.
    """
    spill = calibration.settings.spill
    with calibration.timings.timed("total"):
        if calibration.output is None:
            with TemporaryDirectory(".hidden", "stats.", spill) if spill else nullcontext() as path:
                return _take(calibration, None, progress, Path(path) if path else None)
        with ResumeDirectory(
            calibration.output, identity(calibration), resume=calibration.resume, spill=spill
        ) as resume_directory:
            done = resume_directory.finished
            stats = None if done else finished_before(calibration)
            if stats is None and not done:
                read = [calibration.layout.checkpoint.path]
                check_file(calibration.output, read, force=calibration.force)
            if calibration.resume:
                depth = calibration.layout.num_hidden_layers
                say_resumed(done if stats is None else depth, depth, "layers")
            if stats is None:
                stats = _take(calibration, resume_directory, progress)
                stats.save(calibration.output)
            resume_directory.remove()
        return stats


def _take(
    calibration: Calibration,
    resume_directory: ResumeDirectory | None,
    progress: Advance,
    hidden: Path | None = None,
) -> ChannelStats:
    """Take the statistics; ``hidden`` is where hidden states are spilled without the directory."""
    settings = calibration.settings
    with WeightReader(calibration.layout.checkpoint, settings.device, settings.dtype) as reader:
        accumulator = _StatsAccumulator(calibration, reader, resume_directory, hidden)
        layers, cosines = accumulator.layers(progress)
        calibration.timings.bytes_read = reader.bytes_read
    counts = np.bincount(
        np.concatenate(calibration.windows), minlength=calibration.layout.vocab_size
    )
    return ChannelStats(calibration.info, layers, counts, calibration.bucket_of, cosines)


class _StatsAccumulator:
    """Adds up the statistics of all layers.

    With a ``resume_directory``, only the sums of one layer are in memory.
    """

    def __init__(
        self,
        calibration: Calibration,
        reader: WeightReader,
        resume_directory: ResumeDirectory | None,
        hidden: Path | None = None,
    ) -> None:
        self._calibration, self._reader = calibration, reader
        self._resume = resume_directory
        self._hidden = resume_directory.hidden if resume_directory else hidden
        self._buckets = torch.from_numpy(calibration.bucket_of)
        self._found: list[tuple[dict[str, AxisSums], float]] = []
        self._current: dict[str, ChannelSums] = {}
        self._cosines = 0.0

    def layers(self, progress: Advance) -> tuple[list[dict[str, AxisSums]], np.ndarray]:
        """Run the layers that are not finished; return the sums and cosines of all layers."""
        calibration = self._calibration
        done = self._resume.finished if self._resume else 0
        progress(done * len(calibration.windows))
        if done < calibration.layout.num_hidden_layers:
            self._decoder = StreamedDecoder(
                calibration.layout, self._reader, calibration.settings, calibration.timings
            )
            self._states = self._new_states()
            stream = Stream(calibration.windows, self._states)
            self._decoder.embed([stream], passed=done)
            hooks = LayerHooks(self._add_channels, self._add_cosines, self._add_outputs)
            self._decoder.run_layers([stream], hooks, progress=progress, finished=self._finish)
        if self._resume:
            self._resume.wait_for_commit()
            self._found = [self._resume.sums(layer) for layer in range(self._resume.finished)]
        return [axes for axes, _ in self._found], np.array([cosine for _, cosine in self._found])

    def pace(self) -> tuple[float, float, Seconds]:
        """Measure one layer in the middle: seconds to start, to load it, and of a token in it."""
        begin, timings = time.perf_counter(), self._calibration.timings
        layout, windows = self._calibration.layout, self._calibration.windows
        decoder = StreamedDecoder(layout, self._reader, self._calibration.settings, timings)
        stream = Stream(windows, HiddenStates())
        decoder.embed([stream])
        start = time.perf_counter() - begin
        index = next(decoder.layers(layout.num_hidden_layers // 2))
        found: list[float] = []
        hooks = LayerHooks(self._add_channels, self._add_cosines)
        while len(found) < PROBES and sum(found) < PROBE_SECONDS:
            begin = time.perf_counter()
            decoder.run(index, stream, hooks)
            found.append(time.perf_counter() - begin)
        paces = [taken / sum(map(len, windows)) for taken in found[1:] or found]
        return start, timings.read + timings.convert, (min(paces), max(paces))

    def _add_channels(
        self, layer: int, axis: str, expert: int, tokens: Tokens, act: torch.Tensor
    ) -> None:
        if not self._current:
            self._current = self._zeros(layer)
        self._current[axis].add(expert, tokens, self._buckets[tokens.ids], act)

    def _add_outputs(self, layer: int, expert: int, tokens: Tokens, routed: Routed) -> None:
        # The expert's activations have come before, so that there are sums.
        self._current[EXPERT].add_outputs(expert, self._buckets[tokens.ids], routed)

    def _add_cosines(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self._cosines += cosine_sum(before, after)

    def _finish(self, layer: int) -> None:
        """Save the layer's sums, in the resume directory if there is one."""
        sums = self._current or self._zeros(layer)
        with self._calibration.timings.timed("compute"):
            norms = weight_norms(self._decoder.layer(layer), self._decoder.ffn_modules(layer))
        found = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}
        if not all(each.finite for each in found.values()):
            layer_module = self._decoder.layer(layer)
            raise not_finite(
                self._calibration.layout, layer, layer_module, self._calibration.settings.dtype
            )
        if self._resume:
            self._resume.add(layer, found, self._cosines, self._states.sync)
            if not self._states.syncs_in_background:
                self._resume.wait_for_commit()
        else:
            self._found.append((found, self._cosines))
        self._current, self._cosines = {}, 0.0

    def _zeros(self, layer: int) -> dict[str, ChannelSums]:
        layout, device = self._calibration.layout, self._reader.device
        count = len(self._calibration.bucket_edges)
        return {
            axis: ChannelSums(
                count, experts, layout.channels_of(axis), device, routed=axis == EXPERT
            )
            for axis, experts in layout.ffn_outputs[layer].items()
        }

    def _new_states(self) -> HiddenStates:
        hidden = self._calibration.settings.hidden
        directory = self._hidden
        if hidden == "file" and directory is not None:
            return SpilledStates(directory)
        states = HiddenStates(directory, self._reader.device if hidden == "device" else None)
        if self._resume:
            states.wait_for_commit = self._resume.wait_for_commit
        return states


def identity(calibration: Calibration) -> dict[str, str]:
    """Return what a run and its continuation must have in common, by the users' names."""
    info, settings = calibration.info, calibration.settings
    order = calibration.bucket_of.astype("<i8").tobytes()
    return {
        "model": info.fingerprint,
        "weights of the model": str(info.weights),
        "text": info.text_digest,
        "`vocab_size`": str(info.vocab_size),
        "`vocab_sizes`": ",".join(map(str, info.bucket_edges)),
        "order of the vocabulary": hashlib.sha256(order).hexdigest(),
        "`dtype`": info.dtype,
        "`device`": settings.device.type,
        "`seq_len`": str(info.seq_len),
        "`spill`": str(settings.spill.absolute() if settings.spill else None),
        "size of micro-batches": str(settings.micro_batch_values),
        "version of torch and transformers": f"{torch.__version__} {transformers.__version__}",
        **calibration.asked,
    }


def finished_before(calibration: Calibration) -> ChannelStats | None:
    """Return the statistics if an earlier run wrote them and was killed before it ended."""
    if calibration.resume and calibration.output is not None and calibration.output.exists():
        with suppress(StatsError):
            found = ChannelStats.load(calibration.output)
            if found.info == calibration.info and np.array_equal(
                found.bucket_of, calibration.bucket_of
            ):
                return found
    return None
