"""How much of a run is in memory at a time, and where its time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


MICRO_BATCH_VALUES = 1 << 21
"""Values of one FFN activation at a time, tokens × I: 8 MiB in fp32 (one window at least)."""


@dataclass(frozen=True)
class ComputeOptions:
    """Where a pass computes, and what memory it may take."""

    device: str = "auto"
    """auto, cpu, cuda or mps; auto is CUDA where there is one."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's."""
    max_memory: int | None = None
    """Cap on the memory of the process, in bytes."""
    max_gpu_memory: int | None = None
    """Cap on what is held on the device, in bytes."""
    spill: Path | None = None
    """Directory for files of hidden states; None keeps them in memory, or beside the output."""

    @property
    def capped(self) -> bool:
        """Whether anything is asked of the memory."""
        return (self.max_memory, self.max_gpu_memory, self.spill) != (None, None, None)


@dataclass(frozen=True)
class PassSettings:
    """How the layers compute; of it only ``dtype`` changes a result by more than rounding."""

    device: "torch.device"
    dtype: "torch.dtype"
    micro_batch_values: int = MICRO_BATCH_VALUES
    """Windows run together up to so many values of one FFN activation, tokens × I."""
    prefetch: bool = True
    """Whether the next layer is read while one computes."""
    hidden: str = "memory"
    """Where hidden states live: "memory", "device" or "file"."""
    spill: Path | None = None
    """Directory of their files; None is beside the output."""

    def facts(self) -> dict[str, str | int | bool]:
        """The settings for JSON."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "micro_batch_values": self.micro_batch_values,
            "prefetch": self.prefetch,
            "hidden": self.hidden,
        }


@dataclass
class Timings:
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
