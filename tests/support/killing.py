"""Runs of apply as processes of their own, killed at a chosen line of the code."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

if not hasattr(os, "fork"):
    pytest.skip("kills processes by signals", allow_module_level=True)

WATCHED = (
    "surgery.apply.run",
    "surgery.files.atomic",
    "surgery.apply.output_directory",
    "surgery.files.atomic",
    "surgery.apply.shard",
    "surgery.files.shard_file",
    "surgery.apply.shard",
    "surgery.apply.output_directory",
)
"""Modules whose lines count."""

SPAWN = get_context("forkserver")
SPAWN.set_forkserver_preload(
    ["surgery.cli.main", "surgery.api", "surgery.apply.run", "safetensors"]
)


def run_apply(*arguments: object, kill_at: int | None = None) -> tuple[int, int]:
    """Run ``compact-surgery apply`` in a process; return its exit code and the lines it ran.

    With ``kill_at`` it gets SIGKILL before the line of that number, counted over all its threads.
    """
    lines = SPAWN.RawValue("l", 0)  # a lock would stay with the process that is killed
    words = ["apply", *map(str, arguments)]
    process = SPAWN.Process(target=_apply, args=(words, lines, kill_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, lines.value


def _apply(words: list[str], lines: Any, kill_at: int | None) -> None:
    from surgery.cli.main import main

    count_lines(lines, kill_at)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        main(words)


def count_lines(lines: Any, kill_at: int | None) -> None:
    """Count the lines of the watched modules; SIGKILL this process before line ``kill_at``."""
    lock = threading.Lock()

    def watch(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_globals.get("__name__") not in WATCHED:
            return None
        if event == "line":
            with lock:
                lines.value += 1
                if lines.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        return watch

    threading.settrace(watch)
    sys.settrace(watch)


def journaled(journal: Path) -> set[str]:
    """Shards that the journal says are finished."""
    if not journal.exists():
        return set()
    lines = journal.read_bytes().split(b"\n")[1:-1]
    return {msgspec.json.decode(line)["shard"] for line in lines}


def whole_shards(directory: Path) -> dict[str, tuple[int, int]]:
    """Name → (inode, time of last change) of the shards in ``directory``."""
    found = {path.name: path.stat() for path in directory.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}
