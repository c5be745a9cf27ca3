"""Which FFN channels stay: statistics → importance → the best I' of each layer."""

from collections.abc import Callable

import numpy as np

from surgery.idmap import IdMap
from surgery.stats import ChannelStats

DEFAULT_CRITERION = "common-act2"


def bucket_weights(stats: ChannelStats, ids: IdMap) -> np.ndarray:
    """float64 ``[buckets]``: the share of each bucket's occurrences whose token stays.

    It is 0 or 1, which makes eq. 5 exact, where V' is one of the bucket edges.
    """
    buckets = len(stats.info.bucket_edges)
    kept = np.where(ids.keep_mask(), stats.token_counts, 0)
    total = np.bincount(stats.bucket_of, weights=stats.token_counts, minlength=buckets)
    stays = np.bincount(stats.bucket_of, weights=kept, minlength=buckets)
    return np.divide(stays, total, out=np.zeros(buckets), where=total > 0)


def _common_act2(stats: ChannelStats, layer: int, ids: IdMap) -> np.ndarray:
    return _weighted_sum(bucket_weights(stats, ids), stats.sum_sq[layer])


def _act2(stats: ChannelStats, layer: int, ids: IdMap) -> np.ndarray:
    return _weighted_sum(np.ones(len(stats.info.bucket_edges)), stats.sum_sq[layer])


def _abs_act(stats: ChannelStats, layer: int, ids: IdMap) -> np.ndarray:
    return _weighted_sum(np.ones(len(stats.info.bucket_edges)), stats.sum_abs[layer])


def _random(stats: ChannelStats, layer: int, ids: IdMap) -> np.ndarray:
    return np.random.default_rng(layer).random((stats.sum_sq[layer].shape[1],))


def _weighted_sum(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Σ_b ``weights[b]`` · ``sums[b, k]``: float64 ``[I]``."""
    total: np.ndarray = np.einsum("b,bk->k", weights, sums)
    return total


CRITERIA: dict[str, Callable[[ChannelStats, int, IdMap], np.ndarray]] = {
    DEFAULT_CRITERION: _common_act2,
    "act2": _act2,
    "abs-act": _abs_act,
    "random": _random,
}
"""Importance I_k of each channel: eq. 5, eq. 4, Σ|act| over all tokens, and seeded chance."""


def choose_channels(
    stats: ChannelStats, ids: IdMap, intermediate_size: int, criterion: str
) -> list[np.ndarray]:
    """Return per layer the ascending indices of the ``intermediate_size`` best channels.

    Of channels with equal importance the first ones stay.
    """
    kept = []
    for layer in range(len(stats.sum_sq)):
        importance = CRITERIA[criterion](stats, layer, ids)
        order = np.argsort(-importance, kind="stable")
        kept.append(np.sort(order[:intermediate_size]))
    return kept
