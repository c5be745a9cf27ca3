"""TEXT on the command line: files, directories or a hub data set, as documents."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import DataError

HUB = "hub:"


def read_documents(data: str, seed: int | None = None) -> Iterable[str]:
    """Yield the documents of TEXT in file order, or shuffled by ``seed``.

    Args:
        data: A .txt file (a blank line ends a document), a .jsonl file (field ``text``), a
            directory of them, or ``hub:name[:config][:split][:field]``.
        seed: Shuffles the documents, which are then all held in memory.

    Raises:
        DataError: nothing there, or a line that is not what the format says.
    """
    documents = _hub_documents(data) if data.startswith(HUB) else _local_documents(Path(data))
    if seed is None:
        return documents
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _local_documents(path: Path) -> Iterator[str]:
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            path,
            "does not exist" if not path.exists() else "is not a file",
            fix="name a .txt or .jsonl file or a directory",
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = False
    for file in files:
        if file.suffix not in READERS:
            if path.is_dir():
                continue
            raise DataError(
                file, "is not text", expected=" or ".join(READERS), fix="rename or convert it"
            )
        for document in READERS[file.suffix](file):
            found = True
            yield document
    if not found:
        raise DataError(path, "holds no text", expected="documents", fix="give longer text")


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, "cannot be read", found=error, fix="give UTF-8 text") from error


def _txt_documents(file: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(file):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _jsonl_documents(file: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{file}: line {number}",
                "is no record",
                expected='{"text": …}',
                found=repr(error),
                fix="correct the line",
            ) from error
        if not isinstance(text, str):
            raise DataError(
                f"{file}: line {number}", "text is not a string", fix="correct the line"
            )
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"{file}: line {number}", "text has half a character", fix="correct the line"
            )
        if text:
            yield text


READERS = {".txt": _txt_documents, ".jsonl": _jsonl_documents}


def _hub_documents(spec: str) -> Iterator[str]:
    name, config, split, field, *more = [*spec[len(HUB) :].split(":"), "", "", ""]
    if not name or any(more):
        raise DataError(
            spec,
            "is no data set",
            expected="hub:name[:config][:split][:field]",
            fix="correct it, or give a local file",
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            spec,
            "needs the datasets library",
            fix="pip install 'compact-surgery[datasets]', or give a local file",
        ) from error
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            text = _field(spec, row, field or "text")
            if text:
                yield text
    except (OSError, ValueError) as error:
        raise DataError(
            spec,
            "cannot be had from the hub",
            found=error,
            fix="check name, config and split, or give a local file",
        ) from error


def _field(spec: str, row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise DataError(
            spec,
            f"rows have no field {field!r}",
            expected=f"one of {', '.join(row)}",
            fix="name it: hub:name:config:split:field",
        )
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            spec,
            f"field {field!r} is not a string",
            found=type(text).__name__,
            fix="name a field of text",
        )
    return text
