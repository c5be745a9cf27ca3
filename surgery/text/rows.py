"""Rows of text files and of data sets; a bad row is yielded as an error that explains it."""

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zlib import error as ZlibError

from surgery.errors import DataError, did_you_mean

HUB = "hub:"
FIELDS = ("text", "messages")
"""Fields of a row that may hold its document, the first choice first."""
PLAIN = (".txt", ".jsonl")
KINDS = (*PLAIN, ".parquet")
PACKED = (".gz", ".zst")
INSIDE = (*PLAIN, ".json")
"""Kinds of file that may be compressed; compressed data sets name JSON lines .json."""
BATCH_ROWS = 64
"""Rows of a .parquet file that are read at a time."""
LONGEST_NAME = 1024
"""Characters of what may be the name of a file."""
SHOWN = 60
"""Characters of a bad line that its error shows."""


@dataclass(frozen=True)
class Chat:
    """Messages between a user and a model."""

    messages: list[dict[str, Any]]
    """Each with ``role`` and, except for tool calls, ``content``."""
    where: str
    """File and row."""


Row = str | Chat | DataError


def local_rows(path: Path, field: str | None) -> Iterator[Row]:
    """Yield the rows of a file, or of the files in a directory.

    Raises:
        DataError: ``path`` does not exist, or a file cannot be read.
    """
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            path,
            "does not exist" if not path.exists() else "is not a file",
            fix=f"{did_you_mean(path)}name a .txt, .jsonl or .parquet file or a directory",
        )
    for file in local_files(path):
        yield from _file_rows(file, field)


def local_files(path: Path) -> Iterator[Path]:
    """Yield a file, or all files in a directory that are read as text, ordered by path.

    Hidden ones are not read. Nothing is yielded where there is no such path.
    """
    if path.is_file():
        yield path
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and _kind(file) and file.is_file():
            yield file


def _kind(file: Path) -> str:
    """The ending by which ``file`` is read, such as .jsonl; empty where it cannot be read."""
    if file.suffix in PACKED:
        inner = Path(file.stem).suffix
        return inner if inner in INSIDE else ""
    return file.suffix if file.suffix in KINDS else ""


def _file_rows(file: Path, field: str | None) -> Iterator[Row]:
    kind = _kind(file)
    if not kind:
        raise DataError(
            file,
            "is not of a kind that is read",
            expected=f"{', '.join(KINDS)}, or {', '.join(INSIDE)} with {' or '.join(PACKED)}",
            fix="rename or convert it",
        )
    if kind == ".parquet":
        return _parquet_rows(file, field)
    return _txt_rows(file) if kind == ".txt" else _jsonl_rows(file, field)


@contextmanager
def _lines(file: Path, errors: str) -> Iterator[IO[str]]:
    """Open a file, compressed or not, as lines of UTF-8 without a byte order mark."""
    try:
        with (
            _opened(file) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors=errors, newline="") as lines,
        ):
            yield lines
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(
            file, "cannot be read", expected="UTF-8", found=found, fix="convert it to UTF-8"
        ) from error
    except (OSError, EOFError, ZlibError) as error:
        if isinstance(error, OSError) and error.errno:
            raise _unreadable(file, error) from error
        raise DataError(
            file, f"is damaged, or not a {file.suffix} file", fix="check its name, or get it again"
        ) from error


def _unreadable(file: Path, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    found = os.strerror(error.errno or 0)  # pyarrow's own text has the path again
    fix = "check the file and its permissions"
    return DataError(file, "cannot be read", found=found, fix=fix)


def _opened(file: Path) -> Any:
    if file.suffix == ".gz":
        import gzip

        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        try:
            from pyarrow import input_stream
        except ImportError as error:
            raise _missing(file, "pyarrow") from error
        return input_stream(file, compression="zstd")
    return open(file, "rb")


def _txt_rows(file: Path) -> Iterator[Row]:
    document: list[str] = []
    with _lines(file, "strict") as lines:
        for line in lines:
            if line.strip():
                document.append(line)
            elif document:
                yield "".join(document)
                document = []
    if document:
        yield "".join(document)


def _jsonl_rows(file: Path, field: str | None) -> Iterator[Row]:
    with _lines(file, "surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_row(line, f"{file}: line {number}", field)


def _json_row(line: str, where: str, field: str | None) -> Row:
    if _has_lone_surrogate(line):
        return DataError(where, "is not UTF-8", expected="UTF-8", fix="correct the line")
    expected = f'{{"{field or FIELDS[0]}": …}}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        found = line.strip()[:SHOWN]
        return DataError(
            where, "is not a record", expected=expected, found=found, fix="correct the line"
        )
    if not isinstance(row, dict):
        found = json.dumps(row)[:SHOWN]
        return DataError(
            where, "is not a record", expected=expected, found=found, fix="correct the line"
        )
    name = _field(row, field)
    if name is None:
        return _no_field(where, field, row)
    return document_of(row[name], where, name)


def _parquet_rows(file: Path, field: str | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing(file, "pyarrow") from error
    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in _wanted(field) if name in names]
            if not wanted:
                raise _no_field(file, field, names)
            number = 0
            for batch in table.iter_batches(BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    name = _field(row, field) or wanted[0]
                    yield document_of(row[name], f"{file}: row {number}", name)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise _unreadable(file, error) from error
        raise DataError(
            file, "is damaged, or not a .parquet file", fix="check its name, or get it again"
        ) from error


def hub_rows(spec: str, field: str | None) -> Iterator[Row]:
    """Yield the rows of the data set ``hub:name[:config][:split][:field]``.

    Raises:
        DataError: there is no such data set, or no such field.
    """
    name, config, split, own, *more = [*spec[len(HUB) :].split(":"), "", "", ""]
    if not name or any(more):
        raise DataError(
            spec,
            "is not a data set",
            expected="hub:name[:config][:split][:field]",
            fix="correct it, or give a local file",
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _missing(spec, "datasets") from error
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            column = _field(row, own or field)
            if column is None:
                raise _no_field(spec, own or field, row)
            yield document_of(row[column], f"{spec}: row {number}", column)
    except (OSError, ValueError) as error:
        raise DataError(
            spec,
            "cannot be read from the hub",
            found=error,
            fix="check name, config and split, or give a local file",
        ) from error


def given_document(value: object, number: int) -> Row:
    """Return the ``number``-th document of an iterable, or the error that explains why not.

    Raises:
        DataError: it is the name of a file or of a data set, and would count as a text.
    """
    if isinstance(value, Path) or (isinstance(value, str) and _names_a_text(value)):
        raise DataError(
            f"document {number}",
            "is the name of a text, not a text",
            found=value,
            fix="give Source(name) for each file or data set",
        )
    return document_of(value, f"document {number}")


def _names_a_text(value: str) -> bool:
    if len(value) > LONGEST_NAME or "\n" in value:
        return False
    return value.startswith(HUB) or (_kind(Path(value)) != "" and Path(value).is_file())


def document_of(value: object, where: str, field: str | None = None) -> Row:
    """Return ``value`` as a document, or the error that explains why it is not one."""
    subject = f"field {field!r} " if field else ""
    if isinstance(value, str):
        if _has_lone_surrogate(value):
            return DataError(
                where, f"{subject}has half a character (a lone surrogate)", fix="correct the row"
            )
        return value
    messages = [_message(each) for each in value] if isinstance(value, list) else []
    if messages and all(map(_is_message, messages)):
        return Chat([_plain_message(message) for message in messages], where)
    return DataError(
        where,
        f"{subject}is not a string or a list of messages",
        expected='text, or [{"role": …, "content": …}, …]',
        found=_shown(value),
        fix="correct the row, or name another field",
    )


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text, where it was a list of parts of text."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return dict(message)
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        return dict(message)
    return {**message, "content": "".join(map(str, texts))}


SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Names in ShareGPT's form of a message, {"from": …, "value": …} → roles; others are the same."""


def _message(value: Any) -> Any:
    """A message in ShareGPT's form as one with a role; anything else as it is."""
    if not isinstance(value, Mapping) or not isinstance(value.get("from"), str):
        return value
    speaker = value["from"]
    return {"role": SPEAKERS.get(speaker, speaker), "content": value.get("value")}


def _shown(value: object) -> str:
    """The beginning of a value that is no document, for an error."""
    kind = type(value).__name__
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind} {text[:SHOWN]}" if isinstance(value, list | dict) else kind


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _has_lone_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _field(row: Mapping[str, Any], field: str | None) -> str | None:
    """Return the field to read: of those that may hold a document, the first with a value."""
    there = [name for name in _wanted(field) if name in row]
    filled = (name for name in there if row[name] is not None)
    return next(filled, there[0] if there else None)


def _wanted(field: str | None) -> tuple[str, ...]:
    return FIELDS if field is None else (field,)


def _no_field(where: object, field: str | None, names: Collection[str]) -> DataError:
    wanted = " or ".join(map(repr, _wanted(field)))
    return DataError(
        where,
        f"has no field {wanted}",
        found=f"fields {', '.join(names)}" if names else "no fields",
        fix="name the one that holds the text or the messages with `field`",
    )


def _missing(where: object, library: str) -> DataError:
    return DataError(
        where,
        f"needs the {library} library",
        fix="pip install 'compact-surgery[datasets]', or give another file",
    )
