"""The layers in a report: sorted act², the share that a cut keeps, and the experts' map."""

from dataclasses import dataclass, field

import numpy as np

from surgery.families.schema import EXPERT, WIDTHS
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.stats.channel_stats import ChannelStats
from surgery.stats.channels import (
    DEFAULT_EXPERT_CRITERION,
    bucket_weights,
    expert_importance,
    needs_stats,
)

CURVE_POINTS = 48
"""Points of a curve of sorted act²."""

STANDS_OUT = 2.0
"""A layer stands out if it loses this many times what the median layer loses."""

AXES = {
    "ffn": "FFN",
    "expert": "experts",
    "shared": "shared expert",
    "decoder_ffn": "the decoder's FFN",
    "wide": "FFN",
}


@dataclass(frozen=True)
class LayerRow:
    """The channels of one axis of one layer of the output."""

    layer: int
    """Number in the output."""
    sources: list[int]
    """The source's layers that it is made of."""
    axis: str
    channels: int
    """Of the source, of each expert."""
    kept: int
    """Of each expert that is kept."""
    share: float | None
    """Share of Σ act² over the kept tokens that stays; None where it is not known."""
    stands_out: bool = False
    """Whether it loses much more than the other layers."""
    curve: list[float] = field(default_factory=list)
    """act² of channels from the largest to the smallest, over the largest; of all experts."""
    influence: float | None = None
    """Block influence."""

    @property
    def name(self) -> str:
        """The layer as people read it."""
        where = "+".join(map(str, self.sources))
        named = (
            f"layer {where}"
            if self.sources == [self.layer]
            else f"layer {self.layer} (was {where})"
        )
        return named if self.axis == "ffn" else f"{named}, {AXES[self.axis]}"


@dataclass(frozen=True)
class ExpertMap:
    """Experts × layers of a mixture."""

    layers: list[int]
    """Layers of the source that have experts."""
    tokens: list[list[int]]
    """For each layer: tokens that went to each expert."""
    scores: list[list[float]]
    """For each layer: the importance of each expert by ``criterion``; empty where not known."""
    kept: list[list[bool]]
    """For each layer: whether each expert is kept; all False for a layer that is removed."""
    criterion: str

    @property
    def shares(self) -> list[list[float]]:
        """Each expert's share of its layer's tokens."""
        return [[count / max(1, sum(row)) for count in row] for row in self.tokens]


@dataclass(frozen=True)
class LayerFacts:
    """What a page says of the layers."""

    rows: list[LayerRow] = field(default_factory=list)
    experts: ExpertMap | None = None
    removed: list[tuple[int, float | None]] = field(default_factory=list)
    """Removed layers and their block influence."""
    chooses: bool = False
    """Whether channels are removed."""

    @property
    def known(self) -> list[LayerRow]:
        """Rows whose share is known."""
        return [row for row in self.rows if row.share is not None]

    @property
    def mean(self) -> float:
        """Mean share that is kept."""
        shares = [row.share or 0.0 for row in self.known]
        return sum(shares) / len(shares) if shares else 1.0


def layer_facts(layout: Layout, plan: Plan, stats: ChannelStats | None) -> LayerFacts:
    """Return what a page says of the layers of a plan's output.

    Args:
        layout: The source.
        plan: Its cut.
        stats: Its statistics, for the curves and the map of experts.
    """
    groups = plan.layers or [[layer] for layer in range(layout.num_hidden_layers)]
    influence = stats.block_influence.tolist() if stats is not None else []
    weights = bucket_weights(stats, plan.ids()) if stats is not None else np.ones(1)
    shares = plan.provenance.channel_shares
    rows = []
    for number, group in enumerate(groups):
        for axis in WIDTHS:
            if axis not in layout.ffn_outputs[group[0]] or not layout.channels_of(axis):
                continue
            length, width = layout.channels_of(axis), layout.family.widths[axis]
            kept = plan.after.widths[width.key] * layout.times(axis)
            curve = _curve(stats, group[0], axis, weights) if stats is not None else []
            known = shares.kept[number] if shares and number < len(shares.kept) else {}
            share = 1.0 if kept == length and not plan.kept_experts else known.get(axis)
            rows.append(
                LayerRow(
                    number,
                    list(group),
                    axis,
                    length,
                    kept,
                    share,
                    _stands_out(share, axis, shares.kept if shares else []),
                    curve,
                    influence[group[0]] if influence else None,
                )
            )
    left = {layer for group in groups for layer in group}
    removed = [
        (layer, influence[layer] if influence else None)
        for layer in range(layout.num_hidden_layers)
        if layer not in left
    ]
    experts = _experts(layout, plan, stats) if stats is not None and layout.experts else None
    return LayerFacts(rows, experts, removed, plan.after.widths != plan.before.widths)


def _stands_out(share: float | None, axis: str, kept: list[dict[str, float]]) -> bool:
    losses = [1 - layer[axis] for layer in kept if axis in layer]
    if share is None or not losses or share == 1:
        return False
    return 1 - share > STANDS_OUT * float(np.median(losses))


def _curve(stats: ChannelStats, layer: int, axis: str, weights: np.ndarray) -> list[float]:
    """Return ``CURVE_POINTS`` of the sorted act² of a layer, over the largest."""
    sums = stats.layers[layer].get(axis)
    if sums is None:
        return []
    total = np.einsum("b,bek->ek", weights, sums.sum_sq)
    ordered = -np.sort(-total, axis=1).sum(axis=0)
    top = float(ordered.max(initial=0.0))
    if top <= 0:
        return []
    at = np.linspace(0, len(ordered) - 1, min(CURVE_POINTS, len(ordered))).round().astype(int)
    return [round(value, 5) for value in (ordered[at] / top).tolist()]


def _experts(layout: Layout, plan: Plan, stats: ChannelStats) -> ExpertMap | None:
    """Return the map of the experts that statistics have counted."""
    layers = [n for n, axes in enumerate(stats.layers) if EXPERT in axes]
    if not layers:
        return None
    criterion = plan.provenance.expert_criterion or DEFAULT_EXPERT_CRITERION
    weights = bucket_weights(stats, plan.ids())
    groups = plan.layers or [[layer] for layer in range(layout.num_hidden_layers)]
    firsts = [group[0] for group in groups]
    tokens, scores, kept = list[list[int]](), list[list[float]](), list[list[bool]]()
    for layer in layers:
        sums = stats.layers[layer][EXPERT]
        tokens.append(sums.tokens.sum(axis=0).tolist())
        if needs_stats(criterion) and sums.routed is not None:
            found = expert_importance(criterion, sums, weights, layout.experts, layer)
            scores.append([float(f"{score:.4g}") for score in found.tolist()])
        mask = np.zeros(layout.experts, dtype=bool)
        if layer in firsts:
            mask[plan.experts(firsts.index(layer))] = True
        kept.append(mask.tolist())
    return ExpertMap(layers, tokens, scores, kept, criterion)
