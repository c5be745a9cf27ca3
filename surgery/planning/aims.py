"""What a split between vocabulary and channels serves: quality, decoding or memory."""

from collections.abc import Sequence

from surgery.errors import BudgetError
from surgery.layout.layout import Layout
from surgery.planning.shapes import serving_of
from surgery.planning.sizes import VOCAB_CAP, Sizes, nearest_to_rule, whole

QUALITY, DECODE, MEMORY = AIMS = ("quality", "decode", "memory")

POSITIONS = 2048
"""Positions whose keys, values and logits count for memory: a batch of 16 texts of 128 tokens, as
where texts are scored. Of an encoder with a decoder, both read as many."""

MARGIN = 0.01
"""Bytes that differ by less than this share count as equal: what the steps of the sizes leave."""

CHANNEL_CAP = 1 / 2
"""Largest share of the channels that an aim takes. In searches of SmolLM2-135M and of Gemma 3 270M,
the best splits took at most 42 %, at a ratio of 0.35."""

CACHE = "the cache and "
COUNTED = {
    DECODE: "bytes read for each decoded token",
    MEMORY: f"bytes in memory with {CACHE}logits of {POSITIONS:,} positions",
}
"""Aim → what it makes few. Where no cache is predicted, none is counted."""


def served_bytes(layout: Layout, sizes: Sizes, aim: str) -> int:
    """Return what ``aim`` makes few, once ``layout`` has ``sizes``, by ``serving_of``.

    Raises:
        BudgetError: no decoding is predicted: it is an encoder, with a decoder or without.
    """
    found = serving_of(layout, sizes)
    if aim == MEMORY:
        positions = (found.cache or 0) + (found.source_cache or 0) + (found.logits or 0)
        return found.weights + POSITIONS * positions
    if found.decoded is None:
        raise BudgetError(
            f"`aim` {DECODE}",
            "cannot be served: no bytes read for each decoded token are predicted of this model",
            fix=f"take {MEMORY} or {QUALITY}",
        )
    return found.decoded


def split_for(ratio: float, pairs: Sequence[Sizes], left: Layout, served: Sequence[int]) -> Sizes:
    """Return the one of ``pairs`` that serves an aim best.

    The vocabulary loses two thirds of its rows at most, and the channels a half, unless the first
    pair takes more. Of the pairs that are left, those with the fewest bytes count, and of these the
    nearest to the rule of thumb. Bytes are compared for each parameter that is left, since the
    pairs miss the ratio by a little.

    Args:
        ratio: Share of the parameters of ``left`` to remove.
        pairs: Sizes that remove it; first those of the rule of thumb.
        left: The source without the layers and experts that are removed.
        served: What each of ``pairs`` takes, by ``served_bytes``.
    """
    usual = pairs[0]
    rows = min(usual.vocab_size, (1 - VOCAB_CAP) * left.vocab_size)
    channels = {k: min(n, (1 - CHANNEL_CAP) * left.widths[k]) for k, n in usual.widths.items()}
    within = [
        (count / left.parameters(sizes.vocab_size, sizes.widths), sizes)
        for count, sizes in zip(served, pairs, strict=True)
        if sizes.vocab_size >= rows
        and all(size >= channels[key] for key, size in sizes.widths.items())
    ]
    least = min(count for count, _ in within)
    equal = [sizes for count, sizes in within if count <= (1 + MARGIN) * least]
    return usual if usual in equal else nearest_to_rule(left, ratio, equal)


def aim_note(layout: Layout, aim: str, sizes: Sizes, usual: Sizes) -> str:
    """Say what a split for ``aim`` saves beside ``usual``, the rule of thumb's."""
    full, found, beside = (served_bytes(layout, s, aim) for s in (whole(layout), sizes, usual))
    counted = COUNTED[aim] if serving_of(layout, usual).cache else COUNTED[aim].replace(CACHE, "")
    saved = f"split for {aim}: {1 - found / full:.1%} fewer {counted}"
    if sizes == usual:
        return f"{saved}; no other split of this ratio saves notably more than the rule of thumb's"
    named = ", ".join([f"V' {usual.vocab_size}", *(f"{k} {n}" for k, n in usual.widths.items())])
    return f"{saved}; the rule of thumb's split for quality ({named}) saves {1 - beside / full:.1%}"
