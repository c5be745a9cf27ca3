"""JSON files of a checkpoint: read strictly, written with the source's key order."""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from surgery.errors import AMEND, CheckpointError

MAX_DEPTH = 100
"""Far above the nesting of any real file. Later recursion over a document may rely on it."""

MAX_BYTES = 1 << 27
"""Four times Gemma 3's tokenizer.json, the largest file that is read whole."""

MAX_MARKS = 1 << 23
"""Brackets, colons and commas: about one per value. A parsed value may take 100 bytes. Gemma 3's
tokenizer.json has a quarter of this."""

PIECE_BYTES = 1 << 20

BATCH = 4096
"""Entries of an object or an array that are written at a time."""

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""Do not wait for the writer of a FIFO. Windows has neither FIFOs nor this flag."""

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, key order kept.

    Raises:
        CheckpointError: missing, not UTF-8, not JSON, too deep, a key twice, NaN or infinity, or
            not an object.
    """
    return parse_json(_readable(path), path)


def read_json_value(path: Path) -> Any:
    """Return the value in ``path``, of any form.

    Raises:
        CheckpointError: as ``read_json``, except that it need not be an object.
    """
    return parse_json_value(_readable(path), path)


def _readable(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise CheckpointError(
            path, "cannot be read", found=error.strerror, fix="check the model directory"
        ) from error


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for reading.

    Raises:
        OSError: not a regular file: a FIFO could block for ever, a device could never end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


def read_file(path: Path) -> bytes:
    """Return the content of a file that is no shard.

    Raises:
        OSError: not a regular file, or more than ``MAX_BYTES`` or ``MAX_MARKS``.
    """
    with _open_bounded(path) as (file, size):
        raw = file.read(size)
    _check_marks(_marks(raw), path)
    return raw


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces.

    Raises:
        OSError: as ``read_file``.
    """
    marks = 0
    with _open_bounded(path) as (file, _):
        while piece := file.read(PIECE_BYTES):
            marks += _marks(piece)
            yield piece
    _check_marks(marks, path)


@contextmanager
def _open_bounded(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_BYTES:,} bytes", str(path))
        yield file, size


def _check_marks(marks: int, path: Path) -> None:
    if marks > MAX_MARKS:
        raise OSError(errno.EFBIG, f"more than {MAX_MARKS:,} values", str(path))


def parse_json(raw: bytes, where: Path) -> dict[str, Any]:
    """Parse ``raw`` as one JSON object; ``where`` names it in errors."""
    value = parse_json_value(raw, where)
    if not isinstance(value, dict):
        raise CheckpointError(
            where,
            "is not a JSON object",
            expected="an object",
            found=type(value).__name__,
            fix=AMEND,
        )
    return value


def parse_json_value(raw: bytes, where: object) -> Any:
    """Parse ``raw`` as JSON of any form, as strictly; ``where`` names it in errors."""
    try:
        if _marks(raw) > MAX_MARKS:
            raise ValueError(f"more than {MAX_MARKS:,} values")
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if SURROGATE.search(raw):  # a pair of surrogates is a character, a single one is not
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        check_depth(value)
    except RecursionError as error:
        raise CheckpointError(where, "JSON is nested too deeply", fix=AMEND) from error
    except ValueError as error:
        torn = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        fix = "download the file again" if torn else AMEND
        raise CheckpointError(where, "is not valid JSON", found=error, fix=fix) from error
    return value


def dump_json(value: object) -> bytes:
    """Return ``value`` in the hub's JSON layout: two spaces, UTF-8, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def dump_table(value: object) -> bytes:
    """Return the same layout by msgspec, in a fraction of the time and memory.

    Its numbers must fit 64 bits, and it writes 1e-05 as 1e-5. So configs use ``dump_json``.
    """
    return b"".join(table_pieces(value))


def table_pieces(value: object) -> Iterator[bytes]:
    """``dump_table`` in pieces; it takes mappings and iterables of any kind."""
    yield from _pieces(value, b"\n")
    yield b"\n"


def _pieces(value: object, margin: bytes) -> Iterator[bytes]:
    """``margin`` is the line break and the indentation before ``value``'s closing bracket."""
    if isinstance(value, dict) and 0 < len(value) <= BATCH:
        for number, (key, child) in enumerate(value.items()):
            yield (b"," if number else b"{") + margin + b"  " + msgspec.json.encode(key) + b": "
            yield from _pieces(child, margin + b"  ")
        yield margin + b"}"
    elif isinstance(value, Mapping):
        yield from _joined((dict(batch) for batch in _batches(value.items())), b"{}", margin)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        yield from _joined(_batches(value), b"[]", margin)
    else:
        yield _formatted(value, margin)


def _joined(batches: Iterable[object], brackets: bytes, margin: bytes) -> Iterator[bytes]:
    """Join the batches, none of them empty, into one object or array."""
    opening, closing = brackets[:1], brackets
    for batch in batches:
        yield opening + _formatted(batch, margin)[1 : -1 - len(margin)]
        opening, closing = b",", margin + brackets[1:]
    yield closing


def _batches(entries: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(entries)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _formatted(value: object, margin: bytes) -> bytes:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    return text.replace(b"\n", margin)


def _marks(raw: bytes) -> int:
    return sum(map(raw.count, (b"[", b"{", b":", b",")))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} twice")
            seen.add(key)
    return result


def check_depth(value: Any) -> None:
    """Raise RecursionError for a parsed document that is nested deeper than ``MAX_DEPTH``."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise RecursionError("nested too deeply")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the number {name}")
