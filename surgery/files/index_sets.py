"""Sets of indices as short text: ranges, or a bitmap where that is shorter."""

import base64
import binascii
import re

import numpy as np

from surgery.errors import PlanError

BITMAP = "bitmap:"
RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")
MAX_SIZE = 1 << 26
"""Far above any vocabulary; a larger size would only fill the memory."""

MAKE_AGAIN = "make the plan again"


def encode(indices: np.ndarray, size: int) -> str:
    """Write ascending ``indices`` below ``size`` as "0-99,128" or as "bitmap:…" (base64)."""
    ranges = as_ranges(indices)
    bits = np.zeros(size, dtype=bool)
    bits[indices] = True
    bitmap = BITMAP + base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")
    return ranges if len(ranges) <= len(bitmap) else bitmap


def as_ranges(indices: np.ndarray) -> str:
    """Write ascending ``indices`` as "0-99,128"."""
    starts, stops = runs(indices)
    return ",".join(
        str(a) if b == a + 1 else f"{a}-{b - 1}"
        for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    )


def decode(text: str, size: int, where: str) -> np.ndarray:
    """Return the ascending indices that ``encode`` wrote.

    Raises:
        PlanError: ``text`` is malformed, not ascending, or reaches ``size``.
    """
    try:
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"a size of {size}")
        indices = _bitmap(text, size) if text.startswith(BITMAP) else _ranges(text, size)
    except (ValueError, binascii.Error) as error:
        raise PlanError(where, "is not a set of indices", found=error, fix=MAKE_AGAIN) from error
    if len(indices) and (np.any(np.diff(indices) <= 0) or indices[-1] >= size):
        raise PlanError(
            where, "indices do not fit", expected=f"ascending, below {size}", fix=MAKE_AGAIN
        )
    return indices


def runs(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last index of each contiguous run of ascending ``indices``."""
    if not len(indices):
        return indices, indices
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate([[0], breaks + 1])]
    stops = indices[np.concatenate([breaks, [len(indices) - 1]])] + 1
    return starts, stops


def _ranges(text: str, size: int) -> np.ndarray:
    spans, stop = [], 0
    for part in text.split(",") if text else []:
        match = RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"the range {part[:40]!r}")
        last_stop, start, stop = stop, int(match[1]), int(match[2] or match[1]) + 1
        if not last_stop <= start < stop <= size:
            raise ValueError(f"the range {part} of {size} indices, after {last_stop}")
        spans.append(np.arange(start, stop))
    return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)


def _bitmap(text: str, size: int) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(text[len(BITMAP) :], validate=True), dtype=np.uint8)
    if len(raw) != -(-size // 8):
        raise ValueError(f"a bitmap of {len(raw)} bytes for {size} indices")
    return np.flatnonzero(np.unpackbits(raw))
