"""What to compute on, and in what."""

from collections.abc import Callable

import torch

from calib.settings import MICRO_BATCH_VALUES, ComputeOptions, PassSettings
from calib.weights import TORCH_DTYPE
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(SurgeryError):
    """The device asked for is not there."""


def choose_settings(compute: ComputeOptions, checkpoint: Checkpoint) -> PassSettings:
    """Return the fastest settings with the device and dtype of ``compute``; caps are not asked.

    Raises:
        DeviceError: as ``choose_device``.
    """
    device = choose_device(compute.device)
    dtype = choose_dtype(compute.dtype, checkpoint, device)
    hidden = "file" if compute.spill is not None else "memory"
    return PassSettings(device, dtype, MICRO_BATCH_VALUES, hidden=hidden, spill=compute.spill)


def choose_device(name: str) -> torch.device:
    """Return the device ``name``; "auto" is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: it was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if name in there and not there[name]():
        raise DeviceError(
            f"`device` {name}",
            "is not available",
            fix=f"use `device` cpu, or a torch and a machine with {name}",
        )
    return torch.device(name)


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype ``name``; "auto" is float32 on the CPU, else that of the checkpoint.

    CPUs are slow in 16 bits, and float32 holds every bf16 and fp16 weight exactly. FP8 counts as
    bf16, which it is dequantized to.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    return TORCH_DTYPE.get(largest.dtype, torch.bfloat16)
