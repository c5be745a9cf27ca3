"""Model types that a run of the tests covers: some of each kind always, others by a seed.

``make test-models`` sets ``COMPACT_SURGERY_MODELS=all``: then every type is covered. Else the date
is the seed, so that each day's run has other types; ``COMPACT_SURGERY_SEED`` repeats one.
"""

import datetime
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

from surgery.families.default_ids import derived
from surgery.families.schema import Experts, Family, Wrapper
from surgery.families.table import FAMILIES, family_of
from tests.support.tiny_configs import TINY

ALL, SEED = "COMPACT_SURGERY_MODELS", "COMPACT_SURGERY_SEED"

ALWAYS = (
    *("llama", "qwen3", "gemma3_text", "gpt2", "phi3", "opt:350m"),  # dense, fused, transposed
    *("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text"),  # mixtures
    *("llava", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"),  # image models
)
"""At least one of each kind of layout."""

SAMPLED = 8
"""How many more of the types a run has."""

KEYS = (*TINY, *sorted(derived().keys() - {key.partition(":")[0] for key in TINY}))
"""Every tiny decoder: those with a config by hand, and all other types of the derived table."""


def text_family(key: str) -> Family:
    """Return the family of a tiny decoder: of its language model, if it has one inside."""
    model_type = key.partition(":")[0]
    inside = isinstance(FAMILIES[model_type], Wrapper)
    section: dict[str, Any] = {"text_config": {}} if inside else {}
    return family_of({"model_type": model_type, **section}, "")


DENSE_HERE = ("gemma4_text", "gemma4_text:shared", "gemma4", "gemma4_unified")
"""Tiny models without experts, of types that may have them."""

MIXTURES: dict[str, Experts] = {
    key: experts
    for key in KEYS
    if (experts := text_family(key).experts) is not None
    if key not in DENSE_HERE
}
"""Every tiny mixture that can lose whole experts."""


def seed() -> str:
    """Return the seed of this run, the same in all its processes."""
    return os.environ.setdefault(SEED, datetime.date.today().isoformat())


def sampled(keys: Iterable[str], always: Sequence[str] = ALWAYS, more: int = SAMPLED) -> list[str]:
    """Return those of ``keys`` that this run covers: ``always`` these, and some more."""
    chosen = list(keys)
    if os.environ.get(ALL) == "all":
        return chosen
    others = [key for key in chosen if key not in always]
    drawn = random.Random(seed()).sample(others, min(more, len(others)))
    return [key for key in chosen if key in always or key in drawn]
