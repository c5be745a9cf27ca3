"""The calibration run: windows through the streamed decoder, sums of squares out."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from calib.batches import Stream
from calib.corpus import digest
from calib.decoder import StreamedDecoder
from calib.influence import cosine_sum
from calib.limits import Limits
from calib.norms import weight_norms
from calib.partial import Partial
from calib.stages import Stages
from calib.states import HiddenStates, SpilledStates
from calib.sums import ChannelSums
from calib.tokens import Tokens
from calib.weights import WeightReader
from surgery.errors import StatsError
from surgery.layout import Layout
from surgery.stats import AxisSums, ChannelStats, StatsInfo


@dataclass(frozen=True)
class Run:
    """How a calibration is run; what of it may change a sum's last bits is in ``identity``."""

    limits: Limits = field(default_factory=Limits)
    output: Path | None = None
    """Where the statistics are written; what a killed run needs to go on lies beside it."""
    resume: bool = False
    spill: Path | None = None
    """Where hidden states live that are in a file; else beside ``output``."""
    asked: dict[str, str] = field(default_factory=dict)
    """Options that ``resume`` compares beside what it sees itself."""
    stages: Stages = field(default_factory=Stages)
    """Filled by the run."""


def calibrate(
    layout: Layout,
    windows: Sequence[np.ndarray],
    bucket_of: np.ndarray,
    bucket_edges: Sequence[int],
    *,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    progress: Callable[[int], object] = lambda windows: None,
    run: Run | None = None,
) -> ChannelStats:
    """Sum the squared input of every down_proj over ``windows`` (paper eq. 4 and 5), by bucket.

    Args:
        layout: The model.
        windows: Token ids, one array per window.
        bucket_of: int64 ``[V]``: bucket of each token.
        bucket_edges: Rarity ranks at which buckets end; the last is V.
        seq_len: Tokens of a full window, for the record.
        device: Where the layers compute.
        dtype: What they compute in; for the sums' own see ``ChannelSums``.
        vocab_size: Rows of the vocabulary that cut the text, for the record; None is all.
        progress: Called with the windows that have passed a layer.
        run: Limits, and where the statistics go; without it they are only returned.

    Raises:
        DataError: a token without a row in the embedding.
        CheckpointError: config.json and the tensors do not make a model.
        OutputError: there is an interrupted run, or the one to resume was another.
    """
    run = run or Run()
    info = StatsInfo(
        fingerprint=layout.checkpoint.fingerprint,
        text_digest=digest(windows),
        samples=len(windows),
        seq_len=seq_len,
        tokens=sum(map(len, windows)),
        bucket_edges=list(bucket_edges),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=vocab_size,
    )

    def take(partial: Partial | None) -> ChannelStats:
        with WeightReader(layout.checkpoint, device, dtype) as reader:
            buckets = torch.from_numpy(bucket_of)
            taking = _Taking(layout, buckets, len(bucket_edges), reader, run, partial)
            layers, cosines = taking.layers(windows, progress)
            run.stages.bytes_read = reader.bytes_read
        counts = np.bincount(np.concatenate(windows), minlength=layout.vocab_size)
        return ChannelStats(info, layers, counts, bucket_of, cosines)

    if run.output is None:
        return take(None)
    asked = identity(info, bucket_of, device, run)
    with Partial(run.output, asked, resume=run.resume, spill=run.spill) as partial:
        stats = None if partial.finished else finished_before(run, info, bucket_of)
        if stats is None:
            stats = take(partial)
            stats.save(run.output)
        partial.remove()
    return stats


class _Taking:
    """The layers' sums in the making: in memory are those of one, where ``partial`` has them."""

    def __init__(
        self,
        layout: Layout,
        buckets: torch.Tensor,
        count: int,
        reader: WeightReader,
        run: Run,
        partial: Partial | None,
    ) -> None:
        self._layout, self._reader = layout, reader
        self._buckets, self._count = buckets, count
        self._run, self._partial = run, partial
        self._found: list[tuple[dict[str, AxisSums], float]] = []
        self._current: dict[str, ChannelSums] = {}
        self._cosines = 0.0

    def layers(
        self, windows: Sequence[np.ndarray], progress: Callable[[int], object]
    ) -> tuple[list[dict[str, AxisSums]], np.ndarray]:
        """Compute the layers that are not finished, and return the sums and cosines of all."""
        layout, done = self._layout, self._partial.finished if self._partial else 0
        progress(done * len(windows))
        if done < layout.num_hidden_layers:
            self._decoder = StreamedDecoder(
                layout, self._reader, self._run.limits, self._run.stages
            )
            self._states = self._new_states()
            stream = Stream(windows, self._states)
            self._decoder.embed([stream], passed=done)
            self._decoder.run_layers(
                [stream],
                self._watch,
                compare=self._compare,
                progress=progress,
                finished=self._finish,
            )
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
        with self._run.stages.timed("compute"):
            norms = weight_norms(self._decoder.layer(layer), self._decoder.units(layer))
        found = {axis: each.numbers(norms[axis]) for axis, each in sums.items()}
        if self._partial:
            self._partial.add(layer, found, self._cosines, self._states.sync)
            if not self._states.lags:
                self._partial.settle()
        else:
            self._found.append((found, self._cosines))
        self._current, self._cosines = {}, 0.0

    def _zeros(self, layer: int) -> dict[str, ChannelSums]:
        layout, device = self._layout, self._reader.device
        return {
            axis: ChannelSums(self._count, experts, layout.channels_of(axis), device)
            for axis, experts in layout.watched[layer].items()
        }

    def _new_states(self) -> HiddenStates:
        place, directory = self._run.limits.hidden, self._partial.hidden if self._partial else None
        if place == "file" and directory is not None:
            return SpilledStates(directory)
        states = HiddenStates(directory, self._reader.device if place == "device" else None)
        if self._partial:
            states.settle = self._partial.settle
        return states


def identity(
    info: StatsInfo, bucket_of: np.ndarray, device: torch.device, run: Run
) -> dict[str, str]:
    """What a run and its continuation must have in common, by the name users know."""
    return {
        "model": info.fingerprint,
        "text": info.text_digest,
        "`vocab_size`": str(info.vocab_size),
        "`vocab_sizes`": ",".join(map(str, info.bucket_edges)),
        "order of the vocabulary": hashlib.sha256(bucket_of.astype("<i8").tobytes()).hexdigest(),
        "`dtype`": info.dtype,
        "`device`": device.type,
        "`seq_len`": str(info.seq_len),
        "`spill`": str(run.spill.absolute() if run.spill else None),
        "size of micro-batches": str(run.limits.micro_batch_values),
        "version of torch and transformers": f"{torch.__version__} {transformers.__version__}",
        **run.asked,
    }


def finished_before(run: Run, info: StatsInfo, bucket_of: np.ndarray) -> ChannelStats | None:
    """What a run has written that was killed just behind its last step; None if none was."""
    if run.resume and run.output is not None and run.output.exists():
        with suppress(StatsError):
            found = ChannelStats.load(run.output)
            if found.info == info and np.array_equal(found.bucket_of, bucket_of):
                return found
    return None
