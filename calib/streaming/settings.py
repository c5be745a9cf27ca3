"""Where and how a pass computes, how much memory it may take, and its timings."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import check_choice

if TYPE_CHECKING:
    import torch


MICRO_BATCH_VALUES = 1 << 21
"""Values of one FFN activation at a time, tokens × I: 8 MiB in fp32; at least one window."""


DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ComputeOptions:
    """Where a pass computes, and how much memory it may take."""

    device: str = "auto"
    """auto, cpu, cuda or mps; auto is CUDA where there is one."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's."""
    max_memory: int | None = None
    """Cap on the memory of the process, in bytes."""
    max_gpu_memory: int | None = None
    """Cap on the memory used on the device, in bytes."""
    spill: Path | None = None
    """Directory for files of hidden states; None keeps them in memory, or beside the output."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPE_NAMES)

    @property
    def capped(self) -> bool:
        """Whether any option limits memory."""
        return (self.max_memory, self.max_gpu_memory, self.spill) != (None, None, None)


@dataclass(frozen=True)
class PassSettings:
    """How the layers compute. Only ``dtype`` changes results by more than rounding."""

    device: "torch.device"
    dtype: "torch.dtype"
    micro_batch_values: int = MICRO_BATCH_VALUES
    """Most values of one FFN activation, tokens × I, in a micro-batch of several windows."""
    prefetch: bool = True
    """Whether the next layer is read while the current one computes."""
    hidden: str = "memory"
    """Where hidden states are stored: "memory", "device" or "file"."""
    spill: Path | None = None
    """Directory for files of hidden states; None is beside the output."""

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
    """Seconds of each stage; with prefetch, ``read`` runs in the background."""

    read: float = 0.0
    """From the checkpoint into memory."""
    wait: float = 0.0
    """For weights that are not read yet. Far below ``read``, the disk is fast enough."""
    convert: float = 0.0
    """To the compute dtype and device, with the merging of experts."""
    compute: float = 0.0
    """The layers themselves, with the sums of their activations."""
    write: float = 0.0
    """Hidden states and sums, so that a killed run can be continued."""
    total: float = 0.0
    """From building the model to the sums on the disk, without the start of the program."""
    bytes_read: int = 0
    """From the checkpoint."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the body to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


def compute_options(
    device: str,
    dtype: str,
    max_memory: int | None = None,
    max_gpu_memory: int | None = None,
    spill: Path | str | None = None,
) -> ComputeOptions:
    """Return the options as the library's functions take them: a directory may be a string."""
    directory = Path(spill) if spill is not None else None
    return ComputeOptions(device, dtype, max_memory, max_gpu_memory, directory)
