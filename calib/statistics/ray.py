"""Run parts of a calibration as Ray tasks over a file system that all nodes share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import numpy as np

from calib.statistics.calibrate import Calibration, take_statistics
from calib.streaming.settings import ComputeOptions, PassSettings
from calib.streaming.weights import choose_device, choose_dtype
from calib.text.windows import Part
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.cluster import RETRIES, cluster, results, task_slots
from surgery.layout.build import read_layout
from surgery.process import Advance, no_advance, reuse_freed_memory
from surgery.stats.channel_stats import ChannelStats, merge_stats


@dataclass(frozen=True)
class PartTask:
    """What a node needs to take the statistics of some windows."""

    model: Path
    family: str | None
    windows: Sequence[np.ndarray]
    seq_len: int
    vocab_size: int | None
    compute: ComputeOptions
    """Each node chooses its device and dtype by these options."""
    folder: Path
    """A directory that all nodes can write to."""


def calibrate_on_ray(
    calibration: Calibration,
    compute: ComputeOptions,
    parts: int | None,
    folder: Path,
    progress: Advance = no_advance,
) -> ChannelStats:
    """Take the statistics of a calibration in parts, each a task with a whole node or a GPU.

    If a node is lost, its part starts again on another node. If all nodes compute alike, the result
    is bit for bit that of merging parts K/N which were taken separately.

    Args:
        calibration: Its settings are not used; each node chooses its own.
        compute: The options by which a node chooses.
        parts: Number of tasks, at most one for each window; None is one for each node or GPU.
        folder: A directory that all nodes can write to.
        progress: Called with windows × layers of each finished part.

    Raises:
        SurgeryError: as ``results``, or nodes took statistics in different dtypes.
    """
    layout, windows = calibration.layout, calibration.windows
    layers = layout.num_hidden_layers
    with (
        cluster() as ray,
        TemporaryDirectory(".parts", "stats.", folder, ignore_cleanup_errors=True) as own,
    ):
        number, resources = task_slots(ray, gpus=compute.device != "cpu")
        count = min(parts or number, len(windows))
        task = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **resources)(part_task)
        whole = PartTask(
            layout.checkpoint.path.absolute(),
            layout.checkpoint.family,
            windows,
            calibration.seq_len,
            calibration.vocab_size,
            compute,
            Path(own),
        )
        buckets = ray.put((calibration.bucket_of, list(calibration.bucket_edges)))
        chosen = {f"part {k}/{count}": Part(k, count).choose(windows) for k in range(1, count + 1)}
        tasks = {
            task.remote(replace(whole, windows=part), buckets): name
            for name, part in chosen.items()
        }
        paths: list[Path] = []

        def done(name: str, path: Path) -> None:
            paths.append(path)
            progress(len(chosen[name]) * layers)

        results(ray, tasks, done)
        return merge_stats(paths)


def part_task(part: PartTask, buckets: tuple[np.ndarray, list[int]]) -> Path:
    """Take the statistics of a part, write them into its folder, and return the file.

    Each attempt writes a file of its own, because a lost node may still be running.
    """
    layout = read_layout(Checkpoint.open(part.model, part.family))
    device = choose_device(part.compute.device)
    dtype = choose_dtype(part.compute.dtype, layout.checkpoint, device)
    reuse_freed_memory()
    stats = take_statistics(
        Calibration(
            layout,
            part.windows,
            part.seq_len,
            *buckets,
            PassSettings(device, dtype),
            part.vocab_size,
        )
    )
    path = part.folder / uuid4().hex
    stats.save(path)
    return path
