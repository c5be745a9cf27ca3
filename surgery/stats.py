"""Channel statistics as a file: what calibration measured and planning reads."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from surgery.errors import StatsError
from surgery.jsonfile import write_atomic

FORMAT = 1
KEY = "compact_surgery"
AGAIN = "calibrate again"


class StatsInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the statistics come from; stored in the file's metadata."""

    fingerprint: str
    """Of the source checkpoint: config, tokenizer and headers."""
    text_digest: str
    """SHA-256 over the calibration windows' token ids."""
    samples: int
    """Windows of text."""
    seq_len: int
    """Tokens per full window."""
    tokens: int
    """Tokens that went through the model, special ones included."""
    bucket_edges: list[int]
    """Bucket b holds the tokens of rarity rank ``edges[b-1] <= rank < edges[b]``; the last is V."""
    dtype: str
    """What the layers computed in."""
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Sums over calibration tokens of the input of down_proj."""

    info: StatsInfo
    sum_sq: list[np.ndarray]
    """Per layer float64 ``[buckets, I]``: Σ act² over the tokens of each bucket."""
    sum_abs: list[np.ndarray]
    """Per layer float64 ``[buckets, I]``: Σ |act|."""
    token_counts: np.ndarray
    """int64 ``[V]``: how often each token occurred."""
    bucket_of: np.ndarray
    """int64 ``[V]``: bucket of each token."""
    where: object = "statistics"
    """The file they come from, for errors."""

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        from safetensors.numpy import save

        arrays = {"token_counts": self.token_counts, "bucket_of": self.bucket_of}
        for layer, (squares, absolutes) in enumerate(zip(self.sum_sq, self.sum_abs, strict=True)):
            arrays[f"layers.{layer}.sum_sq"] = squares
            arrays[f"layers.{layer}.sum_abs"] = absolutes
        write_atomic(path, save(arrays, {KEY: msgspec.json.encode(self.info).decode()}))

    @classmethod
    def load(cls, path: Path) -> "ChannelStats":
        """Read and validate a statistics file.

        Raises:
            StatsError: not such a file, or its parts contradict each other.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                info = msgspec.json.decode((file.metadata() or {}).get(KEY, ""), type=StatsInfo)
                arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        except OSError as error:
            reason = error.strerror or error
            raise StatsError(
                path, "cannot be read", found=reason, fix="name the file that calibrate wrote"
            ) from error
        except (SafetensorError, msgspec.MsgspecError) as error:
            raise StatsError(path, "is not a statistics file", found=error, fix=AGAIN) from error
        if info.format != FORMAT:
            raise StatsError(
                path, "has another format", expected=FORMAT, found=info.format, fix=AGAIN
            )
        try:
            counts, buckets = arrays.pop("token_counts"), arrays.pop("bucket_of")
            layers = range(len(arrays) // 2)
            stats = cls(
                info,
                [arrays.pop(f"layers.{layer}.sum_sq") for layer in layers],
                [arrays.pop(f"layers.{layer}.sum_abs") for layer in layers],
                counts,
                buckets,
                path,
            )
        except KeyError as error:
            raise StatsError(path, "lacks an array", expected=error, fix=AGAIN) from error
        stats._check(path)
        return stats

    def _check(self, path: Path) -> None:
        buckets = len(self.info.bucket_edges)
        shapes = {array.shape for array in (*self.sum_sq, *self.sum_abs)}
        finite = all(np.isfinite(array).all() for array in (*self.sum_sq, *self.sum_abs))
        shape = next(iter(shapes), ())
        if len(shapes) != 1 or len(shape) != 2 or shape[0] != buckets:
            raise StatsError(
                path,
                "arrays have different shapes",
                expected=f"[{buckets}, I]",
                found=sorted(shapes),
                fix=AGAIN,
            )
        if not finite:
            raise StatsError(path, "has a sum that is not finite", fix=AGAIN)
        inside = (self.bucket_of >= 0) & (self.bucket_of < buckets)
        vectors = self.token_counts.ndim == 1 and self.token_counts.shape == self.bucket_of.shape
        if not vectors or not len(inside) or not inside.all() or self.token_counts.min() < 0:
            raise StatsError(path, "token counts and buckets do not fit", fix=AGAIN)
