"""Parts of a calibration as Ray tasks over a file system that all nodes share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import numpy as np

from calib.calibrate import calibrate
from calib.device import choose_device, choose_dtype
from surgery.checkpoint import Checkpoint
from surgery.cluster import RETRIES, cluster, places, results
from surgery.layout import Layout
from surgery.merge import merge_stats
from surgery.part import Division, Part
from surgery.stats import ChannelStats


def calibrate_on_ray(
    layout: Layout,
    windows: list[np.ndarray],
    bucket_of: np.ndarray,
    bucket_edges: Sequence[int],
    division: Division,
    *,
    vocab_size: int | None,
    seq_len: int,
    device: str,
    dtype: str,
    progress: Callable[[int], object] = lambda windows: None,
) -> ChannelStats:
    """Take the statistics of ``windows`` in parts, each a task with a whole node or a GPU.

    A part whose node is lost begins anew on another. The result is bit for bit that of calibrating
    each ``part`` and merging them, whichever nodes did the work, if they compute alike.

    Args:
        layout: The model.
        windows: As for ``calibrate``, and so are ``bucket_of``, ``bucket_edges`` and ``seq_len``.
        bucket_of: See there.
        bucket_edges: See there.
        division: The number of parts, one for each window at most, and where tasks may write.
        vocab_size: See there.
        seq_len: See there.
        device: As on the command line; every node chooses its own.
        dtype: Likewise.
        progress: Called with windows × layers of each finished part.

    Raises:
        SurgeryError: as ``results``, or nodes that took statistics in different dtypes.
    """
    with (
        cluster() as ray,
        TemporaryDirectory(
            ".parts", "stats.", division.folder, ignore_cleanup_errors=True
        ) as folder,
    ):
        number, resources = places(ray, gpus=device != "cpu")
        count = min(division.parts or number, len(windows))
        task = ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **resources)(part_task)
        model = (layout.checkpoint.path.absolute(), layout.checkpoint.family)
        buckets = ray.put((bucket_of, list(bucket_edges)))
        chosen = {f"part {k}/{count}": Part(k, count).choose(windows) for k in range(1, count + 1)}
        tasks = {
            task.remote(
                *model, part, buckets, vocab_size, seq_len, device, dtype, Path(folder)
            ): name
            for name, part in chosen.items()
        }
        paths: list[Path] = []

        def done(name: str, path: Path) -> None:
            paths.append(path)
            progress(len(chosen[name]) * layout.num_hidden_layers)

        results(ray, tasks, done)
        return merge_stats(paths)


def part_task(
    model: Path,
    family: str | None,
    windows: list[np.ndarray],
    buckets: tuple[np.ndarray, list[int]],
    vocab_size: int | None,
    seq_len: int,
    device: str,
    dtype: str,
    folder: Path,
) -> Path:
    """Take the statistics of a part and return their file in ``folder``.

    Each attempt writes a file of its own: a lost node may still be at work.
    """
    layout = Layout.of(Checkpoint.open(model, family))
    where = choose_device(device)
    stats = calibrate(
        layout,
        windows,
        *buckets,
        vocab_size=vocab_size,
        seq_len=seq_len,
        device=where,
        dtype=choose_dtype(dtype, layout.checkpoint, where),
    )
    path = folder / uuid4().hex
    stats.save(path)
    return path
