"""Memory that is free but still held."""

import ctypes

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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, HELD_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)


def release_freed_memory() -> None:
    """Return freed heap to the system, where the C library can.

    glibc keeps what planning, tokenizing and building a model leave behind.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
