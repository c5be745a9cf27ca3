"""What a model takes where it is served, by headers; splits for quality, decoding or memory."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import BudgetError
from surgery.families.schema import ENCODER_DECODER, VOCAB, Dim
from surgery.files.safetensors_header import ITEMSIZE
from surgery.layout.layout import Layout
from surgery.layout.roles import CARRIED, TensorRole
from surgery.planning.shapes import experts_per_token, keeps, output_dtype, output_shape
from surgery.planning.sizes import VOCAB_CAP, Sizes, nearest_to_rule, whole

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
    idle = routed * (count - min(experts_per_token(layout), count)) // count if count else 0
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
