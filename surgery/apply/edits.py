"""Edits: each output tensor as copies or selections of a source tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint, same_weights
from surgery.checkpoint.opaque import SHAPE, OpaqueMatrix, codes_of, opaque_matrices
from surgery.errors import PlanError
from surgery.families.blocks import adds_up
from surgery.families.schema import EXPERT, EXPERTS, VOCAB, WIDTHS, Dim, renumbered
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import ITEMSIZE, TensorRef
from surgery.layout.layout import Layout
from surgery.layout.roles import TensorRole
from surgery.planning.layers import check_layers
from surgery.planning.plan import Plan, Shape
from surgery.planning.replacement import check_replaced
from surgery.planning.shapes import (
    axis_lengths,
    check_blocks,
    check_experts,
    expert_groups,
    keeps,
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
    matrix: OpaqueMatrix | None = None
    """Where given, ``source`` are its codes. It is decoded and becomes bf16; ``indices`` select on
    the decoded matrix."""
    numbers: tuple[int, ...] = ()
    """Where given, they replace the elements, which are integers."""

    @property
    def itemsize(self) -> int:
        """Bytes per element of the output."""
        plain = self.scaling is None and self.matrix is None
        return self.source.itemsize if plain else ITEMSIZE["BF16"]

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        shape = self.source.shape if self.matrix is None else self.matrix.shape
        elements = math.prod(shape)
        if self.indices is not None:
            elements = elements // shape[self.dim] * len(self.indices)
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


@dataclass(frozen=True, eq=False)
class KeptParts:
    """What is kept of a layer of the output; of other tensors, only rows are chosen."""

    tokens: np.ndarray
    """Old ids of the rows of the vocabulary, ascending."""
    experts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The layer's routed experts, by their numbers in the source, ascending."""
    channels: Mapping[str, list[np.ndarray]] = field(default_factory=dict)
    """Channel axis → ascending channels, for each kept expert; a dense FFN counts as one."""

    def of_source(self, axis: str, count: int) -> list[np.ndarray]:
        """Return the kept channels of each of the source's ``count`` experts; none if removed."""
        if axis != EXPERT:
            return self.channels[axis]
        found = [np.zeros(0, dtype=np.int64)] * count
        for expert, channels in zip(self.experts.tolist(), self.channels[axis], strict=True):
            found[expert] = channels
        return found

    def position(self, expert: int) -> int:
        """Return the number that a kept expert of the source has in the output."""
        return int(np.searchsorted(self.experts, expert))

    def keeps(self, role: TensorRole) -> bool:
        """Whether the output has the expert that a tensor belongs to, if it belongs to one."""
        return not role.slot.of_expert or role.expert in self.experts

    def name_of(self, name: str, role: TensorRole, layer: int) -> str:
        """Return the name of a layer's tensor in the output, with its new numbers."""
        if not role.slot.of_expert:
            return renumbered(name, layer)
        return renumbered(name, layer, self.position(role.expert or 0))


def edits(plan: Plan, layout: Layout) -> dict[str, list[OutputTensor]]:
    """Return what ``plan`` makes of ``layout``: shard → output tensors in the source's order.

    Every tensor of the source is part of exactly one output tensor, or the plan removes it, or it
    belongs to a removed layer or expert, or it holds scales that are multiplied into their weight.
    Where several layers are merged, the result is in the shards of the first one.

    Raises:
        PlanError: the plan was made for another source, or its channels are not chosen yet.
    """
    sizes = check_plan(plan, layout)
    kept = kept_parts(plan, layout)
    outside = KeptParts(plan.ids().kept)
    replaced = plan.replaced.refs() if plan.replaced else {}
    groups = layer_groups(plan, layout)
    numbers = {group[0]: number for number, group in enumerate(groups)}
    experts = {group[0]: part.experts for group, part in zip(groups, kept, strict=True)}

    def outputs(tensor: TensorRef) -> Iterator[OutputTensor]:
        dtype, role = output_dtype(layout, tensor, sizes), layout.roles[tensor.name]
        if dtype is not None and keeps(role, sizes, experts):
            shape, layer = output_shape(layout, tensor, sizes), role.layer
            name, group, of_layer = tensor.name, [layer or 0], outside
            if layer is not None:
                group, of_layer = groups[numbers[layer]], kept[numbers[layer]]
                number = numbers[layer] - layout.layers_of(role.slot).start
                name = of_layer.name_of(tensor.name, role, number)
            if name in replaced:
                edit = Edit(replaced.pop(name), replaces=True)
                check_replaced(edit.source, dtype, shape)
                yield OutputTensor(name, dtype, shape, (edit,))
                return
            if role.opaque and sizes.dequantize:
                name = layout.checkpoint.opaque_weight(name)
                yield OutputTensor(name, dtype, shape, _decoded(layout, tensor, shape, of_layer))
                return
            parts = _edits_of(layout, tensor, shape, of_layer)
            if role.opaque and tensor.name.endswith(SHAPE):
                parts = (Edit(tensor, numbers=_new_shape(layout, tensor, sizes)),)
            if len(group) > 1 and adds_up(role.slot):
                others = (layout.of_layer[n][renumbered(role.name, n)] for n in group[1:])
                added = [_edits_of(layout, other, shape, of_layer) for other in others]
                parts = _collapsed(parts, added)
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
    scaled |= {ref.path.name for edit in used if edit.matrix for ref in edit.matrix.refs}
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
            "predicts sizes only: channels or experts are not chosen",
            fix="calibrate, then plan again with `stats`",
        )
    _check("plan: before.widths", list(plan.before.widths), list(layout.widths))
    _check("plan: after.widths", list(plan.after.widths), list(layout.widths))
    check_layers(layout, plan.layers)
    check_experts(layout, plan.after.experts)
    removes = plan.after.experts != layout.experts
    experts = plan.after.experts if removes else 0
    sizes = Sizes(plan.after.vocab_size, plan.after.widths, plan.dequantize, plan.layers, experts)
    check_blocks(layout, sizes)
    _check_shape("plan: before", plan.before, shape_of(layout, whole(layout)))
    layers = plan.after.num_hidden_layers
    if plan.kept_channels:
        _check("plan: layers of kept_channels", len(plan.kept_channels), layers)
    if plan.kept_experts:
        _check("plan: layers of kept_experts", len(plan.kept_experts), layers)
    firsts = [group[0] for group in layer_groups(plan, layout)]
    kept = dict(zip(firsts, _kept_experts(plan, layout), strict=True))
    _check_shape("plan: after", plan.after, shape_of(layout, sizes, kept))
    _check("plan: dropped", plan.dropped, layout.dropped)
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


def kept_parts(plan: Plan, layout: Layout) -> list[KeptParts]:
    """Return what is kept of each layer of the output.

    Raises:
        PlanError: layers, experts or channels are not as many as the source or the sizes say.
    """
    full, new = (axis_lengths(layout, w) for w in (layout.widths, plan.after.widths))
    tokens, result = plan.ids().kept, []
    for layer, experts in enumerate(_kept_experts(plan, layout)):
        axes, found = layout.ffn_outputs[layer_groups(plan, layout)[layer][0]], {}
        for named in plan.kept_channels[layer : layer + 1]:
            _check(f"plan: axes of kept_channels of layer {layer}", sorted(named), sorted(axes))
        for axis, count in axes.items():
            kept = len(experts) if axis == EXPERT else count
            found[axis] = plan.channels(layer, axis, full[axis], kept)
            for chosen in found[axis]:
                where = f"kept_channels of layer {layer}: {axis}"
                _check(f"plan: {where}", len(chosen), new[axis])
        result.append(KeptParts(tokens, experts, found))
    return result


def _kept_experts(plan: Plan, layout: Layout) -> list[np.ndarray]:
    """Return the experts to keep of each layer of the output; none of layers without experts."""
    found = []
    for layer, group in enumerate(layer_groups(plan, layout)):
        routed = EXPERT in layout.ffn_outputs[group[0]]
        found.append(plan.experts(layer) if routed else np.zeros(0, dtype=np.int64))
        _check_groups(layout, found[-1], layer)
    return found


def _check_groups(layout: Layout, experts: np.ndarray, layer: int) -> None:
    """Refuse experts unless as many are kept in each group that the router chooses among."""
    if len(experts) in (0, layout.experts):
        return
    groups = expert_groups(layout)
    counts = np.bincount(experts // (layout.experts // groups), minlength=groups)
    where = f"plan: kept_experts of layer {layer}, by group"
    _check(where, counts.tolist(), [len(experts) // groups] * groups)


def _edits_of(
    layout: Layout, tensor: TensorRef, shape: Sequence[int], kept: KeptParts
) -> tuple[Edit, ...]:
    """Return the edits that give ``tensor`` the ``shape``; ``kept`` is of its layer."""
    role = layout.roles[tensor.name]
    changed = {number for number, size in enumerate(tensor.shape) if shape[number] != size}
    if not changed:
        return (Edit(tensor),)
    dims = {number: dim for number, dim in enumerate(role.slot.dims) if number in changed and dim}
    channels = {number: dim for number, dim in dims.items() if dim.axis in WIDTHS}
    if not channels:
        number, dim = next(iter(dims.items()))
        rows = kept.experts if dim.axis == EXPERTS else kept.tokens
        return (Edit(tensor, number, rows[rows < tensor.shape[number]]),)
    number, dim = next(iter(channels.items()))
    chosen, length = kept.channels[dim.axis], layout.channels_of(dim.axis)
    if role.slot.packed:
        parts = matrices(tensor)
        return tuple(
            Edit(parts[expert], number - 1, positions(indices, dim, length))
            for expert, indices in zip(kept.experts, chosen, strict=True)
        )
    own = kept.position(role.expert or 0) if role.slot.of_expert else 0
    indices = positions(chosen[own], dim, length)
    fp8, block = layout.checkpoint.quantization, layout.steps_of(tensor)[number]
    if role.scales and fp8 is not None:
        block = fp8.block_shape[number]
    return (Edit(tensor, number, whole_blocks(indices, block, f"plan: {tensor.name}")),)


def _new_shape(layout: Layout, part: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Return the rows and columns of the weight that ``part`` belongs to, if they change."""
    codes, opaque = codes_of(layout.checkpoint, part), layout.checkpoint.opaque
    if codes is None or opaque is None:
        return ()
    shape = output_shape(layout, codes, sizes)
    return opaque.shape_of(shape, codes.dtype) if shape != codes.shape else ()


def _decoded(
    layout: Layout, tensor: TensorRef, shape: Sequence[int], kept: KeptParts
) -> tuple[Edit, ...]:
    """Return the edits that decode an opaque weight to ``shape``."""
    role, full = layout.roles[tensor.name], layout.shape_of(tensor)
    matrices = opaque_matrices(layout.checkpoint, tensor)
    if role.slot.packed:
        matrices = [matrices[expert] for expert in kept.experts]
    changed = [
        (number, dim)
        for number, dim in enumerate(role.slot.dims)
        if dim is not None and dim.axis != EXPERTS and shape[number] != full[number]
    ]
    first = kept.position(role.expert or 0) if role.slot.of_expert else 0
    found = []
    for number, matrix in enumerate(matrices):
        edit = Edit(matrix.codes, matrix=matrix)
        for at, dim in changed:
            indices = kept.tokens
            if dim.axis != VOCAB:
                channels = kept.channels[dim.axis][first + number]
                indices = positions(channels, dim, layout.channels_of(dim.axis))
            edit = replace(edit, dim=at - role.slot.packed, indices=indices)
        found.append(edit)
    return tuple(found)


def _collapsed(made: tuple[Edit, ...], others: Sequence[tuple[Edit, ...]]) -> tuple[Edit, ...]:
    """Return the edits ``made`` of a layer's tensor with those of ``others`` layers added."""
    terms = [tuple(edit.source for edit in of_each) for of_each in zip(*others, strict=True)]
    if len(made) == 1 and made[0].indices is None:
        flat = (replace(ref, shape=(ref.parameters,)) for ref in (made[0].source, *terms[0]))
        return (Edit(next(flat), terms=tuple(flat)),)
    return tuple(replace(e, terms=t) for e, t in zip(made, terms, strict=True))


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
