"""What this process has taken so far: memory and bytes moved, as far as the system counts them."""

import sys
from pathlib import Path

IO_COUNTERS = Path("/proc/self/io")
"""Of Linux."""


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        import psutil

        peak: int | None = getattr(psutil.Process().memory_info(), "peak_wset", None)  # of Windows
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def moved_bytes() -> dict[str, int] | None:
    """Bytes that this process has read and written so far; None where the system does not tell."""
    if IO_COUNTERS.exists():
        lines = IO_COUNTERS.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(": ") for line in lines)
        return {"read_bytes": int(fields["rchar"]), "written_bytes": int(fields["wchar"])}
    import psutil

    process = psutil.Process()
    if not hasattr(process, "io_counters"):  # as on macOS
        return None
    counted = process.io_counters()
    return {"read_bytes": counted.read_bytes, "written_bytes": counted.write_bytes}
