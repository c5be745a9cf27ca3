"""Which experts and channels a plan keeps, by statistics or weights, and how it holds them."""

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from surgery.checkpoint.fp8 import weight_windows
from surgery.checkpoint.opaque import opaque_matrices
from surgery.errors import GET_AGAIN, NotFiniteError
from surgery.families.schema import EXPERT
from surgery.files import index_sets
from surgery.files.safetensors_header import TensorRef
from surgery.hub.shards import Shards
from surgery.layout.layout import Layout
from surgery.planning.shapes import KeptExperts, axis_lengths, blocks, expert_groups
from surgery.planning.sizes import Sizes
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    AIMER,
    Kept,
    bucket_weights,
    choose_channels,
    choose_experts,
    expert_importance,
    needs_stats,
    random_channels,
)
from surgery.tokenizer.id_map import IdMap

Layer = TypeVar("Layer")


def kept_experts(
    layout: Layout,
    sizes: Sizes,
    criterion: str,
    stats: ChannelStats | None,
    ids: IdMap,
) -> dict[int, np.ndarray]:
    """Return layer of the source → the experts to keep; empty if none are removed or chosen."""
    if not sizes.experts or (stats is None and needs_stats(criterion)):
        return {}
    layers = [layer for layer, axes in enumerate(layout.ffn_outputs) if EXPERT in axes]
    groups = expert_groups(layout)
    sums = {layer: stats.layers[layer][EXPERT] for layer in layers} if stats else {}
    weights = bucket_weights(stats, ids) if stats else np.ones(1)
    found = {}
    with Shards.of(layout.checkpoint.path) as shards:
        if criterion == AIMER:
            refs = [ref for layer in layers for ref in _expert_matrices(layout, layer)]
            shards.expect([{ref.path.name} for ref in refs])
        for layer in layers:
            if criterion == AIMER:
                importance = -_aimer(layout, layer, shards)
            else:
                importance = expert_importance(
                    criterion, sums.get(layer), weights, layout.experts, layer
                )
            found[layer] = choose_experts(importance, sizes.experts, groups)
    return found


def _aimer(layout: Layout, layer: int, shards: Shards) -> np.ndarray:
    """Return ‖w‖₁ / (√N ‖w‖₂) of each expert's matrices, float64 ``[experts]``; reads them.

    Source: arXiv 2603.18492, eq. 4, which removes the experts of the largest value.

    Raises:
        NotFiniteError: a weight is NaN or infinity.
    """
    sums = np.zeros((3, layout.experts))  # N, Σ|w| and Σw²
    for ref in _expert_matrices(layout, layer):
        role = layout.roles[ref.name]
        total = math.prod(layout.shape_of(ref))
        for first, values in _values(layout, ref, shards):
            expert = role.expert or 0
            if role.slot.packed:
                expert = first * layout.experts // total
            wide = values.astype(np.float64)
            sums[:, expert] += len(wide), np.abs(wide).sum(), np.square(wide).sum()
        if not np.isfinite(sums).all():
            where = f"{ref.path}: tensor {ref.name}"
            raise NotFiniteError(where, "has a number that is not finite", fix=GET_AGAIN)
    count, absolute, square = sums
    return absolute / np.sqrt(np.maximum(count * square, np.finfo(np.float64).tiny))


def _values(layout: Layout, ref: TensorRef, shards: Shards) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the values of a weight in order, with the number of each window's first one."""
    if not layout.roles[ref.name].opaque:
        yield from weight_windows(layout.checkpoint, ref, shards)
        return
    first = 0
    for matrix in opaque_matrices(layout.checkpoint, ref):
        yield first, matrix.decode(shards).reshape(-1)
        first += math.prod(matrix.shape)


def _expert_matrices(layout: Layout, layer: int) -> list[TensorRef]:
    """Return the tensors of a layer that hold its experts' matrices; their biases are none."""
    return [
        ref
        for ref in layout.of_layer[layer].values()
        if (slot := layout.roles[ref.name].slot).width == EXPERT
        and len(layout.shape_of(ref)) == (3 if slot.packed else 2)
    ]


def encoded_experts(layout: Layout, sizes: Sizes, kept: KeptExperts) -> list[str]:
    """Return the experts to keep, as the plan holds them."""
    if not kept:
        return []
    groups = sizes.layers or [[layer] for layer in range(layout.num_hidden_layers)]
    none = np.zeros(0, dtype=np.int64)
    return [index_sets.encode(kept.get(group[0], none), layout.experts) for group in groups]


def kept_channels(
    layout: Layout, stats: ChannelStats | None, ids: IdMap, sizes: Sizes, criterion: str
) -> Kept:
    """Return the channels to keep of every layer of the source."""
    lengths = axis_lengths(layout, sizes.widths)
    by_key = {} if sizes.dequantize else blocks(layout)
    by_axis = {axis: by_key.get(width.key, 1) for axis, width in layout.family.widths.items()}
    if stats is None:
        return random_channels(channel_sizes(layout), lengths, by_axis)
    return choose_channels(stats, ids, lengths, criterion, by_axis)


def of_experts(kept: Kept, experts: KeptExperts) -> Kept:
    """Return ``kept`` without the entries of removed experts."""
    found = [dict(axes) for axes in kept]
    for layer, chosen in experts.items():
        found[layer][EXPERT] = [kept[layer][EXPERT][expert] for expert in chosen]
    return found


def without_experts(kept: Kept, experts: KeptExperts) -> Kept:
    """Return ``kept`` with no channels of removed experts."""
    found = [dict(axes) for axes in kept]
    for layer, chosen in experts.items():
        every = enumerate(kept[layer][EXPERT])
        found[layer][EXPERT] = [own if n in chosen else own[:0] for n, own in every]
    return found


def encoded_channels(layout: Layout, sizes: Sizes, kept: Kept) -> list[dict[str, list[str]]]:
    """Return the channels to keep of every layer of the output, as the plan holds them."""
    full = axis_lengths(layout, layout.widths)
    return [
        {
            axis: [index_sets.encode(k, full[axis]) for k in of_axis]
            for axis, of_axis in axes.items()
        }
        for axes in of_output(kept, sizes)
    ]


def channel_sizes(layout: Layout) -> list[dict[str, tuple[int, int]]]:
    """Return per layer: channel axis → experts and channels."""
    full = axis_lengths(layout, layout.widths)
    return [
        {axis: (experts, full[axis]) for axis, experts in axes.items()}
        for axes in layout.ffn_outputs
    ]


def of_output(layers: list[Layer], sizes: Sizes) -> list[Layer]:
    """Return, for each layer of the output, what ``layers`` has of the first of its layers."""
    return [layers[group[0]] for group in sizes.layers] if sizes.layers else layers
