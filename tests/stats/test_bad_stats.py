"""Damaged statistics, and those of another model, are refused in one line."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.command import Run
from tests.support.damage import (
    PLAN,
    SHARD_1,
    Case,
    assert_refused_and_nothing_written,
    config,
    cut,
    nothing,
    remove,
    stats,
)


def sums_of(layer: int, *shape: int, axis: str = "ffn") -> dict[str, np.ndarray]:
    """Statistics of ``shape`` (experts, I), as ``stats`` takes them."""
    shapes = dict.fromkeys(("sum_sq", "sum_abs"), (1, *shape))
    shapes |= dict.fromkeys(("sum_l2", "weight_norm"), shape)
    arrays = {part: np.ones(of_part) for part, of_part in shapes.items()}
    arrays["tokens"] = np.ones((1, *shape[:1]), np.int64)
    return {f"layers__{layer}__{axis}__{part}": array for part, array in arrays.items()}


CASES = [
    Case("statistics of another model", config(rms_norm_eps=1e-5), PLAN,
         ("stats.safetensors", "another model", "expected fingerprint", "found", "calibrate")),
    Case("statistics of another vocabulary",
         stats(token_counts=np.ones(3, np.int64), bucket_of=np.zeros(3, np.int64)), PLAN,
         ("stats.safetensors", "other sizes", "expected (3, {'ffn': (1, 96)}, 640)",
          "found (3, {'ffn': (1, 96)}, 3)", "calibrate again")),
    Case("statistics of other channels",
         stats(**sums_of(1, 1, 80)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 1", "expected (3, {'ffn': (1, 96)}, 640)",
          "found (3, {'ffn': (1, 80)}, 640)", "calibrate again")),
    Case("statistics of experts",
         stats(**sums_of(2, 4, 96)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 2", "found (3, {'ffn': (4, 96)}, 640)",
          "calibrate again")),
    Case("statistics with an axis too many",
         stats(**sums_of(0, 1, 96, axis="shared")), PLAN,
         ("stats.safetensors", "other sizes", "of layer 0", "'shared': (1, 96)", "calibrate")),
    Case("statistics of too few layers",
         stats(**dict.fromkeys(sums_of(2, 1, 96)), cosines=np.ones(2)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 2",
          "expected (3, {'ffn': (1, 96)}, 640)", "found (2, 640)", "calibrate again")),
    Case("statistics of too many layers",
         stats(**sums_of(3, 1, 96), cosines=np.ones(4)), PLAN,
         ("stats.safetensors", "other sizes", "of layer 3", "expected (3, 640)",
          "found (4, {'ffn': (1, 96)}, 640)", "calibrate again")),
    Case("statistics without a layer",
         stats(**dict.fromkeys(sums_of(1, 1, 96))), PLAN,
         ("stats.safetensors", "other sizes", "of layer 1", "found (3, {}, 640)", "calibrate")),
    Case("text for statistics", nothing, PLAN.replace("stats.safetensors", "text.txt"),
         ("text.txt", "not a statistics file", "found", "calibrate again")),
    Case("weights for statistics", nothing, PLAN.replace("stats.safetensors", f"model/{SHARD_1}"),
         (SHARD_1, "not a statistics file", "found", "calibrate again")),
    Case("statistics not there", remove("stats.safetensors"), PLAN,
         ("stats.safetensors", "No such file", "name the file that calibrate wrote")),
    Case("statistics cut", cut("stats.safetensors", -8), PLAN,
         ("stats.safetensors", "not a statistics file", "found", "calibrate again")),
    Case("statistics of the next format", stats(format=4), PLAN,
         ("stats.safetensors", "another format", "expected 3", "found 4", "calibrate again")),
    Case("statistics without cosines", stats(cosines=None), PLAN,
         ("stats.safetensors", "lacks an array", "cosines", "calibrate again")),
    Case("statistics with a cosine too few", stats(cosines=np.ones(2)), PLAN,
         ("stats.safetensors: cosines", "each layer", "expected [3]", "found [2]", "calibrate")),
    Case("statistics with a cosine that is none", stats(cosines=np.full(3, np.nan)), PLAN,
         ("stats.safetensors: cosines", "not finite", "calibrate again")),
    Case("statistics whose cosines are whole numbers", stats(cosines=np.ones(3, np.int64)), PLAN,
         ("stats.safetensors: cosines", "dtype", "expected float64", "calibrate again")),
    Case("statistics without norms", stats(layers__1__ffn__weight_norm=None), PLAN,
         ("stats.safetensors", "lacks an array", "layers.1.ffn.weight_norm", "calibrate again")),
    Case("statistics with norms by bucket", stats(layers__1__ffn__sum_l2=np.ones((1, 1, 96))), PLAN,
         ("stats.safetensors: layers.1.ffn", "different shapes", "calibrate again")),
    Case("statistics with an endless norm",
         stats(layers__1__ffn__weight_norm=np.full((1, 96), np.inf)), PLAN,
         ("stats.safetensors: layers.1.ffn", "not finite", "calibrate again")),
    Case("statistics without counts", stats(token_counts=None), PLAN,
         ("stats.safetensors", "lacks an array", "token_counts", "calibrate again")),
    Case("statistics without sums", stats(layers__1__ffn__sum_abs=None), PLAN,
         ("stats.safetensors", "lacks an array", "layers.1.ffn.sum_abs", "calibrate again")),
    Case("statistics with an array too many", stats(layers__0__ffn__mean=np.ones(1)), PLAN,
         ("stats.safetensors: layers.0.ffn.mean", "not an array of statistics", "calibrate again")),
    Case("statistics of an unknown axis", stats(layers__0__heads__sum_sq=np.ones(1)), PLAN,
         ("stats.safetensors: layers.0.heads.sum_sq", "not an array of statistics", "calibrate")),
    Case("statistics with NaN", stats(layers__0__ffn__sum_sq=np.full((1, 1, 96), np.nan)), PLAN,
         ("stats.safetensors: layers.0.ffn", "not finite", "calibrate again")),
    Case("statistics of odd shape", stats(layers__0__ffn__sum_sq=np.ones((2, 1, 96))), PLAN,
         ("stats.safetensors: layers.0.ffn", "different shapes", "expected [1, experts, I]",
          "found", "calibrate again")),
    Case("statistics of the first format's shape", stats(layers__0__ffn__sum_sq=np.ones((1, 96))),
         PLAN, ("stats.safetensors: layers.0.ffn", "different shapes", "calibrate again")),
    Case("statistics of tokens by bucket alone",
         stats(layers__0__ffn__tokens=np.ones(1, np.int64)), PLAN,
         ("stats.safetensors: layers.0.ffn", "different shapes", "found", "calibrate again")),
    Case("statistics of tokens below 0",
         stats(layers__0__ffn__tokens=np.full((1, 1), -1)), PLAN,
         ("stats.safetensors: layers.0.ffn", "count below 0", "calibrate again")),
    Case("statistics whose buckets are no whole numbers", stats(bucket_of=np.zeros(640)), PLAN,
         ("stats.safetensors", "dtype", "expected int64", "found float64", "calibrate again")),
    Case("statistics whose counts are no whole numbers", stats(token_counts=np.ones(640)), PLAN,
         ("stats.safetensors", "dtype", "expected int64", "found float64", "calibrate again")),
    Case("statistics in single precision",
         stats(layers__0__ffn__sum_sq=np.ones((1, 1, 96), np.float32)), PLAN,
         ("stats.safetensors: layers.0.ffn", "dtype", "expected float64", "found float32",
          "calibrate again")),
    Case("statistics whose tokens are no whole numbers",
         stats(layers__0__ffn__tokens=np.ones((1, 1))), PLAN,
         ("stats.safetensors: layers.0.ffn", "dtype", "expected int64", "found float64",
          "calibrate again")),
    Case("statistics with a bucket too many", stats(bucket_of=np.full(640, 1)), PLAN,
         ("stats.safetensors", "do not fit", "calibrate again")),
    Case("statistics with a bucket below 0", stats(bucket_of=np.full(640, -1)), PLAN,
         ("stats.safetensors", "do not fit", "calibrate again")),
    Case("statistics of no tokens", stats(token_counts=np.ones(0, np.int64),
         bucket_of=np.ones(0, np.int64)), PLAN, ("stats.safetensors", "calibrate")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_line_and_nothing_written(case: Case, bench: Path, run: Run) -> None:
    assert_refused_and_nothing_written(case, bench, run)
