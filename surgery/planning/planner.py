"""Make a plan from headers, sizes and statistics; no weights are read."""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from surgery.checkpoint.checkpoint import same_weights
from surgery.errors import BudgetError, StatsError
from surgery.families.schema import EXPERT, GLINER
from surgery.files import index_sets
from surgery.files.model_files import ADAPTER_NAME
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.layers import check_layers, format_layers, kind_notes
from surgery.planning.plan import ChannelShares, Plan, Provenance, recorded_pre_tokenizer
from surgery.planning.selection import (
    channel_sizes,
    encoded_channels,
    encoded_experts,
    kept_channels,
    kept_experts,
    of_experts,
    of_output,
    without_experts,
)
from surgery.planning.shapes import (
    KeptExperts,
    axis_lengths,
    check_blocks,
    check_experts,
    parameters_of,
    shape_of,
)
from surgery.planning.sizes import TOLERANCE, Sizes, check_sizes, whole
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    RANDOM,
    ChannelOptions,
    Kept,
    bucket_weights,
    kept_shares,
    too_few_tokens,
    unseen_experts,
)
from surgery.tokenizer.id_map import IdMap
from surgery.vocabulary.cost import VocabularyCost

SHOWN_EXPERTS = 8
"""How many experts a note names."""


def plan_cut(
    layout: Layout,
    choice: SizeChoice,
    stats: ChannelStats | None = None,
    *,
    cost: VocabularyCost | None = None,
    output: Path | None = None,
) -> Plan:
    """Plan how ``layout`` shrinks to the sizes of ``choice``; no weights are read.

    Without ``stats`` the plan predicts sizes; where channels are removed, it cannot be applied.

    Args:
        layout: The model.
        choice: The sizes, the order of the vocabulary, and how channels are chosen.
        stats: The statistics that choose the channels.
        cost: What the smaller vocabulary costs, where that is known.
        output: Directory that apply is to write.

    Raises:
        BudgetError: a size is out of reach, or is not in whole blocks of FP8 weights.
        StatsError: the statistics belong to another model, or an expert saw too few tokens.
    """
    sizes, channels = choice.sizes, choice.request.channels
    check_sizes(layout, sizes)
    check_experts(layout, sizes.experts)
    check_blocks(layout, sizes)
    check_layers(layout, sizes.layers)
    if sizes.experts == layout.experts:
        sizes = replace(sizes, experts=0)
    _check_repair(layout, sizes, channels.repair)
    ids = choice.rarity.id_map(sizes.vocab_size)
    influence = stats.block_influence if stats is not None else None
    notes = _notes(layout, choice, cost, influence)
    encoded: list[dict[str, list[str]]] = []
    shares = None
    if stats is not None:
        check_stats(layout, stats)
    experts_kept = kept_experts(layout, sizes, channels.expert_criterion, stats, ids)
    if stats is not None:
        notes += _notes_on_stats(layout, sizes, channels, stats, ids, experts_kept)
    if stats is not None or (channels.criterion == RANDOM and sizes.widths != layout.widths):
        kept = kept_channels(layout, stats, ids, sizes, channels.criterion)
        encoded = encoded_channels(layout, sizes, of_experts(kept, experts_kept))
        shares = _shares(layout, stats, ids, sizes, without_experts(kept, experts_kept))
    return Plan(
        source=layout.checkpoint.source,
        fingerprint=layout.checkpoint.fingerprint,
        output=str(output.absolute()) if output else None,
        before=shape_of(layout, whole(layout)),
        after=shape_of(layout, sizes, experts_kept),
        kept_tokens=index_sets.encode(ids.kept, layout.vocab_size),
        rowless_tokens=choice.rarity.rowless,
        kept_channels=encoded,
        kept_experts=encoded_experts(layout, sizes, experts_kept),
        dropped=layout.dropped,
        dequantize=sizes.dequantize,
        untie=layout.unties,
        layers=[list(group) for group in sizes.layers],
        vocabulary=cost,
        weights=layout.checkpoint.weights,
        family=layout.checkpoint.family,
        base_model=choice.request.base_model,
        pre_tokenizer=_pre_tokenizer(layout, choice, ids),
        provenance=Provenance(
            criterion=channels.criterion,
            ratio=choice.request.sizes.ratio,
            text_digest=stats.info.text_digest if stats else None,
            calibration_tokens=stats.info.tokens if stats else 0,
            notes=notes,
            channel_shares=shares,
            layers_by_influence=bool(sizes.layers)
            and choice.request.sizes.num_hidden_layers is not None,
            expert_criterion=channels.expert_criterion if sizes.experts else None,
        ),
    )


def _notes_on_stats(
    layout: Layout,
    sizes: Sizes,
    channels: ChannelOptions,
    stats: ChannelStats,
    ids: IdMap,
    experts_kept: dict[int, np.ndarray],
) -> list[str]:
    """Return how far statistics fit the plan that they choose channels and experts for.

    Raises:
        StatsError: an expert whose channels are chosen saw too few tokens.
    """
    experts = layout.family.widths.get(EXPERT)
    if experts and sizes.widths.get(experts.key) != layout.widths.get(experts.key):
        check_tokens(stats, channels.min_expert_tokens, experts_kept)
    notes = _not_compared(layout, stats) + _approximations(stats, ids, channels.criterion)
    if sizes.widths != layout.widths or experts_kept:
        notes += _other_text(stats, ids) + _other_layers(sizes)
        few = too_few_tokens(stats.info.tokens)
        if few and channels.criterion != RANDOM and sizes.widths != layout.widths:
            notes.append(few)
    if sizes.experts:
        notes += _unseen(stats, channels.min_expert_tokens)
    return notes


def _pre_tokenizer(layout: Layout, choice: SizeChoice, ids: IdMap) -> str | None:
    """Return llama.cpp's name for the source's pre-tokenizer; no table knows the output's hash."""
    recorded = recorded_pre_tokenizer(layout.checkpoint.path)
    if recorded or ids.identity or choice.tokenizer is None:
        return recorded
    return choice.tokenizer.pre_tokenizer


def _check_repair(layout: Layout, sizes: Sizes, repair: str) -> None:
    opaque = layout.checkpoint.opaque
    if repair != "none" and opaque is not None and sizes.widths != layout.widths:
        raise BudgetError(
            "`repair`",
            f"does not work with {opaque.method} weights",
            fix="leave it out, or write the model with `dequantize` alone and prune that one",
        )


def _shares(
    layout: Layout, stats: ChannelStats | None, ids: IdMap, sizes: Sizes, kept: Kept
) -> ChannelShares:
    """Return what the kept channels of every layer of the output hold of the statistics."""
    shares = [{} for _ in kept] if stats is None else kept_shares(stats, ids, kept)
    return ChannelShares(axis_lengths(layout, layout.widths), of_output(shares, sizes))


def check_stats(layout: Layout, stats: ChannelStats) -> None:
    """Refuse statistics of another model.

    Raises:
        StatsError: the fingerprint, the weights or a size differs.
    """
    if stats.info.fingerprint != layout.checkpoint.fingerprint:
        raise StatsError(
            stats.where,
            "belong to another model",
            expected=f"fingerprint {layout.checkpoint.fingerprint[:12]}",
            found=stats.info.fingerprint[:12],
            fix=f"calibrate {layout.checkpoint.path}",
        )
    if same_weights(stats.info.weights, layout.checkpoint.weights) is False:
        raise StatsError(
            stats.where,
            "belong to a model of the same shapes with other weights",
            fix=f"calibrate {layout.checkpoint.path}",
        )
    expected = channel_sizes(layout)
    found = [{axis: sums.sum_sq.shape[1:] for axis, sums in a.items()} for a in stats.layers]
    if found != expected or len(stats.token_counts) != layout.vocab_size:
        layer = next((i for i, (a, b) in enumerate(zip_longest(found, expected)) if a != b), 0)
        raise StatsError(
            stats.where,
            f"have other sizes than the model (layers, experts and channels of layer {layer}, "
            "tokens)",
            expected=(len(expected), *expected[layer : layer + 1], layout.vocab_size),
            found=(len(found), *found[layer : layer + 1], len(stats.token_counts)),
            fix="calibrate again",
        )


def check_tokens(stats: ChannelStats, least: int, kept: KeptExperts) -> None:
    """Refuse to rank the channels of kept experts that saw too few tokens.

    Raises:
        StatsError: an expert saw fewer than ``least``.
    """
    unseen = unseen_experts(stats, least)
    stay = {n: np.intersect1d(few, kept.get(n, few)).tolist() for n, few in unseen.items()}
    few = {layer: experts for layer, experts in stay.items() if experts}
    if few:
        layer = next(iter(few))
        raise StatsError(
            stats.where,
            f"{sum(map(len, few.values()))} experts saw too few tokens to rank their channels, "
            f"such as expert {few[layer][0]} of layer {layer}",
            expected=f"at least {least}",
            found=int(stats.layers[layer][EXPERT].tokens[:, few[layer][0]].sum()),
            fix="calibrate with more text, or accept it with `min_expert_tokens`",
        )


def _notes(
    layout: Layout,
    choice: SizeChoice,
    vocabulary: VocabularyCost | None,
    influence: np.ndarray | None,
) -> list[str]:
    """Return the notes that follow from the sizes alone; ``influence`` offers other layers."""
    sizes, ratio = choice.sizes, choice.request.sizes.ratio
    notes = vocabulary.warnings() if vocabulary else []
    full = layout.parameters(layout.vocab_size, layout.widths)
    reached = 1 - parameters_of(layout, sizes) / full
    if ratio is not None and abs(reached - ratio) > TOLERANCE:
        notes.append(f"the steps of the sizes reach {reached:.1%}, not {ratio:.1%}")
    notes += kind_notes(layout, sizes.layers, influence) if sizes.layers else []
    notes += [*choice.notes, *layout.notes]
    if choice.rarity.rowless:
        notes.append(
            f"added tokens without a row in the embedding, before and after: "
            f"{choice.rarity.rowless}; the model fails on text with them"
        )
    if sizes.dequantize:
        opaque = layout.checkpoint.opaque
        what = "FP8 weights" if opaque is None else f"{opaque.method} weights"
        notes.append(f"{what} become bf16, in which each has two bytes")
    if (layout.checkpoint.path / ADAPTER_NAME).exists():
        notes.append(
            f"the adapter beside the weights ({ADAPTER_NAME}) is not in the output, and the "
            "statistics and sizes are without it; merge it into the weights first to prune both"
        )
    if layout.checkpoint.family not in (None, GLINER):
        kind = layout.checkpoint.config.get("model_type")
        notes.append(
            f"treated as {layout.checkpoint.family}; config.json keeps model type {kind}, "
            "which whatever loads the output has to know"
        )
    return notes


def _unseen(stats: ChannelStats, least: int) -> list[str]:
    """Return a note on experts that saw too few tokens to be ranked well."""
    few = unseen_experts(stats, least)
    if not few:
        return []
    named = [f"expert {expert} of layer {layer}" for layer, some in few.items() for expert in some]
    shown = ", ".join(named[:SHOWN_EXPERTS]) + (" and others" if named[SHOWN_EXPERTS:] else "")
    return [f"{len(named)} experts saw fewer than {least} tokens: {shown}"]


def _not_compared(layout: Layout, stats: ChannelStats) -> list[str]:
    if same_weights(stats.info.weights, layout.checkpoint.weights) is not None:
        return []
    return [
        "the weights could not be compared with those that the statistics were taken from, only "
        "config.json, the tokenizer and the shapes"
    ]


def _other_layers(sizes: Sizes) -> list[str]:
    collapsed = [group for group in sizes.layers if len(group) > 1]
    if not sizes.layers:
        return []
    notes = ["the statistics were taken with all layers in place"]
    if collapsed:
        notes.append(f"channels of {format_layers(collapsed)} are chosen by the first layer's")
    return notes


def _other_text(stats: ChannelStats, ids: IdMap) -> list[str]:
    text_rows = stats.info.vocab_size or ids.old_size
    if text_rows == ids.new_size:
        return []
    return [
        f"the statistics are of text as {text_rows} rows cut it; calibrating with `vocab_size` "
        f"{ids.new_size} takes them on what the pruned model will see"
    ]


def _approximations(stats: ChannelStats, ids: IdMap, criterion: str) -> list[str]:
    weights = bucket_weights(stats, ids)
    partial = np.flatnonzero((weights > 0) & (weights < 1))
    if criterion not in ("common-act2", "wanda") or not len(partial):
        return []
    edges = [0, *stats.info.bucket_edges]
    parts = ", ".join(f"{edges[b]}-{edges[b + 1]} by {weights[b]:.1%}" for b in partial)
    return [
        f"vocab_size {ids.new_size} lies inside a bucket of the statistics, which counts by the "
        f"share of its occurrences that stay ({parts}); "
        f"calibrating with `vocab_sizes` {ids.new_size} makes it exact"
    ]
