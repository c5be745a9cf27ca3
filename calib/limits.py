"""How much of a model and its text is in memory at a time."""

from dataclasses import dataclass

MICRO_BATCH_VALUES = 1 << 21
"""Values of one FFN activation at a time, tokens × I: 8 MiB in fp32 (one window at least)."""

PLACES = ("memory", "device", "file")


@dataclass(frozen=True)
class Limits:
    """What a cap on memory decides; none of it changes a result but by rounding."""

    micro_batch_values: int = MICRO_BATCH_VALUES
    """Windows run together up to so many values of one FFN activation, tokens × I."""
    prefetch: bool = True
    """Whether the next layer is read while one computes."""
    hidden: str = "memory"
    """Where hidden states live: one of ``PLACES``."""
