"""Text as documents: files, directories, hub data sets and iterables, one or several."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, Union, cast

from surgery.errors import DataError, check_least
from surgery.text.rows import HUB, Chat, Row, given_document, hub_rows, local_files, local_rows

LOG = logging.getLogger(__name__)

Render = Callable[[Chat], str]
"""Turns the messages of a chat into text; raises DataError where the template does not fit them."""

MOST_BAD = 1000
"""A source is refused after this many bad rows, if no good row came before."""

T = TypeVar("T")


class Replayed:
    """An iterator that can be read again: it keeps what it has read, and reads more on demand."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._rest = items
        self._items: list[Any] = []
        self._end: BaseException | None = None
        self._lock = Lock()

    def __iter__(self) -> Iterator[Any]:
        position = 0
        while self._has(position):
            yield self._items[position]
            position += 1

    def _has(self, position: int) -> bool:
        """Read on up to ``position``. An iterator that failed once fails at each reading."""
        with self._lock:
            if position == len(self._items) and self._end is None:
                try:
                    self._items.append(next(self._rest))
                except BaseException as error:
                    self._end = error
            if position < len(self._items):
                return True
            if isinstance(self._end, StopIteration) or self._end is None:
                return False
            raise self._end


@dataclass(frozen=True)
class Source:
    """One text among several, and its weight."""

    text: str | Path | Iterable[str]
    """A path, a ``hub:`` name, or documents. The items of an iterator are kept, so that it can be
    read again."""
    weight: float = 1.0
    """The source gives this share of the windows: ``weight`` over the sum of all weights."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < inf:
            raise DataError(
                self.name,
                "has a weight that is not a number above 0",
                found=self.weight,
                fix="correct it",
            )
        if isinstance(self.text, Iterator):
            object.__setattr__(self, "text", Replayed(self.text))

    @classmethod
    def parse(cls, given: str) -> "Source":
        """Read ``TEXT`` or ``TEXT=WEIGHT``.

        If the whole of ``given`` exists as a path, it is the path. Otherwise a number after the
        last ``=`` is the weight. Give a file named ``a=2`` a weight by ``a=2=1``.
        """
        text, sign, number = given.rpartition("=")
        if not (sign and text) or Path(given).exists():
            return cls(given)
        try:
            weight = float(number)
        except ValueError:
            return cls(given)
        return cls(text, weight)

    @property
    def name(self) -> str:
        """The name in errors and notes."""
        return str(self.text) if isinstance(self.text, str | Path) else "the documents"


@dataclass(frozen=True)
class TextOptions:
    """Which text is read, and how it is split into windows."""

    data: tuple[Source, ...] = ()
    samples: int = 256
    """Largest number of windows."""
    seq_len: int = 2048
    """Tokens of a full window."""
    windows: int = 64
    """Largest number of windows of 2,048 bytes to hold out where pruned models are compared."""
    seed: int | None = None
    """Shuffles the documents of each source; None leaves them in order."""
    field: str | None = None
    """Field of a row that holds its document; None means ``text``, or else ``messages``."""
    strict: bool = False
    """Refuse the first bad row instead of skipping all of them."""

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("seq_len", 2), ("windows", 1)):
            check_least(option, getattr(self, option), least)

    @property
    def files(self) -> list[Path]:
        """The files on this machine that the text is read from."""
        names = [each.text for each in self.data if isinstance(each.text, str | Path)]
        paths = [Path(name) for name in names if not str(name).startswith(HUB)]
        return [file for path in paths for file in local_files(path)]

    def documents(self, render: Render | None = None) -> Iterable[str]:
        """Read the documents; ``render`` turns chats into text; without it they are refused.

        Raises:
            DataError: as ``read_documents``.
        """
        return read_documents(self, self.seed, render=render)


def sources_of(text: "Text") -> tuple[Source, ...]:
    """The sources in anything that can be read as text.

    Raises:
        DataError: sources and documents in one list, or what cannot be read as text.
    """
    if isinstance(text, Source):
        return (text,)
    if isinstance(text, list | tuple) and any(isinstance(each, Source | Path) for each in text):
        for number, each in enumerate(text, 1):
            if not isinstance(each, Source | Path):
                raise DataError(
                    f"`data`: item {number}",
                    "is a document among sources",
                    found=type(each).__name__,
                    fix="give Source([document]) for it, or Source(path) for a file",
                )
        return tuple(each if isinstance(each, Source) else Source(each) for each in text)
    if not isinstance(text, str | Path | Iterable) or isinstance(text, Mapping | bytes):
        raise DataError(
            "`data`",
            "cannot be read as text",
            expected="a path, a hub: name, documents, or several Source",
            found=type(text).__name__,
            fix="give one of these",
        )
    return (Source(cast("str | Path | Iterable[str]", text)),)


Text = Union[str, Path, Source, Iterable[str], Sequence[Source | Path]]  # noqa: UP007
"""Anything that can be read as text: a path, a ``hub:`` name, documents, or several sources."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Documents of several sources with their weights.

    Each document comes from the source that has given the fewest characters for its weight.
    """

    parts: Sequence[tuple[Iterable[str], float]]

    def __iter__(self) -> Iterator[str]:
        return interleave(self.parts, len)


def parts_of(documents: Iterable[str]) -> Sequence[tuple[Iterable[str], float]]:
    """The sources in ``documents`` with their weights; a single source has weight 1."""
    return documents.parts if isinstance(documents, Mixture) else [(documents, 1.0)]


def mixture(parts: Sequence[tuple[Iterable[str], float]]) -> Iterable[str]:
    """Join sources; a single one is returned as it is."""
    return parts[0][0] if len(parts) == 1 else Mixture(parts)


def interleave(
    streams: Sequence[tuple[Iterable[T], float]], size: Callable[[T], float]
) -> Iterator[T]:
    """Yield from the stream that has given the least for its weight; of equals, from the first.

    When a stream ends, the others share the rest by their weights.
    """
    given = [(0.0, index) for index in range(len(streams))]
    heapify(given)
    iterators = [iter(stream) for stream, _ in streams]
    while given:
        total, index = given[0]
        try:
            item = next(iterators[index])
        except StopIteration:
            given.remove((total, index))
            heapify(given)
            continue
        yield item
        heapreplace(given, (total + size(item) / streams[index][1], index))


def read_documents(
    text: Text | TextOptions,
    seed: int | None = None,
    *,
    render: Render | None = None,
) -> Iterable[str]:
    """Yield the documents of ``text`` in order, or each source's shuffled by ``seed``.

    A file is .txt (a blank line ends a document), .jsonl or .parquet (a row is a document); .txt,
    .jsonl and .json of rows may be compressed (.gz, .zst). A directory gives all such files in
    it except hidden ones, ordered by path. ``hub:name[:config][:split][:field]`` is a data set. A
    row holds a string, or messages with ``role`` and ``content``. Blank documents are left out.

    Args:
        text: A path, a ``hub:`` name, documents, or several sources with weights. An iterator can
            be read once; a ``Source`` of it can be read again.
        seed: Shuffles the documents, which are then all held in memory.
        render: Turns messages into text. Without it they are refused.

    Raises:
        DataError: the text does not exist or has no good row; with ``strict``, it has a bad one.
    """
    options = text if isinstance(text, TextOptions) else TextOptions(sources_of(text))
    parts = [
        (_shuffled(_documents(source, options, render), seed), source.weight)
        for source in options.data
    ]
    return mixture(parts) if parts else []


def _shuffled(documents: Iterator[str], seed: int | None) -> Iterable[str]:
    if seed is None:
        return documents
    import random

    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _documents(
    source: Source,
    options: TextOptions,
    render: Render | None,
) -> Iterator[str]:
    """Yield the good rows of ``source`` as text; skip and count the bad ones."""
    good = bad = blank = 0
    first: DataError | None = None
    try:
        for row in _rows(source, options.field):
            document = _text(row, render, source)
            if isinstance(document, DataError):
                bad += 1
                first = first or document
                if options.strict or (not good and bad == MOST_BAD):
                    raise first
            elif document.strip():
                good += 1
                yield document
            else:
                blank += 1
    finally:
        if good and bad and not options.strict:
            rows, name = good + bad + blank, source.name
            LOG.info("note: %s: skipped %d bad rows of %d; the first: %s", name, bad, rows, first)
    if first and not good:
        raise first
    if not good:
        raise DataError(
            source.name, "holds no text", expected="documents", fix="give text with words in it"
        )


def _rows(source: Source, field: str | None) -> Iterator[Row]:
    text = source.text
    if isinstance(text, str) and text.startswith(HUB):
        return hub_rows(text, field)
    if isinstance(text, str | Path):
        return local_rows(Path(text), field)
    return (given_document(value, number) for number, value in enumerate(text, 1))


def _text(row: Row, render: Render | None, source: Source) -> str | DataError:
    if isinstance(row, str | DataError):
        return row
    if render is None:
        raise DataError(
            source.name,
            "holds chats, and there is no model whose chat template turns them into text",
            fix="give a field of text, or the documents that calib.read_documents returns",
        )
    try:
        return render(row)
    except DataError as error:
        return error
