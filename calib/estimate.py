"""Predict the memory, disk and reads of a run from headers and windows; keep it within caps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from calib.streaming.settings import ComputeOptions, PassSettings
from surgery.errors import BudgetError
from surgery.families.blocks import OUTSIDE
from surgery.families.schema import EXPERT, FFN, WIDE
from surgery.layout.layout import Layout
from surgery.layout.roles import FLOATS
from surgery.process import Seconds, with_slack

MB = 10**6
BASE_BYTES = 345 * MB
"""Interpreter, torch, transformers and the library's empty model; measured on tiny models."""
ROW_BYTES = 750
"""Per row of the vocabulary, for the tokenizer and the vocabulary's order; measured."""
DEVICE_BASE_BYTES = 500 * MB
"""A CUDA context and cuBLAS; not measured here."""
PIECE_BYTES = 1 << 25
"""One piece of an FFN activation (``calib.streaming.ffn.PIECE_VALUES`` in fp32)."""
CHUNK_BYTES = 3 << 23
"""Activations in float64 and their buckets (``calib.statistics.sums.CHUNK_VALUES``)."""
HEAP_BYTES = 32 * MB
"""Freed memory that the heap keeps; measured, below ``surgery.process.HELD_BYTES``."""


SOLVED_ROWS = 1024
"""Rows of down_proj that a refit solves for at a time (``calib.refit.ROWS``)."""


@dataclass(frozen=True)
class WindowLengths:
    """The lengths of a text's windows, on which memory depends."""

    lengths: Mapping[int, int]
    """Tokens of a window → number of windows of this length."""
    rows: int
    """Rows of the embedding that occur in the windows."""

    @property
    def tokens(self) -> int:
        """Over all windows."""
        return sum(length * count for length, count in self.lengths.items())

    @classmethod
    def of(cls, windows: Sequence[np.ndarray]) -> "WindowLengths":
        """Return the lengths of ``windows`` of token ids."""
        rows = len(np.unique(np.concatenate(windows))) if len(windows) else 0
        return cls(Counter(map(len, windows)), rows)

    @classmethod
    def full(cls, samples: int, seq_len: int, vocab_size: int) -> "WindowLengths":
        """Return windows of one length in which as many different tokens occur as possible."""
        return cls({seq_len: samples}, min(vocab_size, samples * seq_len))


PARTS = {
    "base": "Python, torch, the other libraries and the tokenizer",
    "weights": "of the layer that computes",
    "next layer": "read while this one computes",
    "loading or computing": "weights being converted, or activations and sums",
    "embedding": "its rows that occur in the text, before the first layer is read",
    "hidden states": "of all windows, between two layers",
    "refitting": "sums and equations of one down_proj",
}
"""Parts of a peak of memory, in words."""


@dataclass(frozen=True)
class Prediction:
    """The predicted bytes of a run."""

    memory: Mapping[str, int]
    """Parts of the process's peak memory."""
    device: Mapping[str, int]
    """Parts of the device's peak memory; empty on the CPU."""
    disk: int
    """Hidden states in files, and sums."""
    read: int
    """Read from the checkpoint."""
    written: int
    """Hidden states after each layer, and sums."""
    to_device: int
    """Weights that are copied to the device."""

    @property
    def peak_memory(self) -> int:
        """Of the process, in bytes."""
        return sum(self.memory.values())

    @property
    def peak_device(self) -> int:
        """Of the device, in bytes."""
        return sum(self.device.values())

    def over(self, compute: ComputeOptions) -> dict[str, int]:
        """Return name → bytes needed of the caps of ``compute`` that would not be kept."""
        needs = {"max_memory": self.peak_memory, "max_gpu_memory": self.peak_device}
        caps = {"max_memory": compute.max_memory, "max_gpu_memory": compute.max_gpu_memory}
        return {
            name: need
            for name, need in needs.items()
            if (cap := caps[name]) is not None and need > cap
        }

    def facts(self) -> dict[str, Any]:
        """Return all fields for JSON."""
        both = {"peak_memory": self.peak_memory, "peak_device": self.peak_device}
        return both | asdict(self)

    def table(self) -> str:
        """Return the facts as lines of text, each with what it means."""
        on_device = {**PARTS, "base": "libraries of the GPU"}
        rows = [
            ("peak memory", self.peak_memory, ""),
            *((f"  {name}", size, PARTS[name]) for name, size in self.memory.items()),
            ("peak GPU memory", self.peak_device, ""),
            *((f"  {name}", size, on_device[name]) for name, size in self.device.items()),
            ("disk", self.disk, "free at its end: hidden states and sums, to go on after a kill"),
            ("read from the checkpoint", self.read, ""),
            ("written in all", self.written, "hidden states after each layer, and sums"),
            ("weights to the device", self.to_device, ""),
        ]
        lines = (
            f"{name:<26}{size / MB:>12,.0f} MB  {meaning}".rstrip()
            for name, size, meaning in rows
            if size
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Pace:
    """How fast this machine took a few windows through one layer."""

    start: float
    """Seconds until the first layer."""
    load: float
    """Seconds to read and convert a layer."""
    compute: Seconds
    """Seconds of a token in a layer, at least and at most."""
    write: Seconds | None
    """Seconds to write a byte to the disk; None if nothing is written."""
    layers: int
    """Of the model."""

    def seconds(self, prediction: Prediction, tokens: int) -> Seconds:
        """Estimate the time of a whole pass of ``tokens`` through all layers.

        At least: reading and writing are hidden by computing, or the other way round. At most: they
        come one after the other. The slack is for what a few windows do not show: on layers of 70B
        shape, a pass took up to 1.33 times as long as its arithmetic alone.
        """
        fast, slow = (self.layers * tokens * pace for pace in self.compute)
        write = [prediction.written * pace for pace in self.write or (0.0, 0.0)]
        load = self.layers * self.load
        low = self.start + max(fast, load, write[0])
        high = self.start + slow + load + write[1]
        return with_slack(low, high)


def predict(
    layout: Layout, text: WindowLengths, settings: PassSettings, *, buckets: int, journal: bool
) -> Prediction:
    """Predict the bytes that a pass of ``text`` through the layers takes.

    Args:
        layout: The model.
        text: Its windows.
        settings: How the layers compute.
        buckets: Buckets of the statistics; 0 takes no statistics.
        journal: Whether hidden states are written after each layer.
    """
    width = layout.by_name[layout.family.embedding].shape[1]
    states = text.tokens * width * settings.dtype.itemsize
    states *= 2 if layout.decoder_layers else 1  # the encoder's and the decoder's
    sums = list(_sum_bytes(layout, buckets))
    # The sums of one layer are written while the next layer computes.
    kept = 2 * max(sums, default=0) if journal else sum(sums)
    computing = _activation_bytes(layout, text, settings, width) + kept
    work = _weight_bytes(layout, settings, computing, text.rows * width * settings.dtype.itemsize)
    memory = {"base": BASE_BYTES + ROW_BYTES * layout.vocab_size}
    device: dict[str, int] = {}
    if settings.device.type == "cpu":
        memory |= work
    else:
        memory["weights"] = max(_stored_bytes(layout))  # pinned
        device = {"base": DEVICE_BASE_BYTES, **work}
    if settings.hidden != "file":
        (device if settings.hidden == "device" else memory)["hidden states"] = states
    copies = 2 if journal or settings.hidden == "file" else 0
    weights = sum(_stored_bytes(layout))
    itemsize = layout.by_name[layout.family.embedding].itemsize
    return Prediction(
        memory,
        device,
        disk=copies * states + (2 * sum(sums) if journal else 0),
        read=weights + _outer_bytes(layout) + text.rows * width * itemsize,
        written=(layout.num_hidden_layers * states if copies else 0) + 2 * sum(sums) * journal,
        to_device=weights if device else 0,
    )


def within_caps(
    layout: Layout,
    text: WindowLengths,
    settings: PassSettings,
    compute: ComputeOptions,
    *,
    buckets: int,
    journal: bool,
) -> PassSettings:
    """Return the fastest settings whose prediction keeps the caps of ``compute``.

    To save memory, hidden states are moved to a file first. Then micro-batches become smaller. At
    last, the next layer is read only when the current one is finished.

    Raises:
        BudgetError: no settings keep them; it names the least memory needed.
    """
    least: dict[str, int] = {}
    for choice in _choices(settings, journal=journal):
        made = predict(layout, text, choice, buckets=buckets, journal=journal)
        over = made.over(compute)
        if not over:
            return choice
        for name, need in over.items():
            least[name] = min(least.get(name, need), need)
    name = next(iter(over))
    raise over_cap(
        name, least[name], compute, "give more, fewer or shorter windows, or a smaller `dtype`"
    )


def over_cap(name: str, least: int, compute: ComputeOptions, fix: str) -> BudgetError:
    """The error of a cap that cannot be kept: ``least`` bytes are needed."""
    return BudgetError(
        f"`{name}` {getattr(compute, name) / MB:,.0f}MB",
        "cannot be kept",
        expected=f"at least {least / MB + 1:,.0f}MB",
        fix=fix,
    )


def _choices(settings: PassSettings, *, journal: bool) -> Iterator[PassSettings]:
    """Yield settings from the fastest to the smallest."""
    stores = ["memory", "file"] if settings.spill is None else ["file"]
    if settings.device.type != "cpu" and settings.spill is None:
        stores.insert(0, "device")
    if not journal and settings.spill is None:
        stores.remove("file")
    for prefetch in (True, False):
        for values in (settings.micro_batch_values, 1):
            for store in stores:
                yield replace(settings, hidden=store, micro_batch_values=values, prefetch=prefetch)


def predict_repair(
    layout: Layout,
    widths: Mapping[str, int],
    text: WindowLengths,
    settings: PassSettings,
    *,
    trains: bool = False,
) -> Prediction:
    """Predict a pass that refits every down_proj, one at a time.

    Args:
        layout: The model.
        widths: Key of config.json → I'.
        text: All windows whose hidden states are kept, as often as they are.
        settings: How the layers compute.
        trains: Whether FFNs are then trained, one at a time.
    """
    pass_alone = predict(layout, text, settings, buckets=1, journal=False)
    depth = layout.by_name[layout.family.embedding].shape[1]
    longest = max(text.lengths)
    beside = 0
    for axis, width in layout.family.widths.items():
        if width.key not in widths or not layout.channels_of(axis):
            continue
        full, kept = layout.channels_of(axis), widths[width.key] * layout.times(axis)
        experts = layout.experts if axis == EXPERT else 1
        matrix, pruned = depth * full, depth * kept
        sums = 4 * kept**2 + 4 * pruned
        if axis != FFN:
            sums += 8 * experts * full**2 + 4 * kept * (full - kept)
        equations = sums + 8 * kept**2
        solving = 16 * kept**2 + 8 * pruned + 16 * SOLVED_ROWS * kept
        weights = 2 * experts * matrix * settings.dtype.itemsize
        activations = 2 * longest * full * settings.dtype.itemsize
        # Where it begins, weights, gradients, and Adam's two means; the last step's for a moment.
        training = 3 * 6 * 4 * pruned if trains and axis in (FFN, WIDE) else 0
        beside = max(beside, max(equations, solving, training) + weights + activations)
    if pass_alone.device:
        return replace(pass_alone, device={**pass_alone.device, "refitting": beside})
    return replace(pass_alone, memory={**pass_alone.memory, "refitting": beside})


def _weight_bytes(
    layout: Layout, settings: PassSettings, computing: int, embedding: int
) -> dict[str, int]:
    """Return the parts of the peak: a layer is loaded or computes while the next one is read.

    Args:
        layout: The model.
        settings: How it computes.
        computing: Bytes of activations and sums, which are allocated once a layer is loaded.
        embedding: Bytes of its rows that occur, which are freed before the first layer is loaded.
    """
    layers = [_LayerBytes.of(layout, index, settings) for index in range(len(layout.of_layer))]
    pairs = zip(layers, [*layers[1:], None], strict=True)
    peaks = []
    for layer, following in pairs:
        ahead = following.stored if following and settings.prefetch else 0
        peaks.append((layer.ready + ahead + computing, layer.ready, ahead, computing))
        # The next layer is not read before experts are merged.
        peaks.append((layer.loading, layer.ready, 0, layer.loading - layer.ready))
    peak, ready, ahead, beside = max(peaks)
    parts = {"weights": ready, "next layer": ahead, "loading or computing": beside}
    return parts | ({"embedding": embedding - peak} if embedding > peak else {})


@dataclass(frozen=True)
class _LayerBytes:
    stored: int
    """As read: in the compute dtype, or in the file's for experts and with a device."""
    ready: int
    """In the compute dtype."""
    loading: int
    """Peak during the conversion."""

    @classmethod
    def of(cls, layout: Layout, index: int, settings: PassSettings) -> "_LayerBytes":
        itemsize, converts = settings.dtype.itemsize, settings.device.type == "cpu"
        merged: Counter[str] = Counter()
        alone, ready, copied = 0, 0, False
        for ref in layout.of_layer[index].values():
            role = layout.roles[ref.name]
            if role.slot.block in OUTSIDE:
                continue
            count = layout.values_of(ref)
            size = _waiting_itemsize(ref.dtype, ref.itemsize, itemsize)
            if role.slot.width == EXPERT and role.expert is not None:
                merged["down" if role.slot.ffn_output else "up"] += count * size
            else:
                size = itemsize if converts else size
                alone += count * size
            ready += count * itemsize
            copied |= size != itemsize
        stored = alone + merged.total()
        # Tensors are converted one at a time; small ones do not count.
        loading = ready + max(merged.values(), default=0) * copied
        merging = stored + merged["up"]  # gates and ups are in memory twice while they are joined
        return cls(stored, ready, max(loading, merging))


def _waiting_itemsize(dtype: str, itemsize: int, computed: int) -> int:
    """Return the bytes of a value as read; quantized ones are decoded to the compute dtype."""
    return itemsize if dtype in FLOATS else computed


def _stored_bytes(layout: Layout) -> list[int]:
    """Return the bytes of each layer in the file."""
    roles = layout.roles
    return [
        sum(ref.nbytes for ref in layer.values() if roles[ref.name].slot.block not in OUTSIDE)
        for layer in layout.of_layer
    ]


def _outer_bytes(layout: Layout) -> int:
    """Return the bytes of tensors before and after the layers, without embedding and head."""
    family = layout.family
    apart = (family.embedding, family.head, family.head.removesuffix("weight") + "bias")
    return sum(
        ref.nbytes
        for name, ref in layout.by_name.items()
        if layout.roles[ref.name].layer is None and name not in apart
        if layout.roles[ref.name].slot.block not in OUTSIDE
    )


def _sum_bytes(layout: Layout, buckets: int) -> Iterator[int]:
    """Yield the bytes of each layer's sums."""
    for axes in layout.ffn_outputs:
        numbers = 2 * buckets + 2 if buckets else 0
        yield sum(8 * numbers * n * layout.channels_of(axis) for axis, n in axes.items())


def _activation_bytes(
    layout: Layout, text: WindowLengths, settings: PassSettings, width: int
) -> int:
    """Return the bytes of a micro-batch: attention's copies, the FFN's, and the float64 chunk."""
    channels = max((layout.channels_of(axis) for axis in layout.family.widths), default=1)
    tokens = max(
        min(count, max(1, settings.micro_batch_values // (length * channels))) * length
        for length, count in text.lengths.items()
    )
    ffn = min(tokens * channels * settings.dtype.itemsize, PIECE_BYTES)
    return 10 * tokens * width * settings.dtype.itemsize + 4 * ffn + CHUNK_BYTES + HEAP_BYTES
