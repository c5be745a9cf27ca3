"""Sizes of a cut before it is made: shapes, parameters and bytes from headers alone."""

import math
from collections.abc import Mapping

from surgery.budget import Sizes
from surgery.family import VOCAB
from surgery.fp8 import scale_grid
from surgery.header import ITEMSIZE, TensorRef
from surgery.layout import Layout
from surgery.plan import Shape


def cut_shape(layout: Layout, tensor: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Shape of ``tensor`` once its named axes have ``sizes``; scales follow their weight's."""
    place, fp8 = layout.places[tensor.name], layout.checkpoint.quantization
    if place.scales and fp8 is not None:
        weight = layout.checkpoint.tensors[fp8.weight_of(tensor.name)]
        rows, columns = cut_shape(layout, weight, sizes)
        return scale_grid((rows, columns), fp8.block_shape)
    shape = list(tensor.shape)
    for number, dim in enumerate(place.slot.dims):
        key = layout.key_of(dim)
        if dim is not None and key is not None:
            length = sizes.vocab_size if key == VOCAB else sizes.widths[key]
            shape[number] = length * layout.unit(dim)
    return tuple(shape)


def output_dtype(layout: Layout, tensor: TensorRef, sizes: Sizes) -> str | None:
    """Safetensors dtype that ``tensor`` has in the output; None where the output lacks it."""
    place = layout.places[tensor.name]
    if place.dropped or (place.scales and sizes.dequantize):
        return None
    goes = sizes.layers and all(place.layer != group[0] for group in sizes.layers)
    if goes and place.layer is not None:
        return None
    is_fp8 = layout.checkpoint.scales_of(tensor) is not None
    return "BF16" if is_fp8 and sizes.dequantize else tensor.dtype


def shape_of(layout: Layout, sizes: Sizes) -> Shape:
    """Predict sizes, parameters and bytes of ``layout`` cut to ``sizes``."""
    nbytes = 0
    for tensor in layout.checkpoint.tensors.values():
        dtype = output_dtype(layout, tensor, sizes)
        if dtype is not None:
            nbytes += math.prod(cut_shape(layout, tensor, sizes)) * ITEMSIZE[dtype]
    return Shape(
        sizes.vocab_size,
        dict(sizes.widths),
        len(sizes.layers) or layout.num_hidden_layers,
        layout.with_layers(sizes.layers).parameters(sizes.vocab_size, sizes.widths),
        nbytes,
    )


def axis_lengths(layout: Layout, widths: Mapping[str, int]) -> dict[str, int]:
    """Channel axis → its length where the widths are ``widths``; axes that the model has."""
    return {
        axis: widths[width.key] * layout.times(axis)
        for axis, width in layout.family.widths.items()
        if width.key in widths
    }
