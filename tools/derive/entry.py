"""Entries of the table's file, from what models on the meta device show."""

from contextlib import suppress
from typing import Any

from transformers import AutoConfig

from surgery.config.token_ids import ID_KEY
from surgery.families.default_ids import COUNTS, MEDIA_IDS, OFFSET_SECTIONS, SECTIONS
from surgery.families.schema import GROUP_KEYS, PER_TOKEN_KEYS, Dim, Family, Slot
from tools.derive.axes import Built, template, value_at
from tools.derive.configs import CAUSAL, default_config, registered
from tools.derive.seen import Seen, prefixes_of
from tools.derive.tiny import tiny_configs

GATE_UP_PAIRS = ("gpt_oss", "inkling_mm_model", "inkling_text", "inkling2", "inkling2_text")
"""Types whose fused tensors have gate and up of a channel as neighbours, which no shape shows."""

COMPUTES_APART = ("aya_vision", "cohere2_vision")
"""Models that compute logits otherwise than the language model inside them does alone."""

UNDER_PREFIX = (("language_model.", ""), ("model.language_model.", "model."))
"""Spellings of a language model inside another: published before transformers 5, and since."""


def derive(model_type: str) -> dict[str, Any]:
    """Return the entry of a model type, as the table's file has it."""
    auto_class = registered()[model_type]
    seen = Seen(model_type, pairs=model_type in GATE_UP_PAIRS)
    seen.models(default_config(model_type), auto_class)
    for config in tiny_configs(model_type):
        seen.models(config, auto_class)
    if seen.section:
        inner = value_at(default_config(model_type), seen.section).get("model_type")
        if inner in CAUSAL and inner != model_type and model_type not in COMPUTES_APART:
            with suppress(ValueError):
                return _wrapper(seen, inner) | _tokens(model_type)
    return _family(seen) | _tokens(model_type)


def _tokens(model_type: str) -> dict[str, Any]:
    """The ids that a config's class fills in, and those of its sections with their types."""
    config = AutoConfig.for_model(model_type)
    found: dict[str, Any] = {"ids": _ids(config)}
    sections = {}
    for name in (*SECTIONS, *OFFSET_SECTIONS):
        section = getattr(config, name, None)
        of_text = (getattr(section, key, None) for key in ("vocab_offset", *MEDIA_IDS))
        if section is not None and (name in SECTIONS or any(n is not None for n in of_text)):
            sections[name] = {"type": section.model_type, "ids": _ids(section)}
    return found | ({"sections": sections} if sections else {})


def _ids(config: Any) -> dict[str, Any]:
    keys = {k: v for k, v in vars(config).items() if ID_KEY.fullmatch(k) or k in COUNTS}
    told = {key: value for key, value in keys.items() if value is not None and value != []}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in told.items()}


def _family(seen: Seen) -> dict[str, Any]:
    plain = Family((), tied=False)
    options = {
        "depth": seen.depth,
        "embedding": seen.embedding,
        "head": seen.head or plain.head,
        "section": seen.section,
        "carried": list(seen.carried),
        "mixed": seen.mixed,
        "experts": _experts(seen),
    }
    slots = sorted(seen.slots(), key=lambda slot: not slot.name.startswith(seen.layers))
    return {
        "tied": seen.tied,
        "widths": {a: " * ".join(filter(None, (w.key, w.times))) for a, w in seen.widths.items()},
        **{k: v for k, v in options.items() if v and v != getattr(plain, k)},
        "tensors": {slot.name: spec(slot) for slot in slots},
    }


def _experts(seen: Seen) -> dict[str, Any] | None:
    """How the class's config describes the routed experts, with its defaults; None without any."""
    config = AutoConfig.for_model(seen.model_type)
    keys = (getattr(config, seen.section) if seen.section else config).to_dict()
    per_token = next((key for key in PER_TOKEN_KEYS if key in keys), None)
    if not seen.experts or per_token is None:
        return None
    found = {"key": seen.experts, "per_token": keys[per_token]}
    groups = next((key for key in GROUP_KEYS if key in keys), None)
    if groups is None:
        return found
    return found | {"groups": {"key": groups, "count": keys[groups], "chosen": keys["topk_group"]}}


def spec(slot: Slot) -> str:
    """Return a slot without its name, as the table's file has it."""
    words = [slot.group]
    if slot.axes:
        words.append(f"({', '.join(map(_dim, slot.dims))})")
    words += ["out"] * slot.ffn_output + ["optional"] * (not slot.required)
    words += ["buffer"] * (not slot.is_parameter)
    words += [f"in={slot.block}"] if slot.block else []
    words += [f"beside={','.join(slot.beside)}"] if slot.beside else []
    return " ".join(words)


def _dim(dim: Dim | None) -> str:
    if dim is None:
        return "-"
    return f"{dim.copies} {dim.axis}{' pairs' * dim.interleaved}" if dim.copies > 1 else dim.axis


def _wrapper(seen: Seen, inner: str) -> dict[str, Any]:
    """The entry of a model around a language model of a type that stands alone.

    Raises:
        ValueError: its tensors have other names inside.
    """
    config = value_at(default_config(seen.model_type), seen.section)
    alone = Built.of(inner, config, registered()[inner])
    outer, own = seen.embedding.split("."), alone.input_name.split(".")
    while outer and own and outer[-1] == own[-1]:
        outer.pop(), own.pop()
    pair = tuple(".".join([*parts, ""]) if parts else "" for parts in (outer, own))
    known = [(pair[0], pair[1])] if pair[0] != pair[1] else []
    prefixes = tuple(dict.fromkeys((*known, *UNDER_PREFIX)))
    slots = tuple(Slot(template(name), "other") for name in alone.shapes)
    family = Family(slots, False, prefixes=prefixes)
    carried, found = set(), set()
    names = seen.built[0].shapes
    for name in names:
        spelled = [template(n) for n in family.spellings(name)]
        matched = next((n for n in spelled if n in family.by_name), None)
        if matched is None:
            carried.add(name)
        else:
            found.add(matched)
    missing = set(family.by_name) - found - {"lm_head.weight"}
    if missing:
        raise ValueError(f"{inner} has {sorted(missing)[0]}, which is not inside")
    text = [name for name in names if name not in carried]
    return {
        "around": seen.section,
        "tied": seen.tied,
        "prefixes": [list(pair) for pair in prefixes],
        "carried": sorted({n.removeprefix("model.") for n in prefixes_of(carried, text)}),
    }
