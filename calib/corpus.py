"""Text → windows: of tokens for calibration, of bytes for scores."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from surgery.errors import DataError, TokenizerError
from surgery.tokenizer import FILE_NAME

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


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load ``directory/tokenizer.json`` without its truncation and padding.

    Raises:
        TokenizerError: absent, or the library refuses it.
    """
    path = directory / FILE_NAME
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            path,
            "cannot be loaded",
            found=error,
            fix="save the tokenizer with transformers' AutoTokenizer",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_windows(
    documents: Iterable[str], tokenizer: Tokenizer, samples: int, seq_len: int
) -> list[np.ndarray]:
    """Return the first ``samples`` windows, int64 ``[at most seq_len]`` each.

    A document is cut into full windows and a rest. What the tokenizer's post-processor puts
    around a text goes around every window, within ``seq_len``.

    Raises:
        DataError: not a single full window.
    """
    before, after = _special_ids(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise DataError(
            "--seq-len",
            "leaves no room for text",
            expected=f"more than {len(before) + len(after)}",
            found=seq_len,
            fix="choose a longer window",
        )
    windows: list[np.ndarray] = []
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        for start in range(0, len(ids), room):
            windows.append(np.array([*before, *ids[start : start + room], *after]))
            if len(windows) == samples:
                break
        if len(windows) == samples:
            break
    longest = max(map(len, windows), default=0)
    if longest < seq_len:
        raise DataError(
            "--data",
            "has no full window",
            expected=f"a document of {seq_len} tokens",
            found=f"at most {longest}",
            fix="give longer documents or a smaller --seq-len",
        )
    return windows


def byte_windows(documents: Iterable[str], samples: int, window_bytes: int) -> list[str]:
    """Return the first ``samples`` windows of at most ``window_bytes`` bytes of UTF-8.

    Windows end at a character's boundary, never cross a document, and leave nothing out.

    Raises:
        DataError: no text, or windows shorter than a character can be.
    """
    if window_bytes < 4:
        raise DataError(
            "--window-bytes",
            "is less than a character can take",
            expected="at least 4",
            found=window_bytes,
            fix="choose a longer window",
        )
    windows: list[str] = []
    for document in documents:
        raw, start = document.encode("utf-8"), 0
        while start < len(raw) and len(windows) < samples:
            stop = min(start + window_bytes, len(raw))
            while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
                stop -= 1
            windows.append(raw[start:stop].decode("utf-8"))
            start = stop
    if not windows:
        raise DataError("--data", "is empty", fix="give a file with text in it")
    return windows


def digest(windows: Iterable[np.ndarray]) -> str:
    """SHA-256 over the windows' token ids and lengths."""
    result = hashlib.sha256()
    for window in windows:
        result.update(len(window).to_bytes(8, "little"))
        result.update(window.astype("<i8").tobytes())
    return result.hexdigest()


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after any text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    extra = len(full) - len(plain)
    for place in range(extra + 1):
        if full[place : place + len(plain)] == plain:
            return full[:place], full[place + len(plain) :]
    raise TokenizerError(
        FILE_NAME,
        "post-processor changes the text's own tokens",
        fix="use a tokenizer whose post-processor only adds tokens",
    )


def _local_documents(path: Path) -> Iterator[str]:
    if not path.exists():
        raise DataError(path, "does not exist", fix="name a .txt or .jsonl file or a directory")
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
