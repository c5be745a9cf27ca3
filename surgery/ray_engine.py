"""Shards as Ray tasks over a file system that all nodes share."""

from collections.abc import Mapping
from dataclasses import replace
from uuid import uuid4

from surgery.cluster import RETRIES, cluster, results
from surgery.progress import Advance
from surgery.shard import ShardTask, write_shard
from surgery.writer import OutputDirectory


def write_shards_on_ray(
    directory: OutputDirectory, tasks: Mapping[str, ShardTask], progress: Advance
) -> None:
    """Write shards by name, one for each CPU of the cluster at a time.

    A shard whose node is lost begins anew on another. Only this process writes the journal.

    Raises:
        SurgeryError: as ``results``.
    """

    def done(name: str, _: object) -> None:
        directory.finish(name)
        progress(sum(tensor.nbytes for tensor in tasks[name].tensors))

    with cluster() as ray:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(
            shard_task
        )
        results(ray, {remote.remote(task): name for name, task in tasks.items()}, done)


def shard_task(task: ShardTask) -> None:
    """Write one shard; in a file of its own, as a lost node may still be writing its own."""
    write_shard(replace(task, attempt=f".{uuid4().hex}"))
