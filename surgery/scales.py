"""Scales of FP8 weights: each weight has its own, and none is without its weight."""

import numpy as np

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.fp8 import SCALE_DTYPES, Float32, decode_scales, scale_grid
from surgery.header import TensorRef
from surgery.quantized import SCALE_SUFFIX
from surgery.shard_file import open_shard

AGAIN = "download the checkpoint again"
UNQUANTIZED = "use the unquantized checkpoint"


def read_scales(tensor: TensorRef) -> Float32:
    """The scales of an FP8 weight, from their own shard: one for 16,384 weights, usually.

    Raises:
        CheckpointError: the shard ends early.
    """
    raw = np.empty(tensor.nbytes, np.uint8)
    with open_shard(tensor.path, "read") as shard:  # they are decoded into memory of their own
        shard.read_into(raw.data, tensor.start)
    return decode_scales(raw, tensor.dtype).reshape(tensor.shape)


def weight_of(checkpoint: Checkpoint, scales: TensorRef) -> TensorRef | None:
    """Return the weight that ``scales`` belong to, or None if it has another name than scales.

    Raises:
        CheckpointError: scales without an FP8 weight, or without a quantization_config.
    """
    if not scales.name.endswith(SCALE_SUFFIX):
        return None
    if checkpoint.quantization is None:
        raise CheckpointError(
            _where(scales),
            "holds scales of FP8 weights, and config.json has no quantization_config",
            fix="download config.json again",
        )
    name = checkpoint.quantization.weight_of(scales.name)
    weight = checkpoint.tensors.get(name)
    if weight is None or weight.dtype != checkpoint.quantization.dtype:
        raise CheckpointError(
            _where(scales),
            "holds scales without their weight",
            expected=f"a tensor {name} of {checkpoint.quantization.dtype}",
            found=weight.dtype if weight else "none",
            fix=AGAIN,
        )
    return weight


def check_weight(checkpoint: Checkpoint, weight: TensorRef) -> None:
    """Refuse an FP8 tensor that its scales and config.json do not explain.

    Raises:
        CheckpointError: FP8 of another kind than config.json says, or no matrix, or scales that
            are missing or have another shape than there are blocks.
    """
    fp8, where = checkpoint.quantization, _where(weight)
    if fp8 is None or weight.dtype != fp8.dtype:
        raise CheckpointError(
            where,
            "is FP8 of a kind that config.json's quantization_config does not announce",
            expected="BF16 or F16 or F32" + (f" or {fp8.dtype}" if fp8 else ""),
            found=weight.dtype,
            fix=f"download config.json again, or {UNQUANTIZED}",
        )
    if len(weight.shape) != 2:
        raise CheckpointError(
            where,
            "is FP8 and no matrix: experts packed into one tensor are not supported in FP8",
            expected="two dimensions",
            found=list(weight.shape),
            fix=UNQUANTIZED,
        )
    scales = checkpoint.scales_of(weight)
    if scales is None:
        raise CheckpointError(
            where, "has no scales", expected=f"a tensor {fp8.scales_of(weight.name)}", fix=AGAIN
        )
    grid = scale_grid((weight.shape[0], weight.shape[1]), fp8.block_shape)
    if scales.shape != grid or scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            _where(scales),
            f"is not one scale for each block of {list(fp8.block_shape)} of its weight "
            f"{list(weight.shape)}",
            expected=f"{' or '.join(SCALE_DTYPES)} {list(grid)}",
            found=f"{scales.dtype} {list(scales.shape)}",
            fix="check weight_block_size in config.json",
        )


def _where(tensor: TensorRef) -> str:
    return f"{tensor.path}: tensor {tensor.name}"
