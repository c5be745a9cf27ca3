"""Edits: each output tensor as copies or selections of a source tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint, same_weights
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
    output_dtype,
    output_shape,
    shape_of,
    whole_blocks,
)
from surgery.planning.sizes import Sizes, whole


@dataclass(frozen=True)
class Scaling:
    """The scales that turn an FP8 weight into numbers."""

    scales: TensorRef
    """One scale per block; they may be in another shard than the weight."""
    block_shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Edit:
    """A contiguous run of an output tensor's bytes, and what it is made of."""

    source: TensorRef
    """A tensor of the source, or one expert's matrix in it."""
    dim: int = 0
    """The dimension that ``indices`` select on."""
    indices: np.ndarray | None = None
    """Ascending positions to keep; None keeps the whole tensor."""
    terms: tuple[TensorRef, ...] = ()
    """The same tensor of other layers, which are merged into this one (``collapse``)."""
    replaces: bool = False
    """Whether ``source`` is in the plan's file of replacements, not in a shard of the source."""
    scaling: Scaling | None = None
    """Where given, the elements are dequantized to bf16; else they are copied as they are."""

    @property
    def itemsize(self) -> int:
        """Bytes per element of the output."""
        return self.source.itemsize if self.scaling is None else ITEMSIZE["BF16"]

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        elements = self.source.parameters
        if self.indices is not None:
            elements = elements // self.source.shape[self.dim] * len(self.indices)
        return elements * self.itemsize


@dataclass(frozen=True, eq=False)
class OutputTensor:
    """One tensor of the output: the edits that make its bytes, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Edit, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(edit.nbytes for edit in self.edits)


def edits(plan: Plan, layout: Layout) -> dict[str, list[OutputTensor]]:
    """Return what ``plan`` makes of ``layout``: shard → output tensors in the source's order.

    Every tensor of the source is part of exactly one output tensor, or the plan removes it, or it
    belongs to a removed layer, or it holds scales that are multiplied into their weight. Where
    several layers are merged, the result is in the shards of the first one.

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
            shape, layer = output_shape(layout, tensor, sizes), layout.roles[tensor.name].layer
            name, group = tensor.name, [layer or 0]
            if layer is not None:
                name, group = renumbered(name, numbers[layer]), groups[numbers[layer]]
            if name in replaced:
                edit = Edit(replaced.pop(name), replaces=True)
                check_replaced(edit.source, dtype, shape)
                yield OutputTensor(name, dtype, shape, (edit,))
                return
            chosen = kept[numbers[layer]] if layer is not None else {}
            parts = _edits_of(layout, tensor, shape, kept_tokens, chosen)
            if len(group) > 1:
                parts = _collapsed(layout, tensor, parts, group[1:])
            if dtype != tensor.dtype:
                scaling = _scaling(layout.checkpoint, tensor)
                parts = tuple(replace(edit, scaling=scaling) for edit in parts)
            yield OutputTensor(name, dtype, shape, parts)

    by_shard = {
        name: [output for tensor in header.tensors for output in outputs(tensor)]
        for name, header in layout.checkpoint.shards.items()
    }
    for ref in replaced.values():
        check_replaced(ref, None, None)
    return by_shard


def sources(shard: Sequence[OutputTensor]) -> frozenset[str]:
    """Return the names of the source's shards that these tensors are made of."""
    used = [edit for tensor in shard for edit in tensor.edits if not edit.replaces]
    scaled = {edit.scaling.scales.path.name for edit in used if edit.scaling is not None}
    terms = {term.path.name for edit in used for term in edit.terms}
    return frozenset({edit.source.path.name for edit in used} | scaled | terms)


def check_plan(plan: Plan, layout: Layout) -> Sizes:
    """Check that a plan fits ``layout``, and return its sizes.

    Raises:
        PlanError: as ``edits``.
    """
    check_source(plan, layout.checkpoint)
    if same_weights(plan.weights, layout.checkpoint.weights) is False:
        raise PlanError(
            layout.checkpoint.path,
            "has the shapes of the checkpoint that the plan was made for, but other weights",
            fix=f"{MAKE_AGAIN}, or download the shards again if they should be the same",
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


def check_source(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with another config, tokenizer or shapes than the plan's source.

    Raises:
        PlanError: the fingerprints differ.
    """
    if plan.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            checkpoint.path,
            "is not the checkpoint that the plan was made for",
            expected=f"fingerprint {plan.fingerprint[:12]}",
            found=checkpoint.fingerprint[:12],
            fix=MAKE_AGAIN,
        )


def layer_groups(plan: Plan, layout: Layout) -> list[list[int]]:
    """Return, for each layer of the output, the source's layers that it is made of."""
    return plan.layers or [[layer] for layer in range(layout.num_hidden_layers)]


KeptChannels = list[dict[str, list[np.ndarray]]]


def kept_channels(plan: Plan, layout: Layout) -> KeptChannels:
    """Return, for each layer of the output, channel axis → per expert the channels to keep.

    Raises:
        PlanError: layers, experts or channels are not as many as the source or the sizes say.
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
    """Return the edits that give ``tensor`` the ``shape``; ``kept`` are its layer's channels."""
    role = layout.roles[tensor.name]
    changed = [number for number, size in enumerate(tensor.shape) if shape[number] != size]
    if not changed:
        return (Edit(tensor),)
    number, dim = changed[0], role.slot.dims[changed[0]]
    assert dim is not None  # output_shape changes named axes only
    if dim.axis == VOCAB or role.layer is None:
        return (Edit(tensor, number, kept_tokens),)
    chosen = kept[dim.axis]
    if Dim(STACK) in role.slot.dims:
        channels = layout.channels_of(dim.axis)
        return tuple(
            Edit(part, number - 1, positions(indices, dim, channels))
            for part, indices in zip(matrices(tensor), chosen, strict=True)
        )
    indices = positions(chosen[role.expert or 0], dim, layout.channels_of(dim.axis))
    fp8 = layout.checkpoint.quantization
    if role.scales and fp8 is not None:
        where = f"plan: {tensor.name}"
        indices = whole_blocks(indices, fp8.block_shape[number], where)
    return (Edit(tensor, number, indices),)


def _collapsed(
    layout: Layout, tensor: TensorRef, made: tuple[Edit, ...], others: Sequence[int]
) -> tuple[Edit, ...]:
    """Return the edits ``made`` of a layer's tensor with the same tensor of ``others`` added."""
    role = layout.roles[tensor.name]
    if not adds_up(role.slot):
        return made
    terms = [layout.of_layer[other][renumbered(role.name, other)] for other in others]
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
    """Return the positions of ``channels`` on a dimension that holds ``dim.copies`` of an axis."""
    copies = np.arange(dim.copies)
    if dim.interleaved:
        return (channels[:, None] * dim.copies + copies).reshape(-1)
    return (copies[:, None] * length + channels).reshape(-1)


def matrices(tensor: TensorRef) -> list[TensorRef]:
    """Return the parts of a tensor along its first dimension, as tensors of their own."""
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
            "does not match the source or the rest of the plan",
            expected=expected,
            found=found,
            fix=MAKE_AGAIN,
        )
