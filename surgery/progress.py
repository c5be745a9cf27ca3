"""Progress of long work, as a callable: the library reports, and only the command line draws."""

from collections.abc import Callable
from threading import Lock

Progress = Callable[[str, int, int], object]
"""Called with the name of a stage, how much of it is done and how much it is in all. Stages of
weights count bytes, stages of text count windows times layers. Threads may call it."""

Advance = Callable[[int], object]
"""Called with what more of a stage is done."""


def no_advance(more: int) -> None:
    """Report to nobody."""


def stage(progress: Progress | None, name: str, total: int) -> Advance:
    """Return what adds up the parts of one stage and reports them to ``progress``."""
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
