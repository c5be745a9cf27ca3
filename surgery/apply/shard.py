"""One output shard: edits streamed through small windows; it appears whole or not at all."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surgery.apply.edits import Edit, OutputTensor, Scaling
from surgery.apply.output_directory import new_shard
from surgery.checkpoint.fp8 import VALUES, Float32, dequantize, from_bf16, read_scales, to_bf16
from surgery.checkpoint.opaque import OpaqueMatrix
from surgery.errors import GET_AGAIN, NotFiniteError
from surgery.files.index_sets import runs
from surgery.files.safetensors_header import TensorRef, encode_header
from surgery.files.shard_file import Buffer, Bytes, ShardFile
from surgery.hub.shards import Shards
from surgery.process import Advance, no_advance

Bits = NDArray[np.unsignedinteger]

STRIP = 1 << 15
"""Elements at a time, so that intermediate results fit in the processor's cache."""


def collapse(first: Bits, others: Iterable[Bits], dtype: str) -> None:
    """Replace ``first`` by ``first`` + Σ (other − first), added in order in float32.

    The sum is rounded once, to nearest even, to the dtype of the file.

    Args:
        first: Elements as plain bits, contiguous.
        others: Elements at the same positions of the other layers, one layer at a time.
        dtype: BF16, F16 or F32, as in safetensors.
    """
    own = first.reshape(-1)
    total = np.empty(own.shape, np.float32)
    strips = [slice(start, start + STRIP) for start in range(0, len(own), STRIP)]
    for strip in strips:
        total[strip] = _decode(own[strip], dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # ``check_finite`` sees the result
        for other in others:
            terms = other.reshape(-1)
            for strip in strips:
                total[strip] += _decode(terms[strip], dtype) - _decode(own[strip], dtype)
        for strip in strips:
            own[strip] = _encode(total[strip], dtype)


def _decode(bits: Bits, dtype: str) -> Float32:
    if dtype == "BF16":
        return from_bf16(bits.astype(np.uint16, copy=False))
    values = bits.view(np.float16 if dtype == "F16" else np.float32)
    return values.astype(np.float32, copy=False)


def _encode(values: Float32, dtype: str) -> Bits:
    if dtype == "BF16":
        return to_bf16(values)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)


WINDOW_BYTES = 1 << 20
"""Most bytes read or written at a time. An edit takes two such windows of memory, five where FP8
becomes bf16.

Windows fit in the processor's cache: at 16 MiB, the columns of the 8B shape took 0.9 s, not 0.37.
A window that is read and written takes less of the kernel than ``copy_file_range``, whose pages are
of 4 KB, and than one that is mapped: 8.3, 9.7 and 16.5 s of CPU for 16 GB of an export.
"""

EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""dtype → the bits of its exponent; all of them are set in NaN and infinity alone."""


def check_finite(bits: Bits, dtype: str, source: TensorRef) -> None:
    """Refuse NaN and infinity among numbers that were computed, as plain ``bits``.

    What is copied is not looked at.

    Raises:
        NotFiniteError: it names the tensor ``source``.
    """
    if (bits << 1).max(initial=0) >= EXPONENT[dtype] << 1:
        raise NotFiniteError(
            f"{source.path}: tensor {source.name}",
            "does not give finite numbers",
            found=f"NaN or infinity in {dtype}",
            fix=GET_AGAIN,
        )


DTYPE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Item size → dtype: elements are moved as plain bits."""


def stream_edit(edit: Edit, source: ShardFile, output: int) -> None:
    """Append the bytes of ``edit`` to file descriptor ``output``, reading from ``source``.

    Scales of FP8 are read whole from their own shard. Other layers to add are read a window at a
    time, from theirs.

    Raises:
        CheckpointError: the source shard ends early.
        NotFiniteError: a number that is computed is NaN or infinity; what is copied may be.
    """
    for window in edit_windows(edit, source):
        write_all(output, window)


def bytes_read(edit: Edit) -> int:
    """Return the bytes that ``edit_windows`` reads; gaps between short pieces count as well."""
    ranges = _long_ranges(edit)
    if edit.matrix is not None:
        return sum(ref.nbytes for ref in edit.matrix.refs)
    if ranges is not None:
        own = sum(length for _, length in ranges)
    elif edit.indices is None:
        own = edit.source.nbytes
    else:
        columns = math.prod(edit.source.shape[edit.dim + 1 :])
        blocks = _kept_blocks(edit, edit.indices)
        own = sum(rows * (stop - start) for _, rows, start, stop, _ in blocks)
        own *= columns * edit.source.itemsize
    return own + sum(term.nbytes for term in edit.terms)


def edit_windows(edit: Edit, source: ShardFile) -> Iterator[memoryview]:
    """Yield the output bytes of ``edit``, at most a window at a time, in order."""
    tensor, indices, ranges = edit.source, edit.indices, _long_ranges(edit)
    if edit.numbers:
        integers = np.array(edit.numbers, f"<i{tensor.itemsize}")
        yield integers.data.cast("B")
    elif edit.matrix is not None:
        yield from _decoded(edit.matrix, edit.dim, indices)
    elif ranges is not None:
        for offset, length in ranges:
            yield from source.windows(offset, length, WINDOW_BYTES)
    else:
        every = np.arange(tensor.shape[edit.dim]) if indices is None else indices
        yield from _gather(edit, every, source)


def _decoded(matrix: OpaqueMatrix, dim: int, indices: np.ndarray | None) -> Iterator[memoryview]:
    """Yield the bf16 bytes of a decoded matrix, of which ``indices`` are kept on ``dim``."""
    for first, window in matrix.windows():
        kept = indices
        if indices is not None and dim == 0:
            start, stop = np.searchsorted(indices, (first, first + window.shape[0]))
            kept = indices[start:stop] - first
        if kept is None or len(kept):
            values = window.decode(Shards())
            chosen = values if kept is None else values.take(kept, axis=dim)
            bits = to_bf16(np.ascontiguousarray(chosen))
            check_finite(bits, "BF16", matrix.codes)
            yield bits.reshape(-1).data.cast("B")


def write_all(output: int, data: memoryview) -> None:
    """Append all of ``data`` to ``output``."""
    while data:
        data = data[os.write(output, data) :]


def _long_ranges(edit: Edit) -> list[tuple[int, int]] | None:
    """Return (offset, length) of what is read without gaps; None if it must change, or where its
    runs are shorter than a window on average: those are gathered from windows.
    """
    tensor = edit.source
    if edit.scaling is not None or edit.terms or edit.matrix is not None or edit.numbers:
        return None
    if edit.indices is None:
        return [(tensor.start, tensor.nbytes)]
    starts, stops = runs(edit.indices)
    if edit.dim != 0 or edit.nbytes < WINDOW_BYTES * len(starts):
        return None
    inner = math.prod(tensor.shape[1:]) * tensor.itemsize
    pairs = zip(starts.tolist(), stops.tolist(), strict=True)
    return [(tensor.start + first * inner, (last - first) * inner) for first, last in pairs]


def _gather(edit: Edit, indices: np.ndarray, source: ShardFile) -> Iterator[memoryview]:
    """Yield the kept positions of blocks ``[rows, positions, columns]``."""
    taken = Buffer()
    with _SourceBlocks(edit, source) as blocks:
        for row, rows, start, stop, kept in _kept_blocks(edit, indices):
            inside = kept - start
            block = blocks.read(row, rows, start, stop)
            shape = (rows, len(inside), block.shape[2])
            result = _elements(taken.take(math.prod(shape) * edit.itemsize), edit.itemsize, shape)
            # mode="clip" writes straight into ``out``; the indices were checked with the plan.
            np.take(block, inside, axis=1, out=result, mode="clip")
            if edit.scaling is not None:
                check_finite(result, "BF16", edit.source)
            elif edit.terms:
                check_finite(result, edit.source.dtype, edit.source)
            yield result.reshape(-1).data.cast("B")


class _SourceBlocks:
    """Reads blocks ``[rows, positions, columns]`` of an edit's source.

    It adds other layers to them, and dequantizes FP8.
    """

    def __init__(self, edit: Edit, source: ShardFile) -> None:
        self._edit, self._source = edit, source
        self._buffer, self._other = Buffer(), Buffer()
        self._stack = ExitStack()

    def __enter__(self) -> "_SourceBlocks":
        with ExitStack() as stack:
            self._terms = [
                (term, stack.enter_context(ShardFile(term.path))) for term in self._edit.terms
            ]
            scaling = self._edit.scaling
            self._scales = read_scales(scaling.scales) if scaling else np.empty(0, np.float32)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, row: int, rows: int, start: int, stop: int) -> np.ndarray:
        """Return ``rows`` from ``row`` on, at positions ``start`` to ``stop``."""
        edit, tensor = self._edit, self._edit.source
        columns = math.prod(tensor.shape[edit.dim + 1 :])
        shape = (rows, stop - start, columns)
        offset = (row * tensor.shape[edit.dim] + start) * columns * tensor.itemsize
        block = self._window(tensor, self._source, offset, shape, self._buffer)
        if self._terms:
            collapse(block, self._others(offset, shape), tensor.dtype)
        elif edit.scaling is not None:
            block = _dequantized(edit, edit.scaling, self._scales, block, (row, start))
        return block

    def _others(self, offset: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the same block of each other layer, valid until the next one."""
        for term, shard in self._terms:
            yield self._window(term, shard, offset, shape, self._other)

    @staticmethod
    def _window(
        tensor: TensorRef, shard: ShardFile, offset: int, shape: tuple[int, ...], buffer: Buffer
    ) -> np.ndarray:
        nbytes = math.prod(shape) * tensor.itemsize
        return _elements(
            shard.window(tensor.start + offset, nbytes, buffer), tensor.itemsize, shape
        )


def _elements(data: Bytes, itemsize: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return ``data`` as elements of plain bits."""
    return data.view(DTYPE[itemsize]).reshape(shape)


def _dequantized(
    edit: Edit, scaling: Scaling, scales: Float32, block: np.ndarray, at: tuple[int, int]
) -> np.ndarray:
    """Return a window ``[rows, positions, columns]`` as bf16; it begins ``at`` (row, position)."""
    row, start = at
    codes = block[0] if edit.dim == 0 else block[:, :, 0]
    first_row, first_col = (start, 0) if edit.dim == 0 else (row, start)
    values = VALUES[edit.source.dtype]
    bits = dequantize(codes, scales, first_row, first_col, scaling.block_shape, values)
    return bits.reshape(block.shape)


def _kept_blocks(
    edit: Edit, indices: np.ndarray
) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """Yield of each block (first row, rows, start, stop) and the ``indices`` in it.

    A block of one row begins and ends at kept positions, and one without any is not read. In
    several rows, these positions are not neighbours in the file.
    """
    for row, rows, start, stop in _blocks(edit):
        first, last = np.searchsorted(indices, (start, stop))
        if first < last:
            kept = indices[first:last]
            if rows == 1:
                start, stop = int(kept[0]), int(kept[-1]) + 1
            yield row, rows, start, stop, kept


def _blocks(edit: Edit) -> Iterator[tuple[int, int, int, int]]:
    """Split ``[rows, positions, columns]`` into (first row, rows, start, stop), a window each."""
    shape = edit.source.shape
    rows, positions = math.prod(shape[: edit.dim]), shape[edit.dim]
    position_bytes = max(1, math.prod(shape[edit.dim + 1 :]) * edit.itemsize)
    whole_rows = WINDOW_BYTES // max(1, positions * position_bytes)
    if whole_rows:
        for row in range(0, rows, whole_rows):
            yield row, min(whole_rows, rows - row), 0, positions
        return
    step = max(1, WINDOW_BYTES // position_bytes)
    for row in range(rows):
        for start in range(0, positions, step):
            yield row, 1, start, min(start + step, positions)


@dataclass(frozen=True)
class ShardTask:
    """All that is needed to write a shard; it can be sent to another machine."""

    partial: Path
    """Directory that the shard appears in, under the source shard's name."""
    source: Path
    """The source shard."""
    tensors: Sequence[OutputTensor]
    """Its tensors, in the source's order."""
    metadata: Mapping[str, str]
    """Metadata of its header."""


SPAN_BYTES = 1 << 16
"""Positions of a selection that are at least this long are fetched from the hub one by one."""

Span = tuple[int, int]
"""First and one-past-last byte in a shard."""


def spans_of(task: ShardTask) -> list[Span] | None:
    """Return the bytes of the source shard that a task copies; None if it needs other ones."""
    spans: list[Span] = []
    for edit in (edit for tensor in task.tensors for edit in tensor.edits):
        plain = not (edit.terms or edit.scaling or edit.matrix or edit.replaces)
        if not plain or edit.source.path != task.source:
            return None
        for start, stop in _spans(edit):
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
    return spans


def from_spans(task: ShardTask, path: Path) -> ShardTask:
    """Return the task on a file that holds the bytes of ``spans_of``, one after another."""
    tensors, offset = [], 0
    for tensor in task.tensors:
        moved = []
        for edit in tensor.edits:
            ref, indices = edit.source, edit.indices
            if indices is not None and _is_spanned(edit):
                ref, indices = replace(ref, shape=(len(indices), *ref.shape[1:])), None
            ref = replace(ref, path=path, start=offset)
            moved.append(replace(edit, source=ref, indices=indices))
            offset += ref.nbytes
        tensors.append(replace(tensor, edits=tuple(moved)))
    return replace(task, tensors=tensors)


def _spans(edit: Edit) -> Iterator[Span]:
    ref, indices = edit.source, edit.indices
    if indices is None or not _is_spanned(edit):
        yield ref.start, ref.start + ref.nbytes
        return
    step = ref.nbytes // ref.shape[0]
    for first, stop in zip(*runs(indices), strict=True):
        yield ref.start + int(first) * step, ref.start + int(stop) * step


def _is_spanned(edit: Edit) -> bool:
    """Whether only the kept positions of an edit are fetched."""
    return edit.dim == 0 and edit.source.nbytes // edit.source.shape[0] >= SPAN_BYTES


def write_shard(task: ShardTask, progress: Advance = no_advance) -> None:
    """Write one output shard; ``progress`` is called with the bytes of each finished tensor."""
    tensors, source = task.tensors, task.source
    paths = {edit.source.path for tensor in tensors for edit in tensor.edits}
    with ExitStack() as stack, new_shard(task.partial, source.name) as output:
        opened = {path: stack.enter_context(ShardFile(path)) for path in paths}
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
        write_all(output, memoryview(encode_header(entries, task.metadata)))
        for tensor in tensors:
            for edit in tensor.edits:
                stream_edit(edit, opened[edit.source.path], output)
            progress(tensor.nbytes)
