"""The sum of channel statistics of separate texts."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import StatsError
from surgery.stats.channel_stats import AGAIN, AxisSums, ChannelStats, StatsInfo, read_info

SAME_MODEL = "merge statistics of the same checkpoint"
NORM_TOLERANCE = 1e-9
"""Machines add the squares of a column in different orders, so norms differ a little."""

SAME = {
    "fingerprint": ("another model's", SAME_MODEL),
    "bucket_edges": (
        "counted in other buckets of tokens",
        "calibrate with the same `vocab_sizes` and options of the vocabulary",
    ),
    "dtype": ("measured in another dtype", "calibrate with the same `dtype`"),
    "vocab_size": (
        "measured on text that another vocabulary tokenized",
        "calibrate with the same `vocab_size`",
    ),
    "seq_len": ("measured with other windows", "calibrate with the same `seq_len`"),
}
"""Field of StatsInfo → the problem where it differs, and the fix."""


def merge_stats(paths: Sequence[Path]) -> ChannelStats:
    """Add the statistics of runs over separate texts.

    Counts are exact. The sums are float64 and added in the order of the texts' digests, so the
    order of ``paths`` does not change the result. Merging in several steps may change the last
    bit. Two files are in memory at a time.

    Raises:
        StatsError: a file has another model, other buckets, dtype or windows than the first, or
            a text occurs twice.
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
        raise _refused(path, "has arrays of other shapes", None, None, AGAIN)
    with np.errstate(over="ignore"):  # the check below refuses sums that are not finite
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
    mine, theirs = one.arrays(), other.arrays()
    if mine.keys() != theirs.keys():
        raise _refused(path, "has no sums of the experts' outputs", None, None, AGAIN)
    return AxisSums.of(
        {
            part: array if part == "weight_norm" else array + theirs[part]
            for part, array in mine.items()
        }
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
