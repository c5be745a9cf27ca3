"""Edits: each output tensor as copies or selections of a source tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.families.blocks import adds_up
from surgery.families.schema import STACK, VOCAB, Dim, renumbered
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import ITEMSIZE, TensorRef
from surgery.layout.layout import Layout
from surgery.planning.layers import check_layers
from surgery.planning.plan import Plan, Shape
from surgery.planning.replacement import check_replaced
from surgery.planning.shapes import (
    axis_lengths,
    check_blocks,
    cut_shape,
    output_dtype,
    shape_of,
    whole_blocks,
)
from surgery.planning.sizes import Sizes, whole


@dataclass(frozen=True)
class Scaling:
    """What makes numbers of an FP8 weight."""

    scales: TensorRef
    """One a block, perhaps in another shard than the weight."""
    block_shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Edit:
    """A run of bytes of an output tensor."""

    source: TensorRef
    """A tensor of the source, or the matrix of one expert in it."""
    dim: int = 0
    """The dimension that ``indices`` select on."""
    indices: np.ndarray | None = None
    """Ascending positions that stay; None keeps the tensor whole."""
    terms: tuple[TensorRef, ...] = ()
    """The same tensor of other layers, which become one with this one (``collapse``)."""
    replaces: bool = False
    """Whether ``source`` lies in a file of the plan's, not in a shard of the source."""
    scaling: Scaling | None = None
    """Given, the elements are dequantized to bf16; else they are moved as they are."""

    @property
    def itemsize(self) -> int:
        """Bytes per element of the output."""
        return self.source.itemsize if self.scaling is None else ITEMSIZE["BF16"]

    @property
    def nbytes(self) -> int:
        """Bytes that this adds to the output."""
        elements = self.source.parameters
        if self.indices is not None:
            elements = elements // self.source.shape[self.dim] * len(self.indices)
        return elements * self.itemsize


@dataclass(frozen=True, eq=False)
class OutputTensor:
    """One tensor of the output: its edits, one behind the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Edit, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(edit.nbytes for edit in self.edits)


def edits(plan: Plan, layout: Layout) -> dict[str, list[OutputTensor]]:
    """Return what ``plan`` makes of ``layout``: shard → tensors in the source's order.

    Every tensor of the source is in exactly one output tensor, or among those that are dropped,
    or lies in a layer that goes, or holds scales that are multiplied into their weight. A layer
    that several become lies where the first of them lay.

    Raises:
        PlanError: the plan was made for another source, or its channels are not chosen yet.
    """
    sizes = check_plan(plan, layout)
    kept_tokens = plan.ids().kept
    kept = kept_channels(plan, layout)
    replaced = plan.replaced.refs() if plan.replaced else {}
    groups = layer_groups(plan, layout)
    numbers = {group[0]: number for number, group in enumerate(groups)}

    def outputs(tensor: TensorRef) -> Iterator[OutputTensor]:
        dtype = output_dtype(layout, tensor, sizes)
        if dtype is not None:
            shape, layer = cut_shape(layout, tensor, sizes), layout.roles[tensor.name].layer
            name, group = tensor.name, [layer or 0]
            if layer is not None:
                name, group = renumbered(name, numbers[layer]), groups[numbers[layer]]
            if name in replaced:
                edit = Edit(replaced.pop(name), replaces=True)
                check_replaced(edit.source, dtype, shape)
                yield OutputTensor(name, dtype, shape, (edit,))
                return
            chosen = kept[numbers[layer]] if layer is not None else {}
            made = _edits_of(layout, tensor, shape, kept_tokens, chosen)
            if len(group) > 1:
                made = _collapsed(layout, tensor, made, group[1:])
            if dtype != tensor.dtype:
                scaling = _scaling(layout.checkpoint, tensor)
                made = tuple(replace(edit, scaling=scaling) for edit in made)
            yield OutputTensor(name, dtype, shape, made)

    made = {
        name: [made for tensor in header.tensors for made in outputs(tensor)]
        for name, header in layout.checkpoint.shards.items()
    }
    for ref in replaced.values():
        check_replaced(ref, None, None)
    return made


def sources(shard: Sequence[OutputTensor]) -> frozenset[str]:
    """Names of the source's shards that these tensors are made of."""
    made = [edit for tensor in shard for edit in tensor.edits if not edit.replaces]
    scaled = {edit.scaling.scales.path.name for edit in made if edit.scaling is not None}
    terms = {term.path.name for edit in made for term in edit.terms}
    return frozenset({edit.source.path.name for edit in made} | scaled | terms)


def check_plan(plan: Plan, layout: Layout) -> Sizes:
    """Return the sizes of a plan that fits ``layout``.

    Raises:
        PlanError: as ``edits``.
    """
    if plan.fingerprint != layout.checkpoint.fingerprint:
        raise PlanError(
            layout.checkpoint.path,
            "is not the checkpoint that the plan was made for",
            expected=f"fingerprint {plan.fingerprint[:12]}",
            found=layout.checkpoint.fingerprint[:12],
            fix=MAKE_AGAIN,
        )
    if not plan.complete:
        raise PlanError(
            "plan",
            "predicts sizes only: its channels are not chosen",
            fix="calibrate, then plan again with `stats`",
        )
    _check("plan: before.widths", list(plan.before.widths), list(layout.widths))
    _check("plan: after.widths", list(plan.after.widths), list(layout.widths))
    check_layers(layout, plan.layers)
    sizes = Sizes(plan.after.vocab_size, plan.after.widths, plan.dequantize, plan.layers)
    check_blocks(layout, sizes)
    _check_shape("plan: before", plan.before, shape_of(layout, whole(layout)))
    _check_shape("plan: after", plan.after, shape_of(layout, sizes))
    _check("plan: dropped", plan.dropped, layout.dropped)
    if plan.kept_channels:
        layers = plan.after.num_hidden_layers
        _check("plan: layers of kept_channels", len(plan.kept_channels), layers)
    return sizes


def layer_groups(plan: Plan, layout: Layout) -> list[list[int]]:
    """Per layer of the output the source's layers that it is made of."""
    return plan.layers or [[layer] for layer in range(layout.num_hidden_layers)]


KeptChannels = list[dict[str, list[np.ndarray]]]


def kept_channels(plan: Plan, layout: Layout) -> KeptChannels:
    """Per layer of the output: channel axis → per expert the ascending channels that stay.

    Raises:
        PlanError: the plan has other layers, experts or numbers of channels.
    """
    full, new = (axis_lengths(layout, w) for w in (layout.widths, plan.after.widths))
    result: KeptChannels = []
    for layer, group in enumerate(layer_groups(plan, layout)):
        axes = layout.ffn_outputs[group[0]]
        result.append({})
        for named in plan.kept_channels[layer : layer + 1]:
            _check(f"plan: axes of kept_channels of layer {layer}", sorted(named), sorted(axes))
        for axis, experts in axes.items():
            result[-1][axis] = plan.channels(layer, axis, full[axis], experts)
            for chosen in result[-1][axis]:
                where = f"kept_channels of layer {layer}: {axis}"
                _check(f"plan: {where}", len(chosen), new[axis])
    return result


def _edits_of(
    layout: Layout,
    tensor: TensorRef,
    shape: Sequence[int],
    kept_tokens: np.ndarray,
    kept: Mapping[str, list[np.ndarray]],
) -> tuple[Edit, ...]:
    """The edits that make ``tensor`` one of ``shape``; ``kept`` are its layer's channels."""
    place = layout.roles[tensor.name]
    cut = [number for number, size in enumerate(tensor.shape) if shape[number] != size]
    if not cut:
        return (Edit(tensor),)
    number, dim = cut[0], place.slot.dims[cut[0]]
    assert dim is not None  # cut_shape changes named axes only
    if dim.axis == VOCAB or place.layer is None:
        return (Edit(tensor, number, kept_tokens),)
    chosen = kept[dim.axis]
    if Dim(STACK) in place.slot.dims:
        channels = layout.channels_of(dim.axis)
        return tuple(
            Edit(part, number - 1, positions(indices, dim, channels))
            for part, indices in zip(matrices(tensor), chosen, strict=True)
        )
    indices = positions(chosen[place.expert or 0], dim, layout.channels_of(dim.axis))
    fp8 = layout.checkpoint.quantization
    if place.scales and fp8 is not None:
        where = f"plan: {tensor.name}"
        indices = whole_blocks(indices, fp8.block_shape[number], where)
    return (Edit(tensor, number, indices),)


def _collapsed(
    layout: Layout, tensor: TensorRef, made: tuple[Edit, ...], others: Sequence[int]
) -> tuple[Edit, ...]:
    """The edits ``made`` of a layer's tensor, with the same of ``others`` added to them."""
    place = layout.roles[tensor.name]
    if not adds_up(place.slot):
        return made
    terms = [layout.of_layer[other][renumbered(place.name, other)] for other in others]
    if len(made) == 1 and made[0].indices is None:
        flat = (replace(ref, shape=(ref.parameters,)) for ref in (tensor, *terms))
        return (Edit(next(flat), terms=tuple(flat)),)
    parts = [matrices(ref) for ref in terms] if len(made) > 1 else [[ref] for ref in terms]
    of_each = zip(*parts, strict=True)
    return tuple(replace(e, terms=t) for e, t in zip(made, of_each, strict=True))


def _scaling(checkpoint: Checkpoint, weight: TensorRef) -> Scaling | None:
    scales, fp8 = checkpoint.scales_of(weight), checkpoint.quantization
    return Scaling(scales, fp8.block_shape) if scales and fp8 else None


def positions(channels: np.ndarray, dim: Dim, length: int) -> np.ndarray:
    """Ascending positions of ``channels`` on a dimension that holds ``dim.copies`` of an axis."""
    copies = np.arange(dim.copies)
    if dim.interleaved:
        return (channels[:, None] * dim.copies + copies).reshape(-1)
    return (copies[:, None] * length + channels).reshape(-1)


def matrices(tensor: TensorRef) -> list[TensorRef]:
    """The parts of a tensor along its first dimension, as tensors of their own."""
    shape = tensor.shape[1:]
    step = math.prod(shape) * tensor.itemsize
    return [
        replace(tensor, shape=shape, start=tensor.start + number * step)
        for number in range(tensor.shape[0])
    ]


def _check_shape(where: str, found: Shape, expected: Shape) -> None:
    for name in Shape.__struct_fields__:
        _check(f"{where}.{name}", getattr(found, name), getattr(expected, name))


def _check(where: str, found: object, expected: object) -> None:
    if found != expected:
        raise PlanError(
            where,
            "is not what the source has or comes to",
            expected=expected,
            found=found,
            fix=MAKE_AGAIN,
        )
