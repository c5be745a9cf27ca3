"""The calibration run: windows through the streamed decoder, sums of squares out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from calib.corpus import digest
from calib.decoder import StreamedDecoder
from calib.weights import WeightReader
from surgery.layout import Layout
from surgery.stats import ChannelStats, StatsInfo

CHUNK_VALUES = 1 << 20
"""Activations held in float64 at a time: 8 MiB."""


class ChannelSums:
    """Σ act² and Σ |act| of one layer by bucket, in float64."""

    def __init__(self, buckets: int, channels: int, device: torch.device) -> None:
        self.sum_sq = torch.zeros((buckets, channels), dtype=torch.float64, device=device)
        self.sum_abs = torch.zeros_like(self.sum_sq)

    def add(self, act: torch.Tensor, member: torch.Tensor) -> None:
        """Add the activations of some tokens.

        Args:
            act: ``(tokens, I)``, the input of down_proj.
            member: float64 ``(buckets, tokens)``: 1 where the token belongs to the bucket.
        """
        step = max(1, CHUNK_VALUES // act.shape[1])
        for start in range(0, len(act), step):
            part = slice(start, start + step)
            wide = act[part].double().abs_()
            self.sum_abs += member[:, part] @ wide
            self.sum_sq += member[:, part] @ wide.square_()


def membership(buckets: torch.Tensor, count: int) -> torch.Tensor:
    """Return float64 ``(count, tokens)``: 1 where ``buckets[token]`` is the row."""
    return torch.nn.functional.one_hot(buckets.flatten(), count).T.double()


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
        ChannelSums(count, layout.intermediate_size, device)
        for _ in range(layout.num_hidden_layers)
    ]

    def watch(layer: int, ids: torch.Tensor, act: torch.Tensor) -> None:
        member = membership(buckets[ids], count).to(act.device)
        sums[layer].add(act.flatten(0, -2), member)

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
        [layer.sum_sq.cpu().numpy() for layer in sums],
        [layer.sum_abs.cpu().numpy() for layer in sums],
        np.bincount(flat, minlength=layout.vocab_size),
        bucket_of,
    )
