"""Memory that is free but still held."""

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""

HELD_BYTES = 1 << 26
"""Free memory at the heap's end up to which none is given back."""

HEAP_BYTES = 1 << 25
"""Blocks up to this size come from the heap, larger ones from pages of their own."""


def reuse_freed_memory() -> None:
    """Let the heap serve one activation after another, where the C library can be told to.

    Else glibc gives memory back and takes it again within every layer: on SmolLM2-135M with 64
    windows of 256 tokens the pass took 26.3 s, 22.7 s with this, at 399 MB instead of 411.
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, HELD_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)


def release_freed_memory() -> None:
    """Return freed heap to the system, where the C library can.

    glibc keeps what planning, tokenizing and building a model leave behind.
    """
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_the_c_library(name: str) -> Any:
    """A function of it; None where it has none of that name, and on Windows."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
