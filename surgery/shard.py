"""One output shard, written whole or not at all: its header, then its tensors edit by edit."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from surgery.edits import OutputTensor
from surgery.header import encode_header
from surgery.progress import Advance, no_advance
from surgery.shard_file import IO, open_shard
from surgery.stream import stream_edit, write_all
from surgery.writer import new_shard


@dataclass(frozen=True)
class ShardTask:
    """What it takes to write a shard; it can be sent to another machine."""

    partial: Path
    """The directory it appears in, under the source shard's name."""
    source: Path
    """The source shard."""
    tensors: Sequence[OutputTensor]
    """In the source's order."""
    metadata: Mapping[str, str]
    """Of its header."""
    io: IO = "mmap"
    """How the source's shards are reached."""
    attempt: str = ""
    """As for ``new_shard``."""


def write_shard(task: ShardTask, progress: Advance = no_advance) -> None:
    """Write one output shard; ``progress`` is called with the bytes of each finished tensor."""
    tensors, source = task.tensors, task.source
    paths = {source, *(edit.source.path for tensor in tensors for edit in tensor.edits)}
    with ExitStack() as stack, new_shard(task.partial, source.name, task.attempt) as output:
        opened = {path: stack.enter_context(open_shard(path, task.io)) for path in paths}
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
        write_all(output, memoryview(encode_header(entries, task.metadata)))
        for tensor in tensors:
            for edit in tensor.edits:
                stream_edit(edit, opened[edit.source.path], output)
            progress(tensor.nbytes)
