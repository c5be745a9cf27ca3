"""Layers collapsed into one, window by window: W + Σ (W_k − W) (LaCo, arXiv 2402.11187)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from surgery.fp8 import Float32, from_bf16, to_bf16

Bits = NDArray[np.unsignedinteger]

STRIP = 1 << 15
"""Elements at a time: beside the sum, what is calculated stays in the cache."""


def collapse(first: Bits, others: Iterable[Bits], dtype: str) -> None:
    """Put ``first`` + Σ (other − first) in place of ``first``; added in order in float32.

    It is rounded once, to nearest even, to the dtype of the file.

    Args:
        first: Elements as plain bits, contiguous.
        others: Elements at the same positions of the other layers, one layer at a time.
        dtype: BF16, F16 or F32, as in safetensors.
    """
    own = first.reshape(-1)
    total = np.empty(own.shape, np.float32)
    strips = [slice(start, start + STRIP) for start in range(0, len(own), STRIP)]
    for strip in strips:
        total[strip] = _decode(own[strip], dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # the result says it: inf or NaN
        for other in others:
            terms = other.reshape(-1)
            for strip in strips:
                total[strip] += _decode(terms[strip], dtype) - _decode(own[strip], dtype)
        for strip in strips:
            own[strip] = _encode(total[strip], dtype)


def _decode(bits: Bits, dtype: str) -> Float32:
    if dtype == "BF16":
        return from_bf16(bits.astype(np.uint16, copy=False))
    values = bits.view(np.float16 if dtype == "F16" else np.float32)
    return values.astype(np.float32, copy=False)


def _encode(values: Float32, dtype: str) -> Bits:
    if dtype == "BF16":
        return to_bf16(values)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)
