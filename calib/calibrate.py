"""The calibration run: windows through the streamed decoder, sums of squares out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from calib.corpus import digest
from calib.decoder import StreamedDecoder
from calib.weights import WeightReader
from surgery.layout import Layout
from surgery.stats import AxisSums, ChannelStats, StatsInfo

CHUNK_VALUES = 1 << 20
"""Activations held in float64 at a time: 8 MiB."""


class ChannelSums:
    """Sums over one channel axis of one layer, by bucket and expert."""

    def __init__(self, buckets: int, experts: int, channels: int, device: torch.device) -> None:
        shape = (buckets, experts, channels)
        self.sum_sq = torch.zeros(shape, dtype=torch.float64, device=device)
        self.sum_abs = torch.zeros_like(self.sum_sq)
        self.tokens = torch.zeros((buckets, experts), dtype=torch.int64)

    def add(self, expert: int, buckets: torch.Tensor, act: torch.Tensor) -> None:
        """Add the activations of some tokens.

        Args:
            expert: Who saw them; 0 in a dense FFN.
            buckets: int64 ``(tokens,)``: the bucket of each token, on the CPU.
            act: ``(tokens, I)``, the input of down_proj.
        """
        count = len(self.tokens)
        self.tokens[:, expert] += torch.bincount(buckets, minlength=count)
        member = membership(buckets, count).to(act.device)
        step = max(1, CHUNK_VALUES // act.shape[1])
        for start in range(0, len(act), step):
            part = slice(start, start + step)
            wide = act[part].double().abs_()
            self.sum_abs[:, expert] += member[:, part] @ wide
            self.sum_sq[:, expert] += member[:, part] @ wide.square_()

    def numbers(self) -> AxisSums:
        """The sums as arrays."""
        return AxisSums(self.sum_sq.cpu().numpy(), self.sum_abs.cpu().numpy(), self.tokens.numpy())


def membership(buckets: torch.Tensor, count: int) -> torch.Tensor:
    """Return float64 ``(count, tokens)``: 1 where ``buckets[token]`` is the row."""
    return torch.nn.functional.one_hot(buckets, count).T.double()


def calibrate(
    layout: Layout,
    windows: Sequence[np.ndarray],
    bucket_of: np.ndarray,
    bucket_edges: Sequence[int],
    *,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda windows: None,
) -> ChannelStats:
    """Sum the squared input of every down_proj over ``windows`` (paper eq. 4 and 5), by bucket.

    Args:
        layout: The model.
        windows: Token ids, one array per window.
        bucket_of: int64 ``[V]``: bucket of each token.
        bucket_edges: Rarity ranks at which buckets end; the last is V.
        seq_len: Tokens of a full window, for the record.
        device: Where the layers compute.
        dtype: What they compute in; sums are float64.
        progress: Called with the windows that have passed a layer.

    Raises:
        DataError: a token without a row in the embedding.
        CheckpointError: config.json and the tensors do not make a model.
    """
    flat = np.concatenate(windows)
    count = len(bucket_edges)
    buckets = torch.from_numpy(bucket_of)
    # All layers' sums come first: made among activations, they would split the heap's free space.
    sums = [
        {axis: ChannelSums(count, n, layout.channels_of(axis), device) for axis, n in axes.items()}
        for axes in layout.watched
    ]

    def watch(layer: int, axis: str, expert: int, ids: torch.Tensor, act: torch.Tensor) -> None:
        sums[layer][axis].add(expert, buckets[ids], act)

    with WeightReader(layout.checkpoint, device, dtype) as reader:
        decoder = StreamedDecoder(layout, reader)
        decoder.run_layers(decoder.embed(windows), watch, stop_early=True, progress=progress)
    info = StatsInfo(
        fingerprint=layout.checkpoint.fingerprint,
        text_digest=digest(windows),
        samples=len(windows),
        seq_len=seq_len,
        tokens=len(flat),
        bucket_edges=list(bucket_edges),
        dtype=str(dtype).removeprefix("torch."),
    )
    return ChannelStats(
        info,
        [{axis: found.numbers() for axis, found in axes.items()} for axes in sums],
        np.bincount(flat, minlength=layout.vocab_size),
        bucket_of,
    )
