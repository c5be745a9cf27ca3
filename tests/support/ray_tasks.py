"""Tasks that tests run on a Ray cluster in place of the real ones; workers import this module."""

import errno
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from surgery.apply.output_directory import new_shard
from surgery.apply.shard import ShardTask, write_shard

VICTIM = "victim"
"""The file that names the node to lose."""


def begin(place: Path) -> bool:
    """Note in ``place`` that a task began, and say whether it was the first.

    The first one's node is named in the file ``VICTIM``.
    """
    import ray

    (place / f"begun-{uuid4().hex}").touch()
    named = place / f"{uuid4().hex}.node"
    named.write_text(ray.get_runtime_context().get_node_id())
    try:
        os.link(named, place / VICTIM)
    except FileExistsError:
        return False
    return True


def attempts(place: Path) -> int:
    """How many tasks began."""
    return len(list(place.glob("begun-*")))


def stalled_part(*arguments: Any) -> Path:
    """The first part waits until it is lost with its node."""
    from calib.statistics.prepare import part_task

    folder: Path = arguments[0].folder
    if begin(folder.parent):
        (folder / "half").write_text("half a file")
        time.sleep(300)
    return part_task(*arguments)


def stalled_shard(task: ShardTask) -> None:
    """The first shard waits, half written, until it is lost with its node."""
    if begin(task.partial.parent):
        with new_shard(task.partial, task.source.name) as descriptor:
            os.write(descriptor, b"half a shard")
            time.sleep(300)
    write_shard(task)


def full_disk(task: ShardTask) -> None:
    """All shards are written but the last, once the others are there."""
    if "00005-of" not in task.source.name:
        write_shard(task)
        return
    while len(list(task.partial.glob("*.safetensors"))) < 4:
        time.sleep(0.05)
    time.sleep(1)  # the driver notes them
    raise OSError(errno.ENOSPC, "No space left on device", str(task.partial / task.source.name))


def dying_shard(*_: Any) -> None:
    """The process dies whenever it comes to a shard."""
    os._exit(1)
