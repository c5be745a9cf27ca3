"""Shards as Ray tasks over a file system that all nodes share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

from surgery.apply import write_shard
from surgery.checkpoint import Checkpoint
from surgery.cluster import RETRIES, cluster, results
from surgery.edits import OutputTensor
from surgery.shard_file import IO
from surgery.writer import OutputDirectory


def write_shards_on_ray(
    directory: OutputDirectory,
    checkpoint: Checkpoint,
    todo: Mapping[str, list[OutputTensor]],
    io: IO,
    progress: Callable[[int], object],
) -> None:
    """Write the shards of ``todo``, one for each CPU of the cluster at a time.

    A shard whose node is lost begins anew on another. Only this process writes the journal.

    Raises:
        SurgeryError: as ``results``.
    """

    def done(name: str, _: object) -> None:
        directory.finish(name)
        progress(sum(tensor.nbytes for tensor in todo[name]))

    partial = directory.partial.absolute()  # a node's working directory is its own
    with cluster() as ray:
        task = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(shard_task)
        tasks = {}
        for name, shard in todo.items():
            metadata = checkpoint.shards[name].metadata
            tasks[task.remote(partial, checkpoint.path / name, shard, metadata, io)] = name
        results(ray, tasks, done)


def shard_task(
    partial: Path, source: Path, shard: list[OutputTensor], metadata: dict[str, str], io: IO
) -> None:
    """Write one shard; in a file of its own, as a lost node may still be writing its own."""
    write_shard(partial, source, shard, metadata, io, attempt=f".{uuid4().hex}")
