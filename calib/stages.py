"""What the time of a run goes into, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stages:
    """Seconds of each stage; those of ``read`` pass in the background where there is prefetch."""

    read: float = 0.0
    """From the checkpoint into memory."""
    wait: float = 0.0
    """For weights that are not there yet: with ``read`` far above it, the disk does not wait."""
    convert: float = 0.0
    """To the dtype and the device that compute, experts merged."""
    compute: float = 0.0
    """The layers themselves, sums of their activations among it."""
    write: float = 0.0
    """Hidden states and sums, so that a killed run can be continued."""
    total: float = 0.0
    """From the model without weights to the sums on the disk: not the start of the program."""
    bytes_read: int = 0
    """From the checkpoint."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the body takes to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)
