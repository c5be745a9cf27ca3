"""Statistics of separate runs, added."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import StatsError
from surgery.stats import AxisSums, ChannelStats, StatsInfo, read_info

SAME_MODEL = "merge statistics of the same checkpoint"
NORM_TOLERANCE = 1e-9
"""Machines add the squares of a column in different orders."""

SAME = {
    "fingerprint": ("another model's", SAME_MODEL),
    "bucket_edges": (
        "counted in other buckets of tokens",
        "calibrate with the same `vocab_sizes` and options of the vocabulary",
    ),
    "dtype": ("taken in another dtype", "calibrate with the same `dtype`"),
    "vocab_size": (
        "taken of text that another vocabulary cut",
        "calibrate with the same `vocab_size`",
    ),
    "seq_len": ("taken with other windows", "calibrate with the same `seq_len`"),
}
"""Field of StatsInfo → what it means when it differs, and what to do."""


def merge_stats(paths: Sequence[Path]) -> ChannelStats:
    """Add the statistics of runs over separate texts.

    Counts are exact. The sums are float64 and added in the order of the texts' digests, so that
    the order of ``paths`` changes no bit; merging in several steps may change the last one. Two
    files are in memory at a time.

    Raises:
        StatsError: other model, buckets, dtype or windows than the first file, or a text twice.
    """
    infos = {path: read_info(path) for path in paths}
    _check_infos(paths, infos)
    order = sorted(paths, key=lambda path: infos[path].texts)
    total = ChannelStats.load(order[0])
    for path in order[1:]:
        total = _add(total, ChannelStats.load(path), path)
    return total


def _check_infos(paths: Sequence[Path], infos: Mapping[Path, StatsInfo]) -> None:
    first = infos[paths[0]]
    owner: dict[str, Path] = {}
    for path in paths:
        for field, (problem, fix) in SAME.items():
            expected, found = (getattr(info, field) for info in (first, infos[path]))
            if found != expected:
                raise _refused(path, problem, _short(expected), _short(found), fix)
        for text in infos[path].texts:
            if text in owner:
                raise StatsError(
                    path,
                    "holds a text that would count twice",
                    found=f"text {text[:12]}, which {owner[text]} holds, too",
                    fix="name the statistics of each text once",
                )
            owner[text] = path


def _add(total: ChannelStats, other: ChannelStats, path: Path) -> ChannelStats:
    if not np.array_equal(total.bucket_of, other.bucket_of):
        problem, fix = SAME["bucket_edges"]
        raise _refused(path, problem, "the same tokens in each", "others", fix)
    shapes, found = (
        [{axis: sums.sum_sq.shape for axis, sums in axes.items()} for axes in stats.layers]
        for stats in (total, other)
    )
    if found != shapes:
        raise _refused(path, "has arrays of other shapes", None, None, "calibrate again")
    with np.errstate(over="ignore"):  # the check below refuses what is not finite
        layers = [
            {axis: _add_sums(sums, axes[axis], path) for axis, sums in before.items()}
            for before, axes in zip(total.layers, other.layers, strict=True)
        ]
        counts = total.token_counts + other.token_counts
        cosines = total.cosines + other.cosines
    info = _add_info(total.info, other.info)
    merged = ChannelStats(info, layers, counts, total.bucket_of, cosines, path)
    merged.check(path)
    return merged


def _add_sums(one: AxisSums, other: AxisSums, path: Path) -> AxisSums:
    if not np.allclose(one.weight_norm, other.weight_norm, rtol=NORM_TOLERANCE, atol=0):
        raise _refused(path, "has other weights", "the same norms", "others", SAME_MODEL)
    return AxisSums(
        one.sum_sq + other.sum_sq,
        one.sum_abs + other.sum_abs,
        one.tokens + other.tokens,
        one.sum_l2 + other.sum_l2,
        one.weight_norm,
    )


def _add_info(one: StatsInfo, other: StatsInfo) -> StatsInfo:
    texts = sorted([*one.texts, *other.texts])
    return msgspec.structs.replace(
        one,
        text_digest=hashlib.sha256("".join(texts).encode()).hexdigest(),
        parts=texts,
        samples=one.samples + other.samples,
        tokens=one.tokens + other.tokens,
    )


def _refused(path: Path, problem: str, expected: Any, found: Any, fix: str) -> StatsError:
    return StatsError(path, f"cannot be merged: {problem}", expected=expected, found=found, fix=fix)


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value
