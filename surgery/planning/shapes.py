"""Shapes and bytes of an output from headers alone; what quantized weights and routers allow."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from surgery.checkpoint.fp8 import scale_grid
from surgery.errors import BudgetError, PlanError
from surgery.families.schema import (
    ENCODER_DECODER,
    EXPERT_KEYS,
    EXPERTS,
    GROUP_KEYS,
    PER_TOKEN_KEYS,
    VOCAB,
    Dim,
)
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.safetensors_header import ITEMSIZE, TensorRef
from surgery.layout.layout import Layout, size_in
from surgery.layout.roles import CARRIED, TensorRole
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
            f"is out of reach: a token goes to {_per_token(layout)}",
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
    smallest = groups * max(least, -(-_per_token(layout) // chosen))
    return range(min(smallest, full), full + 1, groups)


def _per_token(layout: Layout) -> int:
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


CACHE_ITEMSIZE, LOGIT_ITEMSIZE = 2, 4
"""Bytes of a value in a bf16 cache, and of a float32 logit."""


@dataclass(frozen=True)
class Serving:
    """What a model takes where it is served, predicted from headers; all in bytes."""

    weights: int
    """Of all weights in memory, in the checkpoint's dtype; those of image or audio encoders, too. A
    stored copy of a tied embedding takes none."""
    decoded: int | None
    """Weights read for each token that a single sequence decodes. Of the embedding that is one row,
    unless it is the head, too; of routed experts, those of the token; of encoders of images, none.
    None where headers do not tell, or nothing is decoded."""
    cache: int | None
    """Keys and values of each position, in bf16; layers with windows keep only the last ones. None
    where headers do not tell, or nothing is decoded."""
    source_cache: int | None
    """The same of each position of an encoder's text, to which its decoder attends; None where
    there is no encoder."""
    logits: int | None
    """float32 logits of each position of a batch; None where the model predicts no tokens."""


def serving_of(layout: Layout, sizes: Sizes) -> Serving:
    """Predict what ``layout`` takes where it is served, once it has ``sizes``."""
    total = beside = looked_up = routed = 0
    for tensor in layout.checkpoint.tensors.values():
        role, dtype = layout.roles[tensor.name], output_dtype(layout, tensor, sizes)
        tied_head = layout.tied and role.name == layout.family.head
        if dtype is None or tied_head or not keeps(role, sizes, {}):
            continue
        nbytes = math.prod(output_shape(layout, tensor, sizes)) * ITEMSIZE[dtype]
        total += nbytes
        if role.slot is CARRIED:
            beside += nbytes
            continue
        table = role.slot.dims == (Dim(VOCAB), None) and not _is_head(layout, role)
        looked_up += nbytes - nbytes // sizes.vocab_size if table else 0
        routed += nbytes if role.slot.of_expert or role.slot.packed else 0
    beside_encoder = layout.family.kind == ENCODER_DECODER
    cached, of_source = 0, 0
    if beside_encoder:
        cached, of_source = _cached_beside_encoder(layout)
    elif layout.predicts:
        cached = _cached(layout, [group[0] for group in sizes.layers])
    count = sizes.experts or layout.experts
    idle = routed * (count - min(_per_token(layout), count)) // count if count else 0
    decodes = layout.predicts or beside_encoder
    return Serving(
        weights=total,
        decoded=total - beside - idle - looked_up if layout.predicts else None,
        cache=cached * CACHE_ITEMSIZE or None,
        source_cache=of_source * CACHE_ITEMSIZE or None,
        logits=sizes.vocab_size * LOGIT_ITEMSIZE if decodes else None,
    )


def _is_head(layout: Layout, role: TensorRole) -> bool:
    return role.name == (layout.family.embedding if layout.tied else layout.family.head)


def _cached(layout: Layout, kept: Sequence[int]) -> int:
    """Values that the cache holds of each position, in the layers ``kept``; none: in all.

    The last ``num_kv_shared_layers`` take those of a layer before them.
    """
    total = 0
    for layer in kept or range(layout.num_hidden_layers):
        modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        own = layout.of_layer[layer] if layer < layout.first_shared else {}
        for name, ref in own.items():
            module, _, last = name.removesuffix(".weight").rpartition(".")
            modules[module][last] = layout.shape_of(ref)
        total += sum(map(_cached_values, modules.values()))
    return total


def _cached_values(attention: Mapping[str, tuple[int, ...]]) -> int:
    """Values that a module caches of a position, by the shapes of its maps.

    Linear attention, which has an ``A_log``, carries on a state instead.
    """
    if "A_log" in attention:
        return 0
    if {"qkv_proj", "o_proj"} <= attention.keys():  # as many queries as go into the second
        return attention["qkv_proj"][0] - attention["o_proj"][1]
    latents, keys = (attention.get(n, (0,))[0] for n in ("kv_a_proj_with_mqa", "k_proj"))
    return latents + keys + attention.get("v_proj", (keys,))[0]


MAPS = {"k", "v", "key", "value", "k_proj", "v_proj", "key_proj", "value_proj"}
"""Names of the maps that make keys and values, in decoders that have an encoder."""

CROSSES = re.compile("cross|encoder|encdec", re.IGNORECASE)
"""What the name of an attention to the encoder has."""


def _cached_beside_encoder(layout: Layout) -> tuple[int, int]:
    """Values that a decoder caches of each of its positions, and of each of its encoder's.

    Where no attention is to the encoder alone, each is to both (T5Gemma 2). All layers are kept.
    """
    own = of_source = 0
    for name, ref in layout.checkpoint.tensors.items():
        *path, last = name.removesuffix(".weight").split(".")
        if last not in MAPS or "decoder" not in path:
            continue
        first = len(path) - path[::-1].index("decoder")
        if any(map(CROSSES.search, path[first:])):
            of_source += layout.shape_of(ref)[0]
        else:
            own += layout.shape_of(ref)[0]
    return own, of_source or own


def serving_table(before: Serving, after: Serving | None = None) -> str:
    """Return predictions as text for people, side by side where there are two.

    Of a model that predicts no tokens, weights alone.
    """
    names = {
        "weights": "weights",
        "decoded": "read for each decoded token",
        "cache": "cache of each position",
        "source_cache": "cache of each source position",
        "logits": "logits",
    }
    if before.logits is None:
        names = {"weights": names["weights"]}
    elif before.source_cache is None:
        del names["source_cache"]
    head = f"{'bytes':<30}{'before' if after else '':>18}"
    rows = [head + f"{'after':>18}{'removed':>10}" if after else head.rstrip()]
    for key, name in names.items():
        old, new = getattr(before, key), getattr(after, key) if after else None
        row = f"{name:<30}{'unknown' if old is None else f'{old:,}':>18}"
        if after is not None:
            share = f"{1 - new / old:.2%}" if old and new is not None else ""
            row += f"{'unknown' if new is None else f'{new:,}':>18}{share:>10}"
        rows.append(row)
    return "\n".join(rows)


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
