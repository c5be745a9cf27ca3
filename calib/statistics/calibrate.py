"""The calibration run: windows through the streamed decoder, sums of squares out."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from calib.estimate import Prediction, WindowLengths, predict
from calib.statistics.resume import ResumeDirectory
from calib.statistics.sums import ChannelSums, cosine_sum, weight_norms
from calib.streaming.batches import LayerHooks, Stream, Tokens
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.hidden_states import HiddenStates, SpilledStates
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.weights import WeightReader
from calib.text.windows import digest
from surgery.errors import StatsError
from surgery.layout.layout import Layout
from surgery.process import Advance, no_advance, peak_rss_bytes
from surgery.stats.channel_stats import AxisSums, ChannelStats, StatsInfo


@dataclass(frozen=True)
class Calibration:
    """A calibration, ready to be run."""

    layout: Layout
    windows: Sequence[np.ndarray]
    """Token ids, one int64 array per window."""
    seq_len: int
    """Tokens of a full window, for the record."""
    bucket_of: np.ndarray
    """int64 ``[V]``: bucket of each token."""
    bucket_edges: Sequence[int]
    """Rarity ranks at which buckets end; the last is V."""
    settings: PassSettings
    vocab_size: int | None = None
    """Rows of the vocabulary that tokenized the text; None is all."""
    output: Path | None = None
    """Where the statistics are written; what a killed run needs to go on lies beside it."""
    resume: bool = False
    asked: Mapping[str, str] = field(default_factory=dict)
    """Options that ``resume`` compares beside what it sees itself."""
    timings: Timings = field(default_factory=Timings)
    """Filled by the run."""

    @property
    def info(self) -> StatsInfo:
        """Where the statistics come from."""
        return StatsInfo(
            fingerprint=self.layout.checkpoint.fingerprint,
            text_digest=digest(self.windows),
            samples=len(self.windows),
            seq_len=self.seq_len,
            tokens=sum(map(len, self.windows)),
            bucket_edges=list(self.bucket_edges),
            dtype=str(self.settings.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
        )

    def prediction(self) -> Prediction:
        """What the run will take."""
        return predict(
            self.layout,
            WindowLengths.of(self.windows),
            self.settings,
            buckets=len(self.bucket_edges),
            journal=self.output is not None,
        )

    def measured(self) -> dict[str, Any]:
        """What the run has taken of memory and time."""
        gpu = self.settings.device.type == "cuda"
        return {
            "peak_memory": peak_rss_bytes(),
            "peak_device": torch.cuda.max_memory_allocated() if gpu else 0,
            "read": self.timings.bytes_read,
            "stages": asdict(self.timings),
        }


def take_statistics(calibration: Calibration, progress: Advance = no_advance) -> ChannelStats:
    """Sum the squared input of every down_proj over the windows (paper eq. 4 and 5), by bucket.

    Args:
        calibration: What is run, and where the statistics go; without an output they are only
            returned.
        progress: Called with the windows that have passed a layer.

    Raises:
        DataError: a token without a row in the embedding.
        CheckpointError: config.json and the tensors do not make a model.
        OutputError: there is an interrupted run, or the one to resume was another.
    """
    made = calibration
    with made.timings.timed("total"):
        if made.output is None:
            return _take(made, None, progress)
        spill = made.settings.spill
        with ResumeDirectory(
            made.output, identity(made), resume=made.resume, spill=spill
        ) as partial:
            stats = None if partial.finished else finished_before(made)
            if stats is None:
                stats = _take(made, partial, progress)
                stats.save(made.output)
            partial.remove()
        return stats


def _take(made: Calibration, partial: ResumeDirectory | None, progress: Advance) -> ChannelStats:
    settings = made.settings
    with WeightReader(made.layout.checkpoint, settings.device, settings.dtype) as reader:
        layers, cosines = _Accumulator(made, reader, partial).layers(progress)
        made.timings.bytes_read = reader.bytes_read
    counts = np.bincount(np.concatenate(made.windows), minlength=made.layout.vocab_size)
    return ChannelStats(made.info, layers, counts, made.bucket_of, cosines)


class _Accumulator:
    """The layers' sums in the making: in memory are those of one, where ``partial`` has them."""

    def __init__(
        self, made: Calibration, reader: WeightReader, partial: ResumeDirectory | None
    ) -> None:
        self._made, self._reader, self._partial = made, reader, partial
        self._buckets = torch.from_numpy(made.bucket_of)
        self._found: list[tuple[dict[str, AxisSums], float]] = []
        self._current: dict[str, ChannelSums] = {}
        self._cosines = 0.0

    def layers(self, progress: Advance) -> tuple[list[dict[str, AxisSums]], np.ndarray]:
        """Compute the layers that are not finished, and return the sums and cosines of all."""
        made, done = self._made, self._partial.finished if self._partial else 0
        progress(done * len(made.windows))
        if done < made.layout.num_hidden_layers:
            self._decoder = StreamedDecoder(made.layout, self._reader, made.settings, made.timings)
            self._states = self._new_states()
            stream = Stream(made.windows, self._states)
            self._decoder.embed([stream], passed=done)
            hooks = LayerHooks(self._watch, self._compare)
            self._decoder.run_layers([stream], hooks, progress=progress, finished=self._finish)
        if self._partial:
            self._partial.settle()
            self._found = [self._partial.sums(layer) for layer in range(self._partial.finished)]
        return [axes for axes, _ in self._found], np.array([cosine for _, cosine in self._found])

    def _watch(self, layer: int, axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
        if not self._current:
            self._current = self._zeros(layer)
        self._current[axis].add(expert, tokens, self._buckets[tokens.ids], act)

    def _compare(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self._cosines += cosine_sum(before, after)

    def _finish(self, layer: int) -> None:
        """Keep what the layer has left, in files where there is a directory for them."""
        sums = self._current or self._zeros(layer)
        with self._made.timings.timed("compute"):
            norms = weight_norms(self._decoder.layer(layer), self._decoder.ffn_modules(layer))
        found = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}
        if self._partial:
            self._partial.add(layer, found, self._cosines, self._states.sync)
            if not self._states.lags:
                self._partial.settle()
        else:
            self._found.append((found, self._cosines))
        self._current, self._cosines = {}, 0.0

    def _zeros(self, layer: int) -> dict[str, ChannelSums]:
        layout, device = self._made.layout, self._reader.device
        count = len(self._made.bucket_edges)
        return {
            axis: ChannelSums(count, experts, layout.channels_of(axis), device)
            for axis, experts in layout.ffn_outputs[layer].items()
        }

    def _new_states(self) -> HiddenStates:
        place, directory = (
            self._made.settings.hidden,
            self._partial.hidden if self._partial else None,
        )
        if place == "file" and directory is not None:
            return SpilledStates(directory)
        states = HiddenStates(directory, self._reader.device if place == "device" else None)
        if self._partial:
            states.settle = self._partial.settle
        return states


def identity(made: Calibration) -> dict[str, str]:
    """What a run and its continuation must have in common, by the name users know."""
    info, settings = made.info, made.settings
    order = made.bucket_of.astype("<i8").tobytes()
    return {
        "model": info.fingerprint,
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
        **made.asked,
    }


def finished_before(made: Calibration) -> ChannelStats | None:
    """What a run has written that was killed just after its last step; None if none was."""
    if made.resume and made.output is not None and made.output.exists():
        with suppress(StatsError):
            found = ChannelStats.load(made.output)
            if found.info == made.info and np.array_equal(found.bucket_of, made.bucket_of):
                return found
    return None
