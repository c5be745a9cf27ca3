"""Shapes and bytes of an output from headers alone; what quantized weights and routers allow."""

import math
from collections.abc import Mapping
from math import lcm

import numpy as np

from surgery.checkpoint.fp8 import scale_grid
from surgery.errors import BudgetError, PlanError
from surgery.families.schema import (
    EXPERT_KEYS,
    EXPERTS,
    GROUP_KEYS,
    PER_TOKEN_KEYS,
    VOCAB,
)
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import ITEMSIZE, TensorRef
from surgery.layout.layout import Layout, size_in
from surgery.layout.roles import TensorRole
from surgery.planning.layers import PLAIN_LISTS
from surgery.planning.plan import Plan, Shape
from surgery.planning.sizes import Sizes

DEQUANTIZE = "`dequantize` writes bf16, which can be pruned anywhere"


def blocks(layout: Layout) -> dict[str, int]:
    """Return key of config.json, or VOCAB → how many positions must be kept or removed together.

    They share a scale, or a byte. Axes that no quantized weight has are left out.
    """
    found: dict[str, int] = {}
    fp8 = layout.checkpoint.quantization
    for name, role in layout.roles.items():
        tensor = layout.checkpoint.tensors[name]
        sizes: tuple[int, ...] = ()
        if role.opaque:
            sizes = layout.steps_of(tensor)
        elif fp8 is not None and tensor.dtype == fp8.dtype:
            sizes = fp8.block_shape
        for dim, size in zip(role.slot.dims, sizes, strict=False):
            key = layout.key_of(dim)
            if key is not None and size > 1:
                found[key] = lcm(found.get(key, 1), size)
    return found


def check_blocks(layout: Layout, sizes: Sizes) -> None:
    """Refuse sizes that quantized weights cannot have.

    Raises:
        BudgetError: a size is not in whole blocks, rows of a vocabulary that share scales would be
            lost, or ``dequantize`` is asked of a checkpoint that is not quantized.
    """
    if sizes.dequantize:
        if layout.checkpoint.quantization is None and layout.checkpoint.opaque is None:
            raise BudgetError(
                "`dequantize`",
                "has no effect: the checkpoint is not quantized",
                fix="leave it out",
            )
        return
    _check_opaque(layout, sizes)
    found = blocks(layout)
    if found.get(VOCAB, 1) > 1 and sizes.vocab_size != layout.vocab_size:
        raise BudgetError(
            "`vocab_size`",
            "cannot change: rows of this vocabulary share scales",
            expected=layout.vocab_size,
            found=sizes.vocab_size,
            fix=DEQUANTIZE,
        )
    for key, size in sizes.widths.items():
        block, full = found.get(key, 1), layout.widths[key]
        if size != full and (size % block or full % block):
            raise BudgetError(
                key,
                f"is not in whole blocks of {block} channels, which share a scale",
                expected=f"multiples of {block} before and after",
                found=f"{full} and {size}",
                fix=f"choose another size; or {DEQUANTIZE}",
            )


def unprunable(layout: Layout) -> set[str | None]:
    """Return VOCAB and keys of widths on which quantized weights are only moved whole."""
    tensors = layout.checkpoint.tensors
    return {
        layout.key_of(dim)
        for name, role in layout.roles.items()
        if role.opaque and not role.scales
        for dim, step in zip(role.slot.dims, layout.steps_of(tensors[name]), strict=False)
        if step == 0
    }


def _check_opaque(layout: Layout, sizes: Sizes) -> None:
    """Refuse to prune rows and columns of weights that are only moved whole.

    Raises:
        BudgetError: naming the size.
    """
    opaque = layout.checkpoint.opaque
    if opaque is None:
        return
    carried = unprunable(layout)
    given = {VOCAB: (sizes.vocab_size, layout.vocab_size)}
    given |= {key: (size, layout.widths[key]) for key, size in sizes.widths.items()}
    for key, (size, full) in given.items():
        if key in carried and size != full:
            raise BudgetError(
                "`vocab_size`" if key == VOCAB else key,
                f"cannot change: its weights are {opaque.method}, and are only moved whole",
                expected=full,
                found=size,
                fix=f"remove experts or layers instead; or {DEQUANTIZE}",
            )


def whole_blocks(indices: np.ndarray, block: int, where: str) -> np.ndarray:
    """Return the ascending numbers of the blocks that the ascending ``indices`` are made of.

    Raises:
        PlanError: a block is not whole.
    """
    numbers = indices[::block] // block
    if not np.array_equal(indices, (numbers[:, None] * block + np.arange(block)).reshape(-1)):
        raise PlanError(
            where,
            "kept_channels are not whole blocks, which share a scale",
            expected=f"blocks of {block}",
            fix=MAKE_AGAIN,
        )
    return numbers


def expert_groups(layout: Layout) -> int:
    """Return the number of groups in which a token chooses experts; 1 where there are none.

    Raises:
        BudgetError: config.json has groups that the model's router does not know.
    """
    return _groups(layout)[0]


def _groups(layout: Layout) -> tuple[int, int, int]:
    """Return the number of groups, how many of them a token chooses, and a group's least experts.

    Raises:
        BudgetError: config.json has groups that the model's router does not know, or groups that
            are not of the same size.
    """
    experts, config, where = layout.family.experts, layout.config, layout.where
    found = {key: size_in(config, key, where, least=0) or 1 for key in GROUP_KEYS if key in config}
    groups = experts.groups if experts else None
    if groups is None:
        for key, count in found.items():
            if count > 1:
                raise _cannot_follow(f"{where}: {key}", "names groups of experts", count)
        return 1, 1, experts.least if experts else 1
    named = [found[key] for key in (groups.key, GROUP_KEYS[0]) if key in found]
    own = named[0] if named else groups.count or 1
    chosen = size_in(config, "topk_group", where, least=0) or groups.chosen or 1
    if layout.experts % own:
        raise _cannot_follow(f"{where}: {groups.key}", "does not divide the experts", own)
    return own, min(chosen, own), groups.least


def _cannot_follow(where: str, problem: str, found: object) -> BudgetError:
    fix = "keep all experts"
    return BudgetError(
        where, f"{problem}, which experts cannot be removed from", found=found, fix=fix
    )


def check_experts(layout: Layout, count: int) -> None:
    """Refuse a number of experts that the model's router cannot choose among.

    Raises:
        BudgetError: ``count`` is out of reach, or config.json ties experts to something unknown.
    """
    if count in (0, layout.experts):
        return
    full = layout.experts
    choices = expert_choices(layout)
    if count not in choices:
        groups = choices.step
        step = f" in steps of {groups}, for as many in each group" if groups > 1 else ""
        raise BudgetError(
            "`num_experts`",
            f"is out of reach: a token goes to {experts_per_token(layout)}",
            expected=f"{choices.start} to {full}{step}",
            found=count,
            fix="choose a number in this range",
        )
    _check_unknown_lists(layout)


def expert_choices(layout: Layout) -> range:
    """Return the numbers of experts that the model's router can choose among.

    Each group keeps as many, and the groups that a token chooses must hold the experts it goes to.

    Raises:
        BudgetError: config.json ties experts to something unknown, or the model has none.
    """
    full = layout.experts
    if layout.family.experts is None or not full:
        why = layout.family.experts_stay if full else "the model has no routed experts"
        raise BudgetError("`num_experts`", f"cannot change: {why}", fix="leave it out")
    groups, chosen, least = _groups(layout)
    smallest = groups * max(least, -(-experts_per_token(layout) // chosen))
    return range(min(smallest, full), full + 1, groups)


def experts_per_token(layout: Layout) -> int:
    """Return how many routed experts a token has at most, by config.json."""
    experts, config = layout.family.experts, layout.config
    found: list[int] = []
    for key in PER_TOKEN_KEYS:
        value = config.get(key)
        for each in value if isinstance(value, list) else [value]:
            found += [size_in({key: each}, key, layout.where) or 0]
    default = experts.per_token if experts else None
    if not max(found, default=0) and default is None:
        raise _cannot_follow(f"{layout.where}: {PER_TOKEN_KEYS[0]}", "is missing", None)
    return max(found, default=0) or default or 1


def _check_unknown_lists(layout: Layout) -> None:
    """Refuse config.json if a list of it may have an entry for each expert."""
    rules = (rule.key for rule in layout.family.layer_rules or ())
    known = {*EXPERT_KEYS, *PER_TOKEN_KEYS, *rules}
    for key, value in layout.config.items():
        if key in known or PLAIN_LISTS.search(key) or not isinstance(value, list | dict):
            continue
        of_experts = isinstance(value, list) and len(value) == layout.experts
        named = "expert" in key and len(value) > 1
        if (of_experts or named) and len(value) != layout.num_hidden_layers:
            where = f"{layout.where}: {key}"
            raise _cannot_follow(
                where, "may have an entry for each expert", f"{len(value)} entries"
            )


def output_shape(layout: Layout, tensor: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of ``tensor`` under ``sizes``; scales follow their weight."""
    role, fp8 = layout.roles[tensor.name], layout.checkpoint.quantization
    shape = list(tensor.shape)
    if role.opaque and sizes.dequantize:
        shape = list(layout.shape_of(tensor))
    elif role.opaque:
        return _opaque_shape(layout, tensor, sizes)
    if role.scales and fp8 is not None:
        weight = layout.checkpoint.tensors[fp8.weight_of(tensor.name)]
        rows, columns = output_shape(layout, weight, sizes)
        return scale_grid((rows, columns), fp8.block_shape)
    for number, dim in enumerate(role.slot.dims):
        key = layout.key_of(dim)
        if dim is not None and key is not None:
            shape[number] = _length(layout, key, sizes) * layout.unit(dim) - layout.missing(dim)
    return tuple(shape)


def _opaque_shape(layout: Layout, tensor: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of a part of a quantized weight, in whole steps."""
    shape = list(tensor.shape)
    steps = zip(layout.roles[tensor.name].slot.dims, layout.steps_of(tensor), strict=False)
    for number, (dim, step) in enumerate(steps):
        key = layout.key_of(dim)
        if dim is not None and key is not None and step:
            full, kept = layout.length(key), _length(layout, key, sizes)
            shape[number] = kept * layout.unit(dim) // step if kept != full else shape[number]
    return tuple(shape)


def _length(layout: Layout, key: str, sizes: Sizes) -> int:
    if key == VOCAB:
        return sizes.vocab_size
    return sizes.experts or layout.experts if key == EXPERTS else sizes.widths[key]


KeptExperts = Mapping[int, np.ndarray]
"""Layer of the source → its kept experts, ascending."""


def keeps(role: TensorRole, sizes: Sizes, kept: KeptExperts) -> bool:
    """Whether the output has the expert that a tensor belongs to, if it belongs to one.

    Where no experts are chosen yet, any are as good: the first of each layer.
    """
    if not (sizes.experts and role.slot.of_expert and role.layer is not None):
        return True
    experts, expert = kept.get(role.layer), role.expert or 0
    return expert < sizes.experts if experts is None else bool(np.isin(expert, experts))


def output_dtype(layout: Layout, tensor: TensorRef, sizes: Sizes) -> str | None:
    """Return the safetensors dtype of ``tensor`` in the output; None where it is removed."""
    role = layout.roles[tensor.name]
    if role.dropped or (role.scales and sizes.dequantize):
        return None
    is_removed = sizes.layers and all(role.layer != group[0] for group in sizes.layers)
    if is_removed and role.layer is not None:
        return None
    quantized = role.opaque or layout.checkpoint.scales_of(tensor) is not None
    return "BF16" if quantized and sizes.dequantize else tensor.dtype


def shape_of(layout: Layout, sizes: Sizes, kept: KeptExperts | None = None) -> Shape:
    """Predict sizes, parameters and bytes of ``layout`` once it has ``sizes``.

    ``kept`` are the kept experts, where they are chosen.
    """
    nbytes = 0
    for tensor in layout.checkpoint.tensors.values():
        dtype = output_dtype(layout, tensor, sizes)
        if dtype is not None and keeps(layout.roles[tensor.name], sizes, kept or {}):
            nbytes += math.prod(output_shape(layout, tensor, sizes)) * ITEMSIZE[dtype]
    return Shape(
        sizes.vocab_size,
        dict(sizes.widths),
        len(sizes.layers) or layout.num_hidden_layers,
        parameters_of(layout, sizes),
        nbytes,
        sizes.experts or layout.experts,
    )


def sizes_of(plan: Plan) -> Sizes:
    """Return the sizes that a plan leads to."""
    experts = plan.after.experts if plan.after.experts != plan.before.experts else 0
    return Sizes(plan.after.vocab_size, plan.after.widths, plan.dequantize, plan.layers, experts)


def parameters_of(layout: Layout, sizes: Sizes) -> int:
    """Return the parameters of ``layout`` once it has ``sizes``."""
    left = layout.with_layers(sizes.layers).with_experts(sizes.experts)
    return left.parameters(sizes.vocab_size, sizes.widths)


def axis_lengths(layout: Layout, widths: Mapping[str, int]) -> dict[str, int]:
    """Return channel axis → its length under ``widths``, for the axes that the model has."""
    return {
        axis: widths[width.key] * layout.times(axis)
        for axis, width in layout.family.widths.items()
        if width.key in widths
    }
