"""One output shard, written whole or not at all: its header, then its tensors edit by edit."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from surgery.edits import OutputTensor
from surgery.header import encode_header
from surgery.progress import Advance, no_advance
from surgery.stream import open_shard, stream_edit, write_all
from surgery.writer import new_shard


def write_shard(
    partial: Path,
    source: Path,
    shard: list[OutputTensor],
    metadata: Mapping[str, str],
    progress: Advance = no_advance,
    *,
    attempt: str = "",
) -> None:
    """Write one output shard: its header, then its tensors in the source's order.

    Args:
        partial: The directory it appears in, whole or not at all, under the source shard's name.
        source: The source shard.
        shard: Its tensors.
        metadata: Of its header.
        progress: Called with the bytes of each finished tensor.
        attempt: As for ``new_shard``.
    """
    paths = {source, *(edit.source.path for tensor in shard for edit in tensor.edits)}
    with ExitStack() as stack, new_shard(partial, source.name, attempt) as output:
        opened = {path: stack.enter_context(open_shard(path)) for path in paths}
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
        write_all(output, memoryview(encode_header(entries, metadata)))
        for tensor in shard:
            for edit in tensor.edits:
                stream_edit(edit, opened[edit.source.path], output)
            progress(tensor.nbytes)
