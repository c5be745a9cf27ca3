"""Channel statistics: the file that calibration writes and planning reads."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import StatsError, did_you_mean
from surgery.families.schema import WIDTHS
from surgery.files.atomic import errors_name, new_file
from surgery.files.safetensors_header import encode_header
from surgery.files.strict_json import open_regular
from surgery.plot import html_table

FORMAT = 3
KEY = "compact_surgery"
AGAIN = "calibrate again"
MAX_BYTES = 1 << 33
"""Twice what 60 layers of 384 experts with 2,048 channels have in five buckets."""

TINY = float(np.finfo(np.float64).tiny)

DTYPES = {"<f8": "F64", "<i8": "I64"}
PARTS = ("sum_sq", "sum_abs", "tokens", "sum_l2", "weight_norm")
ROUTED_PARTS = ("sum_gate", "sum_norm", "sum_norm_sq", "sum_added", "sum_added_sq")
COSINES = "cosines"
ARRAY = re.compile(
    rf"layers\.(0|[1-9][0-9]{{0,4}})\.({'|'.join(WIDTHS)})\.({'|'.join(PARTS + ROUTED_PARTS)})"
)


class StatsInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the statistics come from; the file's metadata hold it."""

    fingerprint: str
    """Digest of the source checkpoint: config, tokenizer and headers."""
    text_digest: str
    """SHA-256 over the calibration windows' token ids, or over ``parts``."""
    samples: int
    """Windows of text."""
    seq_len: int
    """Tokens per full window."""
    tokens: int
    """Tokens that went through the model, special ones included."""
    bucket_edges: list[int]
    """Bucket b holds the tokens of rarity rank ``edges[b-1] <= rank < edges[b]``; the last is V."""
    dtype: str
    """Dtype in which the layers computed."""
    vocab_size: int | None = None
    """Rows of the pruned vocabulary that tokenized the text; None for the source's vocabulary."""
    weights: str | None = None
    """``Checkpoint.weights`` of the source; None where it is not known."""
    parts: list[str] = []
    """The texts' digests, ascending, in merged statistics; empty in those of one run."""
    format: int = FORMAT

    @property
    def texts(self) -> list[str]:
        """The digest of each text that was counted."""
        return self.parts or [self.text_digest]


@dataclass(frozen=True, eq=False)
class RoutedSums:
    """Sums over what the routed experts of a layer put out, each float64 ``[buckets, experts]``.

    f is an expert's output for a token and g the weight that the router gives it. Where g scales
    the expert's input, as in Llama 4, f has it already and is not multiplied by g again.
    """

    sum_gate: np.ndarray
    """Σ g."""
    sum_norm: np.ndarray
    """Σ ‖f‖."""
    sum_norm_sq: np.ndarray
    """Σ ‖f‖²."""
    sum_added: np.ndarray
    """Σ g‖f‖."""
    sum_added_sq: np.ndarray
    """Σ g²‖f‖²."""


@dataclass(frozen=True, eq=False)
class AxisSums:
    """Sums over the input of down_proj on one channel axis of one layer."""

    sum_sq: np.ndarray
    """float64 ``[buckets, experts, I]``: Σ act² over the tokens of each bucket."""
    sum_abs: np.ndarray
    """float64 ``[buckets, experts, I]``: Σ |act|."""
    tokens: np.ndarray
    """int64 ``[buckets, experts]``: tokens routed to each expert; another FFN counts as one."""
    sum_l2: np.ndarray
    """float64 ``[experts, I]``: Σ over windows of the norm √(Σ act²) over the window's tokens."""
    weight_norm: np.ndarray
    """float64 ``[experts, I]``: the norm of each channel's column of down_proj."""
    routed: RoutedSums | None = None
    """Of routed experts."""

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> "AxisSums":
        """Gather the arrays whose names begin with ``prefix``.

        Raises:
            KeyError: one is missing.
        """
        routed = None
        if any(prefix + part in arrays for part in ROUTED_PARTS):
            routed = RoutedSums(*(arrays[prefix + part] for part in ROUTED_PARTS))
        found = (arrays[prefix + part] for part in PARTS)
        sum_sq, sum_abs, tokens, sum_l2, weight_norm = found
        return cls(sum_sq, sum_abs, tokens, sum_l2, weight_norm, routed)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        found: dict[str, np.ndarray] = {part: getattr(self, part) for part in PARTS}
        if self.routed is not None:
            found |= {part: getattr(self.routed, part) for part in ROUTED_PARTS}
        return found

    @property
    def finite(self) -> bool:
        """Whether every sum is a finite number."""
        return all(bool(np.isfinite(each).all()) for each in self.arrays().values())


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Sums over calibration tokens of the input of down_proj."""

    info: StatsInfo
    layers: list[dict[str, AxisSums]]
    """Per layer: channel axis (``family.WIDTHS``) → its sums."""
    token_counts: np.ndarray
    """int64 ``[V]``: how often each token occurred."""
    bucket_of: np.ndarray
    """int64 ``[V]``: bucket of each token."""
    cosines: np.ndarray
    """float64 ``[L]``: Σ over tokens of the cosine between a layer's input and its output."""
    where: object = "statistics"
    """The file of the statistics, for errors."""

    @property
    def block_influence(self) -> np.ndarray:
        """float64 ``[L]``: 1 − the mean cosine, the importance of a layer by ShortGPT (eq. 1)."""
        return 1 - self.cosines / max(1, self.info.tokens)

    def _repr_html_(self) -> str:
        rows = []
        for layer, axes in enumerate(self.layers):
            for axis, sums in axes.items():
                ordered = -np.sort(-sums.sum_sq.sum(axis=(0, 1)))
                half = float(ordered[: len(ordered) // 2].sum() / max(ordered.sum(), TINY))
                _, experts, channels = sums.sum_sq.shape
                influence = f"{self.block_influence[layer]:.3f}"
                rows.append((f"{layer} {axis}", experts, channels, half, influence))
        heads = ("layer", "experts", "channels", "act² of the better half", "block influence")
        title = f"statistics of {self.info.tokens:,} tokens in {self.info.samples:,} windows"
        return html_table(title, heads, rows)

    def save(self, path: Path | str) -> None:
        """Write the file atomically, an array at a time."""
        arrays = {
            "token_counts": self.token_counts,
            "bucket_of": self.bucket_of,
            COSINES: self.cosines,
        }
        for layer, axes in enumerate(self.layers):
            for axis, sums in axes.items():
                for part, array in sums.arrays().items():
                    arrays[f"layers.{layer}.{axis}.{part}"] = array
        metadata = {KEY: msgspec.json.encode(self.info).decode()}
        save_arrays(Path(path), arrays, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "ChannelStats":
        """Read and validate a statistics file.

        Raises:
            StatsError: it is not a statistics file, or its parts contradict each other.
        """
        path = Path(path)
        with _opened(path) as (info, file):
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        try:
            counts, buckets = arrays.pop("token_counts"), arrays.pop("bucket_of")
            cosines = arrays.pop(COSINES)
            stats = cls(info, _layers(arrays, path), counts, buckets, cosines, path)
        except KeyError as error:
            raise StatsError(path, "lacks an array", expected=error, fix=AGAIN) from error
        stats.check(path)
        return stats

    def check(self, path: Path) -> None:
        """Refuse parts that contradict each other, sums that are not finite, and negative counts.

        Raises:
            StatsError: naming ``path`` and the array.
        """
        buckets = len(self.info.bucket_edges)
        inside = (self.bucket_of >= 0) & (self.bucket_of < buckets)
        vectors = self.token_counts.ndim == 1 and self.token_counts.shape == self.bucket_of.shape
        _check_dtypes(path, np.int64, self.token_counts, self.bucket_of)
        if not vectors or not len(inside) or not inside.all() or self.token_counts.min() < 0:
            raise StatsError(path, "token counts and buckets do not fit", fix=AGAIN)
        self._check_cosines(path)
        for layer, axes in enumerate(self.layers):
            for axis, sums in axes.items():
                _check_sums(sums, buckets, f"{path}: layers.{layer}.{axis}")

    def _check_cosines(self, path: Path) -> None:
        where = f"{path}: {COSINES}"
        if self.cosines.shape != (len(self.layers),):
            raise StatsError(
                where,
                "is not one number for each layer",
                expected=[len(self.layers)],
                found=list(self.cosines.shape),
                fix=AGAIN,
            )
        _check_dtypes(where, np.float64, self.cosines)
        if not np.isfinite(self.cosines).all():
            raise StatsError(where, "has a sum that is not finite", fix=AGAIN)


def read_info(path: Path) -> StatsInfo:
    """Read only where the statistics in ``path`` come from.

    Raises:
        StatsError: it is not a statistics file.
    """
    with _opened(path) as (info, _):
        return info


@contextmanager
def _opened(path: Path) -> Iterator[tuple[StatsInfo, Any]]:
    """Yield the metadata of a file, and the file as safetensors opens it."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as opened:
            if (size := os.fstat(opened.fileno()).st_size) > MAX_BYTES:
                raise OSError(errno.EFBIG, f"{size:,} bytes, more than {MAX_BYTES:,}")
        with safe_open(path, framework="numpy") as file:
            info = msgspec.json.decode((file.metadata() or {}).get(KEY, ""), type=StatsInfo)
            if info.format != FORMAT:
                raise StatsError(
                    path, "has another format", expected=FORMAT, found=info.format, fix=AGAIN
                )
            yield info, file
    except OSError as error:
        reason = error.strerror or error
        fix = f"{did_you_mean(path)}name the file that calibrate wrote"
        raise StatsError(path, "cannot be read", found=reason, fix=fix) from error
    except (SafetensorError, msgspec.MsgspecError, MemoryError) as error:
        raise StatsError(path, "is not a statistics file", found=error, fix=AGAIN) from error


def save_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    sync: bool = True,
) -> None:
    """Write a safetensors file of float64 and int64 arrays atomically.

    ``sync`` is as in ``write_atomic``.
    """
    entries = [(name, DTYPES[array.dtype.str], array.shape) for name, array in arrays.items()]
    with errors_name(path), new_file(path, sync=sync) as made:
        made.file.write(encode_header(entries, metadata))
        for array in arrays.values():
            made.file.write(np.ascontiguousarray(array).data)


def _layers(arrays: dict[str, np.ndarray], path: Path) -> list[dict[str, AxisSums]]:
    """Sort the arrays of a file by layer and axis; every axis has one array of each part."""
    axes: dict[int, set[str]] = {}
    for name in arrays:
        match = ARRAY.fullmatch(name)
        if not match:
            raise StatsError(f"{path}: {name}", "is not an array of statistics", fix=AGAIN)
        axes.setdefault(int(match[1]), set()).add(match[2])
    return [
        {
            axis: AxisSums.of(arrays, f"layers.{layer}.{axis}.")
            for axis in sorted(axes.get(layer, ()))
        }
        for layer in range(max(axes, default=-1) + 1)
    ]


def _check_sums(sums: AxisSums, buckets: int, where: str) -> None:
    shape = sums.sum_sq.shape
    found = [getattr(sums, part).shape for part in PARTS]
    if len(shape) != 3 or found != [(buckets, *shape[1:])] * 2 + [shape[:2], *[shape[1:]] * 2]:
        raise StatsError(
            where,
            "arrays have different shapes",
            expected=f"[{buckets}, experts, I]",
            found=found,
            fix=AGAIN,
        )
    routed = {part: array for part, array in sums.arrays().items() if part in ROUTED_PARTS}
    if any(array.shape != shape[:2] for array in routed.values()):
        raise StatsError(
            where,
            "arrays have different shapes",
            expected=list(shape[:2]),
            found=[array.shape for array in routed.values()],
            fix=AGAIN,
        )
    real = (sums.sum_sq, sums.sum_abs, sums.sum_l2, sums.weight_norm)
    _check_dtypes(where, np.float64, *real, *routed.values())
    _check_dtypes(where, np.int64, sums.tokens)
    if not sums.finite:
        raise StatsError(where, "has a sum that is not finite", fix=AGAIN)
    if sums.tokens.min(initial=0) < 0:
        raise StatsError(where, "has a count below 0", fix=AGAIN)


def _check_dtypes(where: object, dtype: type, *arrays: np.ndarray) -> None:
    for array in arrays:
        if array.dtype != dtype:
            raise StatsError(
                where,
                "has an array of another dtype",
                expected=np.dtype(dtype),
                found=array.dtype,
                fix=AGAIN,
            )
