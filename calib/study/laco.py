"""LaCo (arXiv 2402.11187): collapse layers where that changes the model's output little."""

from collections.abc import Sequence

import numpy as np
import torch

from calib.statistics.sums import cosine_sum
from calib.streaming.batches import Stream, spilled
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.layer_groups import LayerGroups
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.process import Stopwatch

COLLAPSED = 4
"""Most layers that are collapsed into one (the paper's C)."""

INTERVAL = 2
"""Least distance in layers from a collapse down to the next one (the paper's I)."""

THRESHOLDS = np.append(np.arange(0.95, -1.0, -0.05), -np.inf)
"""Least cosines after a collapse, tried in turn until the target is met (the paper's T)."""

GroupList = list[list[int]]


def collapse_layers(
    layout: Layout,
    windows: Sequence[np.ndarray],
    count: int,
    settings: PassSettings,
    watch: Stopwatch | None = None,
) -> GroupList:
    """Return ``count`` groups of layers, each to be collapsed into its first.

    Runs of layers are tried from the top down. The first run is collapsed for which the cosine of
    the model's last hidden states with those of the dense model stays above the threshold. All runs
    that could be next are tried in one pass. A collapsed layer is not collapsed again.

    Args:
        layout: The model; all its layers are alike.
        windows: A few short windows; the paper takes ten sentences.
        count: Layers to keep.
        settings: How the layers compute.
        watch: Gets the seconds of "choose", those of reading weights left out.

    Raises:
        BudgetError: so many layers cannot be collapsed.
    """
    groups: GroupList = [[layer] for layer in range(layout.num_hidden_layers)]
    thresholds, highest = iter(THRESHOLDS), len(groups)
    threshold = next(thresholds)
    while len(groups) > count:
        size = min(COLLAPSED, len(groups) - count + 1)
        starts = _starts(groups, size)
        if not starts:
            raise BudgetError(
                "laco",
                "cannot collapse so many layers",
                expected=f"at least {len(groups)} layers",
                found=count,
                fix="choose a smaller ratio",
            )
        tried = [_collapsed(groups, start, size) for start in starts]
        cosines = _cosines(layout, windows, tried, groups, settings, watch or Stopwatch())
        above: list[int] = []
        while not above:
            above = [
                number
                for number, start in enumerate(starts)
                if start <= highest and cosines[number] > threshold
            ]
            if not above:
                threshold, highest = next(thresholds), len(groups)
        groups, highest = tried[above[-1]], starts[above[-1]] - INTERVAL
    return groups


def _starts(groups: GroupList, size: int) -> list[int]:
    """Return the starts of all runs of ``size`` layers that are not collapsed yet."""
    return [
        start
        for start in range(len(groups) - size + 1)
        if all(len(group) == 1 for group in groups[start : start + size])
    ]


def _collapsed(groups: GroupList, start: int, size: int) -> GroupList:
    together = [layer for group in groups[start : start + size] for layer in group]
    return [*groups[:start], together, *groups[start + size :]]


@torch.no_grad()
def _cosines(
    layout: Layout,
    windows: Sequence[np.ndarray],
    tried: Sequence[GroupList],
    groups: GroupList,
    settings: PassSettings,
    watch: Stopwatch,
) -> list[float]:
    """Return, for each of ``tried``, the mean cosine of last hidden states with the dense ones.

    Each begins where it differs from ``groups``, with the states that these give.
    """
    dense, base, streams = Stream(windows), Stream(windows), [Stream(windows) for _ in tried]
    of_base, layers = LayerGroups(groups), [LayerGroups(each) for each in tried]
    begins = [
        next(old[0] for old, new in zip(groups, each, strict=False) if old != new) for each in tried
    ]
    with (
        spilled([dense, base, *streams], settings.spill),
        WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader,
    ):
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed([dense, base, *streams])
        for index in decoder.layers():
            with watch.timed("choose"):
                decoder.run(index, dense)
                for begin, stream, of_stream in zip(begins, streams, layers, strict=True):
                    if index == begin:
                        _take(stream, base)
                    if index >= begin:
                        of_stream.run(decoder, index, stream)
                of_base.run(decoder, index, base)
        return [
            cosine_sum(dense.states.before[None], stream.states.before[None]) / dense.tokens
            for stream in streams
        ]


def _take(stream: Stream, other: Stream) -> None:
    """Give ``stream`` the hidden states that ``other`` has between two layers."""
    stream.states.before.copy_(other.states.before)
    for batch, of_other in zip(stream.batches, other.batches, strict=True):
        batch.passed_on = dict(of_other.passed_on)
