"""Which FFN channels and experts to keep: statistics → importance → the best of each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import StatsError, check_choice, check_least
from surgery.families.schema import EXPERT, WIDTHS
from surgery.stats.channel_stats import AxisSums, ChannelStats, RoutedSums
from surgery.tokenizer.id_map import IdMap

DEFAULT_CRITERION = "common-act2"

RANDOM = "random"
"""The criterion that needs no statistics."""

AIMER = "aimer"
"""The criterion of experts that needs their weights, but no statistics."""

DEFAULT_EXPERT_CRITERION = "reap"

LEAST_TOKENS = 16
"""An expert's channels are not ranked by fewer tokens than this."""

ENOUGH_TOKENS = 16_000
"""Tokens of text that suffice to rank the channels of an FFN.

Measured on SmolLM2-135M, whole vocabulary, 1,024 of 1,536 channels: bits per byte of 24 windows of
other documents, for two orders of the calibration text. 128 tokens: 1.290, 1.302; 512: 1.246,
1.246; 2,048: 1.218, 1.175; 4,096: 1.163, 1.185; 8,192: 1.157, 1.166; 16,384: 1.148, 1.156; 32,768:
1.149, 1.156; 47,000: 1.150, 1.157. So 8,192 tokens are worse than 47,000, by more than chance
(0.57 ± 0.44 and 0.78 ± 0.62 %), and 16,384 are not.
"""

RECONSTRUCT = "reconstruct"
REPAIRS = ("none", "least-squares", RECONSTRUCT)


@dataclass(frozen=True)
class ChannelOptions:
    """How channels are chosen."""

    criterion: str = DEFAULT_CRITERION
    """Importance of a channel, a key of ``CRITERIA``."""
    min_expert_tokens: int = LEAST_TOKENS
    """Fewest tokens routed to an expert for its channels to be ranked."""
    repair: str = "none"
    """"none"; "least-squares": down_proj is refitted to the kept channels; or "reconstruct": each
    FFN is then trained alone."""
    expert_criterion: str = DEFAULT_EXPERT_CRITERION
    """Importance of an expert, a key of ``EXPERT_CRITERIA``."""

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("repair", self.repair, REPAIRS)
        check_choice("expert_criterion", self.expert_criterion, EXPERT_CRITERIA)
        check_least("min_expert_tokens", self.min_expert_tokens, 0)


def bucket_weights(stats: ChannelStats, ids: IdMap) -> np.ndarray:
    """float64 ``[buckets]``: the share of each bucket's occurrences whose token is kept.

    Where V' is one of the bucket edges, every share is 0 or 1, which makes eq. 5 exact.
    """
    buckets = len(stats.info.bucket_edges)
    kept = np.where(ids.keep_mask(), stats.token_counts, 0)
    total = np.bincount(stats.bucket_of, weights=stats.token_counts, minlength=buckets)
    kept_total = np.bincount(stats.bucket_of, weights=kept, minlength=buckets)
    return np.divide(kept_total, total, out=np.zeros(buckets), where=total > 0)


Criterion = Callable[[AxisSums, np.ndarray, list[int]], np.ndarray]
"""(sums, weights float64 ``[buckets]``, seed) → importance ``[experts, I]``."""


def _common_act2(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    total: np.ndarray = np.einsum("b,bek->ek", weights, sums.sum_sq)
    return total


def _act2(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    return sums.sum_sq.sum(axis=0)


def _abs_act(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    return sums.sum_abs.sum(axis=0)


def _random(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    return random_importance(sums.sum_sq.shape[1:], seed)


def _wanda(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    norms: np.ndarray = sums.weight_norm * np.sqrt(_common_act2(sums, weights, seed))
    return norms


def _l2(sums: AxisSums, weights: np.ndarray, seed: list[int]) -> np.ndarray:
    return sums.sum_l2


CRITERIA: dict[str, Criterion] = {
    DEFAULT_CRITERION: _common_act2,
    "act2": _act2,
    "abs-act": _abs_act,
    "wanda": _wanda,
    "l2": _l2,
    RANDOM: _random,
}
"""Importance I_k of each expert's channels; an FFN that is not an expert counts as one.

- ``common-act2``: eq. 5, Σ act² over the kept tokens; ``act2``: eq. 4, over all; ``abs-act``:
  Σ|act| over all; ``random``: seeded random numbers.
- ``wanda``: ||W[:, k]||₂ · √(eq. 5). Wanda (arXiv 2306.11695, eq. 1) scores the weight W[d, k] by
  |W[d, k]| · ||x_k||₂ with x the input; this is the norm of a channel's scores over its column.
- ``l2``: first stage of 2SSP (arXiv 2501.17771): the norm √(Σ act²) over a window's tokens, mean
  over windows. Here it is the sum over windows, which gives the same order of channels.
"""

ExpertCriterion = Callable[[np.ndarray, RoutedSums, np.ndarray], np.ndarray]
"""(tokens float64 ``[experts]``, sums, weights float64 ``[buckets]``) → importance ``[experts]``.
Tokens and sums count by the weight of their bucket, so that removed tokens count nothing."""


def _mean(total: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.divide(total, tokens, out=np.zeros_like(total), where=tokens > 0)


EXPERT_CRITERIA: dict[str, ExpertCriterion | None] = {
    DEFAULT_EXPERT_CRITERION: lambda tokens, sums, weights: _mean(weights @ sums.sum_added, tokens),
    "man": lambda tokens, sums, weights: _mean(weights @ sums.sum_norm, tokens),
    "msan": lambda tokens, sums, weights: _mean(weights @ sums.sum_norm_sq, tokens),
    "frequency": lambda tokens, sums, weights: tokens,
    "gate": lambda tokens, sums, weights: weights @ sums.sum_gate,
    AIMER: None,
    "random": None,
}
"""Importance of a routed expert, over the tokens that the router sends to it and that the
vocabulary keeps; None needs no statistics. f is the expert's output, g the router's weight for it.

- ``reap``: the mean of g‖f‖ (arXiv 2510.13999, eq. 9).
- ``man`` and ``msan``: the means of ‖f‖ and of ‖f‖² (arXiv 2606.15716).
- ``frequency``: how many tokens there are; ``gate``: Σ g.
- ``aimer``: −‖w‖₁ / (√N ‖w‖₂) over the N weights w of an expert's matrices, without a text
  (arXiv 2603.18492, eq. 4): of weights of one size alike, an expert says least.
- ``random``: seeded random numbers.

An expert without tokens has importance 0.
"""


def needs_stats(criterion: str) -> bool:
    """Whether experts are chosen by statistics."""
    return EXPERT_CRITERIA[criterion] is not None


def choose_experts(importance: np.ndarray, count: int, groups: int) -> np.ndarray:
    """Return the ascending numbers of the ``count`` most important experts, of each group as many.

    Of equal experts, the first are kept. Groups are neighbours.
    """
    size = len(importance) // groups
    order = np.argsort(-importance.reshape(groups, size), axis=1, kind="stable")
    chosen = np.sort(order[:, : count // groups], axis=1)
    return (chosen + np.arange(groups)[:, None] * size).reshape(-1)


def expert_importance(
    criterion: str, sums: AxisSums | None, weights: np.ndarray, experts: int, layer: int
) -> np.ndarray:
    """Return the importance of each expert of a layer, float64 ``[experts]``.

    Raises:
        StatsError: the statistics lack the sums of the experts' outputs.
    """
    rule = EXPERT_CRITERIA[criterion]
    if rule is None or sums is None:
        return np.random.default_rng([layer]).random(experts)
    if sums.routed is None:
        raise StatsError(
            f"layer {layer}: {EXPERT}",
            "has no sums of the experts' outputs",
            fix="calibrate again, or choose experts at `expert_criterion` random",
        )
    return rule(weights @ sums.tokens, sums.routed, weights)


Kept = list[dict[str, list[np.ndarray]]]
"""Per layer: channel axis → per expert the ascending indices of the kept channels."""


def choose_channels(
    stats: ChannelStats,
    ids: IdMap,
    lengths: Mapping[str, int],
    criterion: str,
    blocks: Mapping[str, int] | None = None,
) -> Kept:
    """Return the ``lengths[axis]`` best channels of every layer and expert.

    Of channels with equal importance, the first are kept. On an axis in ``blocks``, channels are
    kept in whole blocks of that length, by the sum of their importance.
    """
    weights = bucket_weights(stats, ids)
    return [
        choose_layer(axes, weights, lengths, criterion, blocks or {}, layer)
        for layer, axes in enumerate(stats.layers)
    ]


def choose_layer(
    axes: Mapping[str, AxisSums],
    weights: np.ndarray,
    lengths: Mapping[str, int],
    criterion: str,
    blocks: Mapping[str, int],
    layer: int,
) -> dict[str, list[np.ndarray]]:
    """Choose the channels of one layer, as ``choose_channels``; ``weights`` as for a criterion."""
    kept = {}
    for number, axis in enumerate(WIDTHS):
        if axis in axes and axis in lengths:
            importance = CRITERIA[criterion](axes[axis], weights, [layer, number])
            kept[axis] = [best(row, lengths[axis], blocks.get(axis, 1)) for row in importance]
    return kept


def random_channels(
    sizes: Sequence[Mapping[str, tuple[int, int]]],
    lengths: Mapping[str, int],
    blocks: Mapping[str, int] | None = None,
) -> Kept:
    """Choose as ``choose_channels`` does by the criterion ``random``, which needs no statistics.

    Args:
        sizes: Per layer: channel axis → experts and channels.
        lengths: As for ``choose_channels``.
        blocks: As for ``choose_channels``.
    """
    return [
        {
            axis: [
                best(row, lengths[axis], (blocks or {}).get(axis, 1))
                for row in random_importance(axes[axis], [layer, number])
            ]
            for number, axis in enumerate(WIDTHS)
            if axis in axes and axis in lengths
        }
        for layer, axes in enumerate(sizes)
    ]


def random_importance(shape: tuple[int, ...], seed: list[int]) -> np.ndarray:
    """Return seeded random numbers, float64 of ``shape`` ``[experts, channels]``."""
    return np.random.default_rng(seed).random(shape)


def best(importance: np.ndarray, count: int, block: int) -> np.ndarray:
    """Ascending indices of the ``count`` most important channels, in whole blocks."""
    if block > 1:
        importance = np.add.reduceat(importance, np.arange(0, len(importance), block))
    order = np.argsort(-importance, kind="stable")
    chosen = np.sort(order[: -(-count // block)])
    inside = (chosen[:, None] * block + np.arange(block)).reshape(-1)
    return inside[:count]


def best_sums(importance: np.ndarray, counts: Sequence[int], block: int) -> np.ndarray:
    """float64 ``[experts, len(counts)]``: the importance of the channels that ``best`` chooses.

    Args:
        importance: float64 ``[experts, channels]``.
        counts: How many channels of each expert to choose.
        block: They are chosen in whole blocks of this length.
    """
    if block > 1:
        importance = np.add.reduceat(importance, np.arange(0, importance.shape[1], block), axis=1)
    ordered = -np.sort(-importance, axis=1)
    sums = np.concatenate([np.zeros((len(ordered), 1)), ordered.cumsum(axis=1)], axis=1)
    found: np.ndarray = sums[:, [-(-count // block) for count in counts]]
    return found


def too_few_tokens(tokens: int) -> str | None:
    """Return a note if channels are ranked on fewer ``tokens`` than suffice."""
    if tokens >= ENOUGH_TOKENS:
        return None
    return (
        f"channels are ranked on {tokens:,} tokens of text; it takes some {ENOUGH_TOKENS:,} to "
        "rank them well: give more text, or more `samples`"
    )


def kept_shares(stats: ChannelStats, ids: IdMap, kept: Kept) -> list[dict[str, float]]:
    """Per layer: channel axis → share of the importance by eq. 5 that its kept channels have.

    This is Σ act² over the kept tokens, of all experts together, whatever chose the channels. It is
    rounded, so that it is the same on every machine. An axis that saw no token has no share.
    """
    weights = bucket_weights(stats, ids)
    found: list[dict[str, float]] = []
    for axes, of_axes in zip(stats.layers, kept, strict=True):
        found.append({})
        for axis, of_axis in of_axes.items():
            importance = _common_act2(axes[axis], weights, [])
            left = sum(float(row[k].sum()) for row, k in zip(importance, of_axis, strict=True))
            if total := float(importance.sum()):
                found[-1][axis] = round(left / total, 6)
    return found


def unseen_experts(stats: ChannelStats, least: int) -> dict[int, list[int]]:
    """Layer → experts that fewer than ``least`` calibration tokens were routed to."""
    found = {}
    for layer, axes in enumerate(stats.layers):
        if EXPERT in axes:
            few = np.flatnonzero(axes[EXPERT].tokens.sum(axis=0) < least)
            if len(few):
                found[layer] = few.tolist()
    return found
