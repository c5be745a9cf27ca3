"""Run a command in a child process and measure it: seconds, CPU, peak memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).resolve().parent.parent.parent
PAUSE_SECONDS = 0.002
"""Between two looks at the child, at first: the error of a wall time, and of a peak."""
LOOKS = 2000
"""Later, a pause is this part of the time that has passed: looking takes time from the child."""


class ChildError(click.ClickException):
    """A command failed; it has said why on stderr."""


@dataclass(frozen=True)
class Usage:
    """What a child took."""

    seconds: float
    """Wall time from before the fork to the child's end."""
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    """Resident, pages of mapped files among them."""
    peak_anonymous_bytes: int
    """Resident pages that no file backs, as sampled."""
    output: str
    """What it printed."""


def measure(command: Sequence[str | Path]) -> Usage:
    """Run ``command`` and return what it took; its stderr passes through.

    The kernel's ru_maxrss begins with the memory of the process that starts the child, so where
    it is no larger than ours the child's own high-water mark, as sampled, stands in for it.

    Raises:
        ChildError: the command failed.
    """
    rss = anonymous = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            sample = _memory(process.pid)
            rss = max(rss, sample.get("VmHWM", 0))
            anonymous = max(anonymous, sample.get("RssAnon", 0))
            time.sleep(max(PAUSE_SECONDS, (time.perf_counter() - start) / LOOKS))
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise ChildError(f"{command[0]} ended with status {process.returncode}: {printed}")
    if usage.ru_maxrss * 1024 > _memory(os.getpid())["VmHWM"]:
        rss = usage.ru_maxrss * 1024
    return Usage(seconds, usage.ru_utime, usage.ru_stime, rss, anonymous, printed)


def compact_surgery(*arguments: str | Path) -> list[str | Path]:
    """Return the command line of the installed program."""
    return [Path(sys.executable).with_name("compact-surgery"), *arguments]


def python_module(module: str, *arguments: str | Path) -> list[str | Path]:
    """Return the command line that runs a module of this package in a child."""
    return [sys.executable, "-m", f"tools.bench.{module}", *arguments]


def summary(runs: Sequence[Usage]) -> dict[str, float]:
    """Medians of the times and the largest of the peaks over ``runs`` of one command."""
    return {
        "seconds": median(run.seconds for run in runs),
        "user_seconds": median(run.user_seconds for run in runs),
        "system_seconds": median(run.system_seconds for run in runs),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
    }


def _memory(pid: int) -> dict[str, int]:
    """Bytes by name from /proc/PID/status; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}
