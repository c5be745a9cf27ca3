"""Memory and bytes read and written by this process, times as text, and its progress."""

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

LOG = logging.getLogger(__name__)

IO_COUNTERS = Path("/proc/self/io")
"""Linux's counters of this process."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of ``mallopt``, from malloc.h."""

HELD_BYTES = 1 << 26
"""glibc keeps up to this much free memory at the end of the heap."""

HEAP_BYTES = 1 << 25
"""glibc takes blocks up to this size from the heap, larger ones from ``mmap``."""


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not report it."""
    try:
        import resource
    except ImportError:
        import psutil

        peak: int | None = getattr(psutil.Process().memory_info(), "peak_wset", None)  # on Windows
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def moved_bytes() -> dict[str, int] | None:
    """Bytes that this process has read and written; None where the system does not report it.

    Some containers let no process read its own counters.
    """
    try:
        lines = IO_COUNTERS.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return _counted_by_psutil()
    except OSError:
        return None
    fields = dict(line.split(": ") for line in lines)
    return {"read_bytes": int(fields["rchar"]), "written_bytes": int(fields["wchar"])}


def _counted_by_psutil() -> dict[str, int] | None:
    import psutil

    process = psutil.Process()
    if not hasattr(process, "io_counters"):  # as on macOS
        return None
    try:
        counted = process.io_counters()
    except psutil.Error:
        return None
    return {"read_bytes": counted.read_bytes, "written_bytes": counted.write_bytes}


def reuse_freed_memory() -> None:
    """Let the heap reuse the memory of one activation for the next, where the C library can.

    By default glibc returns memory to the system and takes it again within every layer. On
    SmolLM2-135M with 64 windows of 256 tokens, the pass took 26.3 s without this and 22.7 s with
    it, at 399 MB instead of 411.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, HELD_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)


def release_freed_memory() -> None:
    """Return freed heap to the system, where the C library can.

    glibc keeps memory that planning, tokenizing and building a model have freed: 11 MB after
    Qwen 2.5's tokenizer. It would count beside the windows of shards. The call takes a millisecond.
    """
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def _libc_function(name: str) -> Any:
    """A function of the C library; None where it has no such function, and on Windows."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def spoken(seconds: float) -> str:
    """Return a time as people say it: "0.4 s", "39 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


class Stopwatch:
    """Seconds of each stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the stage ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def spoken_stages(seconds: Mapping[str, float]) -> str:
    """Return the times of stages for people: "calibrate 39 s, apply 0.7 s, together 40 s"."""
    stages = {**seconds, "together": sum(seconds.values())}
    return ", ".join(f"{name} {spoken(taken)}" for name, taken in stages.items())


Seconds = tuple[float, float]
"""An estimated time: at least and at most."""

SLACK = 0.2
"""Share by which an estimated time is widened to both sides."""


def with_slack(low: float, high: float) -> Seconds:
    """Return an estimated time that is at least ``low`` and at most ``high``, widened."""
    return (1 - SLACK) * low, (1 + SLACK) * high


def spoken_range(seconds: Seconds) -> str:
    """Return an estimated time for people: "0.4 to 2 s", "3 to 5 min", "2.5 to 4 h"."""
    unit, name = 3600, "h"
    if seconds[1] < 100 * 60:
        unit, name = (60, "min") if seconds[1] >= 100 else (1, "s")
    low, high = (_two_digits(part / unit) for part in seconds)
    return f"{high} {name}" if low == high else f"{low} to {high} {name}"


def _two_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


PIECE_BYTES, PIECES = 1 << 23, 4
"""What is written to measure a disk: pieces, each synced."""


def write_pace(directory: Path) -> Seconds | None:
    """Return the seconds that a byte takes to the disk of ``directory``, at least and at most.

    It is measured with a file without a name, which leaves nothing behind. The directory need not
    exist. None where it cannot be written.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    piece, found = os.urandom(PIECE_BYTES), []
    try:
        with TemporaryFile(dir=there, buffering=0) as file:
            for _ in range(PIECES):
                start = time.perf_counter()
                file.write(piece)
                os.fsync(file.fileno())
                found.append((time.perf_counter() - start) / PIECE_BYTES)
    except OSError:
        return None
    return min(found), max(found)


Progress = Callable[[str, int, int], object]
"""Called with a stage's name, how much of it is done, and its total. Stages that read weights count
bytes; stages that read text count windows times layers. Several threads may call it."""

Advance = Callable[[int], object]
"""Called with the amount of a stage that was done since the last call."""


def no_advance(more: int) -> None:
    """Report nothing."""


def stage(progress: Progress | None, name: str, total: int) -> Advance:
    """Return a callable that adds up one stage's amounts and reports the sum to ``progress``."""
    if progress is None:
        return no_advance
    done, lock = 0, Lock()
    progress(name, 0, total)

    def advance(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            progress(name, done, total)

    return advance


def say_resumed(done: int, total: int, what: str) -> None:
    """Log what a run that continues found finished, such as "2 of 4 shards"."""
    LOG.info("resuming: %s of %d %s finished before", done or "none", total, what)
