"""Carry the bytes of one edit from a source shard to an output file through a small buffer."""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from surgery.collapse import collapse
from surgery.edits import Edit, Scaling
from surgery.errors import CheckpointError
from surgery.fp8 import VALUES, Float32, decode_scales, dequantize
from surgery.header import TensorRef
from surgery.selection import runs

WINDOW_BYTES = 1 << 20
"""Most bytes read or written at a time; two such buffers, five where FP8 becomes bf16, bound the
memory of an edit.

They stay in the processor's cache: at 16 MiB the columns of the 8B shape took 0.9 s, not 0.37.
Runs of a window's mean length are copied inside the kernel, shorter ones gathered here: at 20 KB a
run, rows took 0.84 s by kernel copies and 0.49 s gathered.
"""

DTYPE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Elements are moved as plain bits."""


def stream_edit(edit: Edit, source: int, output: int) -> None:
    """Append the bytes of ``edit`` to file descriptor ``output``, reading from ``source``.

    Scales of FP8 are read whole, from their own shard; so are other layers that are added to this
    one, a window at a time.

    Raises:
        CheckpointError: the source shard ends early.
    """
    ranges = _long_ranges(edit)
    if ranges is None:
        for window in edit_windows(edit, source):
            write_all(output, window)
        return
    for offset, length in ranges:
        _copy_range(edit.source.path, source, output, offset, length)


def bytes_read(edit: Edit) -> int:
    """Bytes of the source that ``stream_edit`` reads: short pieces with what lies between them."""
    ranges = _long_ranges(edit)
    own = edit.source.nbytes if ranges is None else sum(length for _, length in ranges)
    return own + sum(term.nbytes for term in edit.terms)


def edit_windows(edit: Edit, source: int) -> Iterator[memoryview]:
    """Yield the output bytes of ``edit``, at most a window at a time, in order."""
    tensor, indices = edit.source, edit.indices
    if indices is None and edit.scaling is None and not edit.terms:
        yield from raw_windows(tensor.path, source, tensor.start, tensor.nbytes)
    else:
        every = np.arange(tensor.shape[edit.dim]) if indices is None else indices
        yield from _gather(edit, every, source)


def write_all(output: int, data: memoryview) -> None:
    """Append all of ``data`` to ``output``."""
    while data:
        data = data[os.write(output, data) :]


@contextmanager
def open_shard(path: Path) -> Iterator[int]:
    """Yield a file descriptor that reads the shard ``path``.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        shard = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        yield shard
    finally:
        os.close(shard)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to say of a shard that was there when its header was read."""
    return CheckpointError(
        path,
        "shard cannot be read any more",
        found=error.strerror,
        fix="bring it back, then run again with `resume`",
    )


def read_scales(tensor: TensorRef) -> Float32:
    """The scales of an FP8 weight, from their own shard: one for 16,384 weights, usually.

    Raises:
        CheckpointError: the shard ends early.
    """
    raw = np.empty(tensor.nbytes, np.uint8)
    with open_shard(tensor.path) as shard:
        read_into(tensor.path, shard, raw.data, tensor.start)
    return decode_scales(raw, tensor.dtype).reshape(tensor.shape)


def _long_ranges(edit: Edit) -> list[tuple[int, int]] | None:
    """(offset, length) of the bytes that stay as they are, or None where that is short pieces."""
    tensor = edit.source
    if edit.scaling is not None or edit.terms:
        return None
    if edit.indices is None:
        return [(tensor.start, tensor.nbytes)]
    starts, stops = runs(edit.indices)
    if edit.dim != 0 or edit.nbytes < WINDOW_BYTES * len(starts):
        return None
    inner = math.prod(tensor.shape[1:]) * tensor.itemsize
    pairs = zip(starts.tolist(), stops.tolist(), strict=True)
    return [(tensor.start + first * inner, (last - first) * inner) for first, last in pairs]


def _gather(edit: Edit, indices: np.ndarray, source: int) -> Iterator[memoryview]:
    """Read windows of ``[rows, positions, columns]`` and take the kept positions."""
    tensor = edit.source
    positions, columns = tensor.shape[edit.dim], math.prod(tensor.shape[edit.dim + 1 :])
    buffer, other = _Window(tensor.itemsize), _Window(tensor.itemsize)
    taken = _Window(edit.itemsize)
    scales = read_scales(edit.scaling.scales) if edit.scaling else np.empty(0, np.float32)
    with ExitStack() as stack:
        opened = [(t, stack.enter_context(open_shard(t.path))) for t in edit.terms]
        for row, rows, start, stop in _blocks(edit):
            first, last = np.searchsorted(indices, (start, stop))
            inside = indices[first:last] - start
            shape = (rows, stop - start, columns)
            offset = (row * positions + start) * columns * tensor.itemsize
            block = buffer.read(tensor, source, shape, offset)
            if opened:
                others = (other.read(term, file, shape, offset) for term, file in opened)
                collapse(block, others, tensor.dtype)
            if edit.scaling is not None:
                block = _dequantized(edit, edit.scaling, scales, block, (row, start))
            result = taken.shaped((rows, len(inside), columns))
            # mode="clip" writes straight into ``out``; the indices were checked with the plan.
            np.take(block, inside, axis=1, out=result, mode="clip")
            yield result.reshape(-1).data.cast("B")


class _Window:
    """Memory for elements as plain bits, used for one block after the other."""

    def __init__(self, itemsize: int) -> None:
        self._memory = np.empty(0, DTYPE[itemsize])

    def shaped(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, of any content."""
        count = math.prod(shape)
        if count > len(self._memory):
            self._memory = np.empty(count, self._memory.dtype)
        return self._memory[:count].reshape(shape)

    def read(
        self, tensor: TensorRef, shard: int, shape: tuple[int, ...], offset: int
    ) -> np.ndarray:
        """Bytes of ``tensor`` from ``offset`` on, from its shard's file descriptor."""
        block = self.shaped(shape)
        read_into(tensor.path, shard, block.reshape(-1).data.cast("B"), tensor.start + offset)
        return block


def _dequantized(
    edit: Edit, scaling: Scaling, scales: Float32, block: np.ndarray, at: tuple[int, int]
) -> np.ndarray:
    """The bits in bf16 of a window ``[rows, positions, columns]`` that begins ``at`` a position."""
    row, start = at
    codes = block[0] if edit.dim == 0 else block[:, :, 0]
    first_row, first_col = (start, 0) if edit.dim == 0 else (row, start)
    values = VALUES[edit.source.dtype]
    bits = dequantize(codes, scales, first_row, first_col, scaling.block_shape, values)
    return bits.reshape(block.shape)


def _blocks(edit: Edit) -> Iterator[tuple[int, int, int, int]]:
    """Cut ``[rows, positions, columns]`` into (first row, rows, start, stop) of a window each."""
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


def _copy_range(path: Path, source: int, output: int, offset: int, length: int) -> None:
    """Append ``length`` bytes, inside the kernel as long as that works.

    What fails there is tried again by reading and writing, which tells whose fault it is.
    """
    with suppress(OSError):
        while length and hasattr(os, "copy_file_range"):
            count = os.copy_file_range(source, output, length, offset_src=offset)
            if count == 0:
                raise _ended_early(path, offset)
            offset, length = offset + count, length - count
    for window in raw_windows(path, source, offset, length):
        write_all(output, window)


def raw_windows(path: Path, source: int, offset: int, length: int) -> Iterator[memoryview]:
    """Yield ``length`` bytes from ``offset``, at most a window at a time."""
    buffer = memoryview(bytearray(min(length, WINDOW_BYTES)))
    while length:
        window = buffer[: min(length, WINDOW_BYTES)]
        read_into(path, source, window, offset)
        yield window
        offset, length = offset + len(window), length - len(window)


def read_into(path: Path, source: int, target: memoryview, offset: int) -> None:
    """Fill ``target`` from ``offset`` of the shard ``path``, open as ``source``.

    Raises:
        CheckpointError: the shard ends early, or cannot be read.
    """
    while target:
        try:
            count = os.preadv(source, [target], offset)
        except OSError as error:
            raise _unreadable(path, error) from error
        if count == 0:
            raise _ended_early(path, offset)
        target, offset = target[count:], offset + count


def _ended_early(path: Path, offset: int) -> CheckpointError:
    return CheckpointError(
        path,
        "shard ended early: it changed while it was read",
        expected=f"more than {offset} bytes",
        fix="bring it back as it was, then run again with `resume`",
    )
