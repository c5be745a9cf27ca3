"""Bytes, disk and memory that applying a plan takes, predicted from its edits."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.apply.edits import OutputTensor, edits
from surgery.apply.shard import WINDOW_BYTES, bytes_read
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.files.model_files import tokenizer_files
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import ShardFile
from surgery.hub.shards import Shards
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.process import PIECE_BYTES, PIECES, Seconds, with_slack, write_pace
from surgery.tokenizer.legacy import is_legacy

PROGRAM_BYTES = 44_000_000
"""Peak memory of the program on a model of some kilobytes."""

TOKENIZER_BYTES, PRUNED_BYTES, LEGACY_BYTES, WHOLE_BYTES = 21_000_000, 1.5, 26, 1.2
"""Further memory: a constant where the vocabulary is pruned; then bytes for each byte of a
tokenizer that is pruned, is built from vocab.json and merges.txt and pruned, or is kept whole.

Measured: SmolLM2 75 MB (predicted 70), without tokenizer.json 97 (98); Llama 3.1's tokenizer 77
(79); Qwen 3's 76 (82), without tokenizer.json 191 (189); Gemma 3's 110 to 122 (115), the most where
nearly all tokens are kept or there is a tokenizer.model."""

WINDOWS, DEQUANTIZING, COLLAPSING = 2, 5, 8
"""Windows that a job holds: usually, where FP8 becomes bf16, and where layers are merged."""

DECODING = 24
"""Bytes for each value of a matrix that is decoded whole: of its index, and in three dtypes."""


@dataclass(frozen=True)
class ApplyCost:
    """What an apply takes, predicted from headers; bytes are those of tensors."""

    read_bytes: int
    """Bytes read from the source's shards."""
    written_bytes: int
    disk_bytes: int
    """Bytes that have to be free on the disk."""
    memory_bytes: int
    """Peak resident memory."""

    def table(self) -> str:
        """Return the figures as lines for people."""
        rows = (
            ("peak memory", self.memory_bytes),
            ("disk", self.disk_bytes),
            ("read", self.read_bytes),
            ("written", self.written_bytes),
        )
        return "\n".join(f"{name:<26}{size / 1e6:>12,.0f} MB" for name, size in rows)

    def line(self) -> str:
        """Return the figures as one line for people."""
        read, written, disk = (
            f"{n / 1e6:,.1f} MB" for n in (self.read_bytes, self.written_bytes, self.disk_bytes)
        )
        memory = round(self.memory_bytes / 1e6)
        return (
            f"apply will read {read}, write {written}, need {disk} of disk "
            f"and about {memory:,} MB of memory"
        )


def apply_cost(plan: Plan, layout: Layout, jobs: int) -> ApplyCost:
    """Predict what it takes to apply a complete ``plan`` with ``jobs`` shards at a time."""
    return cost_of(plan, layout.checkpoint, edits(plan, layout), jobs)


def cost_of(
    plan: Plan, checkpoint: Checkpoint, shards: Mapping[str, Sequence[OutputTensor]], jobs: int
) -> ApplyCost:
    """Predict what it takes to write ``shards`` of the output of ``plan``, as ``apply_cost``."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    written = sum(tensor.nbytes for tensor in tensors)
    return ApplyCost(
        sum(bytes_read(edit) for tensor in tensors for edit in tensor.edits) + _scales(tensors),
        written,
        written,
        _memory(plan, checkpoint, min(jobs, len(shards)), _largest_window(tensors)),
    )


def apply_seconds(cost: ApplyCost, layout: Layout, output: Path, prepare: float) -> Seconds | None:
    """Estimate the time of an apply by the pace of both disks; nothing is left behind.

    At least: reading and writing are hidden by each other. At most: they come one after the other,
    each as slow as its slowest piece.

    Args:
        cost: What the apply takes.
        layout: The source. For a model on the hub, there is no estimate.
        output: Directory that apply is to write.
        prepare: Seconds that the files beside the weights take.
    """
    if Shards.of(layout.checkpoint.path).remote:
        return None
    read, write = read_pace(layout), write_pace(output.parent)
    if read is None or write is None:
        return None
    reading, writing = (
        [total * pace for pace in paces]
        for total, paces in ((cost.read_bytes, read), (cost.written_bytes, write))
    )
    low = prepare + max(reading[0], writing[0])
    return with_slack(low, prepare + reading[1] + writing[1])


def read_pace(layout: Layout) -> Seconds | None:
    """Return the seconds that a byte of the source's largest shard takes, at least and at most.

    Pieces are read from all over it. None where it has no byte.
    """
    path = max(
        (tensor.path for tensor in layout.checkpoint.tensors.values()),
        key=lambda path: path.stat().st_size,
    )
    size, found = path.stat().st_size, []
    with ShardFile(path) as shard:
        piece = min(PIECE_BYTES, size)
        buffer = bytearray(piece)
        for offset in range(0, size - piece + 1, max(1, (size - piece) // (PIECES - 1))):
            start = time.perf_counter()
            shard.read_into(memoryview(buffer), offset)
            found.append((time.perf_counter() - start) / piece)
    return (min(found), max(found)) if found else None


def _scales(tensors: Iterable[OutputTensor]) -> int:
    """Return the bytes of the scales that are multiplied into their weights."""
    scalings = (edit.scaling for tensor in tensors for edit in tensor.edits)
    refs: list[TensorRef] = [scaling.scales for scaling in scalings if scaling is not None]
    return sum(ref.nbytes for ref in refs)


def _largest_window(tensors: Iterable[OutputTensor]) -> int:
    """Return the most values of a matrix that are decoded at a time."""
    matrices = (edit.matrix for tensor in tensors for edit in tensor.edits)
    return max((each.window_rows * each.shape[1] for each in matrices if each), default=0)


def _memory(plan: Plan, checkpoint: Checkpoint, jobs: int, decoded: int) -> int:
    """Return the peak: the files beside the weights are done before the first window is read.

    ``decoded`` are the most values of a matrix that are decoded at a time.
    """
    nbytes = sum(path.stat().st_size for path in tokenizer_files(checkpoint.path))
    pruned = not plan.ids().identity
    per_byte = LEGACY_BYTES if is_legacy(checkpoint.path) else PRUNED_BYTES
    tokenizer = TOKENIZER_BYTES + per_byte * nbytes if pruned else WHOLE_BYTES * nbytes
    held = DEQUANTIZING if plan.dequantize else WINDOWS
    if any(len(group) > 1 for group in plan.layers):
        held = COLLAPSING
    windows = jobs * max(held * WINDOW_BYTES, DECODING * decoded)
    return PROGRAM_BYTES + max(round(tokenizer), windows)
