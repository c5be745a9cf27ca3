"""What a GGUF file says of a model besides its tokenizer: sizes, rotary embedding, windows.

Every value that llama.cpp would otherwise derive from the number of layers is written, so that a
model that lost layers is not run as another one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import CheckpointError, FamilyError
from surgery.export.architectures import (
    COMMON,
    Architecture,
    CountedRope,
    CountedScale,
    Key,
)
from surgery.layout.layout import Layout

Value = int | float | str | list[bool]
"""A value of a GGUF file: an int is a uint32 there, a float a float32."""

Config = Mapping[str, Any]

SERVE = "serve it with transformers or vLLM"
KEEP_LAYERS = f"keep all layers, or {SERVE}"
FREQUENCIES, LONG, SHORT = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
)


@dataclass(frozen=True)
class Description:
    """What the runtime is told of a model."""

    values: Mapping[str, Value]
    """Key, with the architecture's name in front → value."""
    tensors: Mapping[str, np.ndarray]
    """Name → float32: factors of the rotary embedding."""
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""


def describe(layout: Layout, architecture: Architecture) -> Description:
    """Return what the runtime is told of the model of ``layout``.

    Raises:
        FamilyError: the runtime would compute something else; it names what cannot be said.
        CheckpointError: config.json lacks a key that the runtime needs.
    """
    given = {key: value for key, value in layout.config.items() if value is not None}
    config, where = {**architecture.defaults, **given}, layout.where
    for key, allowed in architecture.required.items():
        if config.get(key) not in allowed:
            raise _cannot(where, key, allowed[0], config.get(key), SERVE)
    values: dict[str, Value] = {
        "block_count": layout.num_hidden_layers,
        "vocab_size": layout.vocab_size,
    }
    for entry in (*COMMON, *architecture.keys):
        values |= _entry(entry, config, where)
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    values |= {"attention.key_length": head, "attention.value_length": head}
    rotary, tensors = _rotary(config, head, where)
    values |= rotary
    values |= _windows(architecture, layout, config)
    _check_counted(architecture.counted, layout, config, head)
    named = {f"{architecture.name}.{key}": value for key, value in values.items()}
    return Description(named, tensors, _notes(architecture, config))


def _entry(entry: Key, config: Config, where: object) -> dict[str, Value]:
    found = next((config[key] for key in entry.sources if key in config), None)
    if found is None and not entry.required:
        return {}
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise CheckpointError(
            f"{where}: {entry.sources[0]}",
            "is missing or not a number",
            found=repr(found),
            fix="save config.json with transformers, which writes it out",
        )
    return {entry.name: entry.type(found)}


def _cannot(where: object, key: str, expected: object, found: object, fix: str) -> FamilyError:
    return FamilyError(
        f"{where}: {key}",
        "llama.cpp computes this type otherwise, and no key tells it",
        expected=expected,
        found=found,
        fix=fix,
    )


def _windows(architecture: Architecture, layout: Layout, config: Config) -> dict[str, Value]:
    """Return the window and, for each layer, whether it has one; empty where the type has none."""
    windows, window, layers = (
        architecture.windows,
        config.get("sliding_window"),
        layout.num_hidden_layers,
    )
    if windows is None or window is None:
        return {}
    kinds = config.get("layer_types")
    if kinds is None:
        period = next((config[key] for key in windows.period_keys if key in config), windows.period)
        windowed = [(layer + 1) % int(period) != 0 for layer in range(layers)]
    elif isinstance(kinds, list) and len(kinds) == layers:
        windowed = [kind == "sliding_attention" for kind in kinds]
    else:
        raise CheckpointError(
            f"{layout.where}: layer_types",
            "does not have an entry for every layer",
            expected=layers,
            found=len(kinds) if isinstance(kinds, list) else repr(kinds),
            fix="correct it",
        )
    return {
        "attention.sliding_window": int(window),
        "attention.sliding_window_pattern": windowed,
    }


def _check_counted(
    counted: CountedRope | CountedScale | None, layout: Layout, config: Config, head: int
) -> None:
    """Refuse a model that the runtime would run as another one, by the number of its layers."""
    layers, where = layout.num_hidden_layers, layout.where
    if isinstance(counted, CountedRope):
        step = int(config.get("no_rope_layer_interval", counted.step))
        own = [int((layer + 1) % step != 0) for layer in range(layers)]
        rotary = config.get(counted.key) or own
        runs = [int((layer + 1) % counted.step != 0) for layer in range(layers)]
        if rotary != runs:
            raise _cannot(where, counted.key, runs, rotary, KEEP_LAYERS)
    elif isinstance(counted, CountedScale):
        of_embedding = config["hidden_size"] // config["num_attention_heads"]
        runs_by = of_embedding if layers == counted.layers else head
        if config["query_pre_attn_scalar"] != runs_by:
            found = config["query_pre_attn_scalar"]
            raise _cannot(where, "query_pre_attn_scalar", runs_by, found, KEEP_LAYERS)


def _notes(architecture: Architecture, config: Config) -> tuple[str, ...]:
    notes, window = [], config.get("sliding_window")
    if architecture.full_beyond and window and window < config["max_position_embeddings"]:
        notes.append(
            f"llama.cpp has no windows for this type: after {window:,} tokens it attends to the "
            "whole text, transformers to the last ones"
        )
    rope = _full(config)
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        notes.append(
            "llama.cpp rounds YaRN's range to whole dimensions, and config.json says not to: "
            "logits differ a little"
        )
    return tuple(notes)


def _full(config: Config) -> Config:
    """The rotary embedding of layers without a window."""
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    full: Config = rope.get("full_attention", rope)
    return full


Tensors = dict[str, np.ndarray]


def _rotary(config: Config, head: int, where: object) -> tuple[dict[str, Value], Tensors]:
    """Return keys and tensors of the rotary embedding.

    Raises:
        FamilyError: the runtime does not know the kind of scaling.
    """
    full, local = _full(config), (config.get("rope_parameters") or {}).get("sliding_attention", {})
    base = float(full.get("rope_theta", config["rope_theta"]))
    part = full.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    size = int(head * part)
    values: dict[str, Value] = {"rope.freq_base": base, "rope.dimension_count": size}
    local_base = local.get("rope_theta", config.get("rope_local_base_freq"))
    if local_base is not None:
        values["rope.freq_base_swa"] = float(local_base)
    kind = str(full.get("rope_type", full.get("type", "default")))
    tensors: Tensors = {}
    if kind in ("longrope", "su"):
        values |= _long(full, config, where)
        for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
            tensors[name] = np.array(full[key], np.float32)
    elif kind == "llama3":
        tensors[FREQUENCIES] = llama3_factors(full, base, size)
    elif kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
        if kind == "yarn":
            values |= _yarn(full, config)
    elif kind != "default":
        raise _cannot(where, "rope_type", "default, linear, llama3, longrope, yarn", kind, SERVE)
    return values, tensors


def _yarn(full: Config, config: Config) -> dict[str, Value]:
    context = full.get("original_max_position_embeddings", config["max_position_embeddings"])
    found: dict[str, Value] = {"rope.scaling.original_context_length": int(context)}
    for name, key in (
        ("yarn_ext_factor", "extrapolation_factor"),
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if full.get(key) is not None:
            found[f"rope.scaling.{name}"] = float(full[key])
    return found


def _long(full: Config, config: Config, where: object) -> dict[str, Value]:
    """Keys of LongRoPE (arXiv 2402.13753); its factors are tensors."""
    key, most = "original_max_position_embeddings", config["max_position_embeddings"]
    original = full.get(key, config.get(key))
    if not isinstance(original, int):
        raise CheckpointError(
            f"{where}: {key}", "is missing", fix="use the config.json of the published model"
        )
    scale = most / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(full.get("attention_factor") or factor),
    }


def llama3_factors(rope: Config, base: float, size: int) -> np.ndarray:
    """Return float32 ``[size / 2]``: what each frequency is divided by (Llama 3.1's scaling).

    Waves longer than original_max_position_embeddings ÷ low_freq_factor are stretched by
    ``factor``, those shorter than that ÷ high_freq_factor are not, those between them in part.
    """
    waves = 2 * np.pi * base ** (np.arange(0, size, 2) / size)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
