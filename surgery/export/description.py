"""What a GGUF file says of a model besides its tokenizer: sizes, rotary embedding, windows.

Every value that llama.cpp would otherwise derive from the number of layers is written, so that a
model that lost layers is not run as another one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from surgery.errors import CheckpointError, FamilyError
from surgery.export.architectures import (
    COMMON,
    OF_ENCODERS,
    Architecture,
    CountedRope,
    CountedScale,
    Key,
)
from surgery.export.embedders import encoder_notes, encoder_values, segments
from surgery.layout.layout import Layout

Value = bool | int | float | str | list[bool]
"""A value of a GGUF file: an int is a uint32 there, a float a float32."""

Config = Mapping[str, Any]

SERVE = "serve it with transformers or vLLM"
KINDS = ("sliding_attention", "full_attention")
KEEP_LAYERS = f"keep all layers, or {SERVE}"
ROPE, LOCAL = "rope_scaling", "rope_local_base_freq"
PART, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
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
    defaults, where = architecture.defaults, layout.where
    # A null where the config class has another default is a value of its own, not the default.
    given = {key: v for key, v in layout.config.items() if v is not None or key in defaults}
    config = {**defaults, **given}
    for key, allowed in architecture.required.items():
        if config.get(key) not in allowed:
            raise _cannot(where, key, allowed[0], config.get(key), SERVE)
    values: dict[str, Value] = {
        "block_count": layout.num_hidden_layers,
        "vocab_size": layout.vocab_size,
    }
    if architecture.encoder:
        return _encoder(architecture, layout, config, values)
    for entry in (*COMMON, *architecture.keys):
        values |= _entry(entry, config, where)
    of_embedding = config["hidden_size"] // config["num_attention_heads"]
    head = _number(where, "head_dim", config.get("head_dim", of_embedding), int)
    values |= {"attention.key_length": head, "attention.value_length": head}
    full = _full(architecture, config, where)
    rotary, tensors = _rotary(full, config, head, where)
    values |= rotary
    values |= _windows(architecture, layout, config)
    _check_counted(architecture.counted, layout, config, head)
    named = {f"{architecture.name}.{key}": value for key, value in values.items()}
    return Description(named, tensors, _notes(architecture, config, full, where))


def _encoder(
    architecture: Architecture, layout: Layout, config: Config, values: dict[str, Value]
) -> Description:
    for entry in OF_ENCODERS:
        values |= _entry(entry, config, layout.where)
    values |= encoder_values(layout)
    named = {f"{architecture.name}.{key}": value for key, value in values.items()}
    named["tokenizer.ggml.token_type_count"] = segments(layout)
    return Description(named, {}, tuple(encoder_notes(layout)))


def _entry(entry: Key, config: Config, where: object) -> dict[str, Value]:
    key = next((key for key in entry.sources if key in config), entry.sources[0])
    if config.get(key) is None and not entry.required:
        return {}
    return {entry.name: _number(where, key, config.get(key), entry.type)}


N = TypeVar("N", int, float)

MOST = {int: 2**32 - 1, float: float(np.finfo(np.float32).max)}
LEAST = {int: 1, float: float(np.finfo(np.float32).tiny)}
"""What a uint32 and a float32 of the file hold; no number that is written may be 0 or less."""


def _number(
    where: object,
    key: str,
    found: object,
    kind: type[N],
    least: float | None = None,
    most: float | None = None,
) -> N:
    """Return a number of config.json.

    Raises:
        CheckpointError: it is missing, or no number of this kind from ``least`` to ``most``.
    """
    low, high = LEAST[kind] if least is None else least, MOST[kind] if most is None else most
    kinds = (int,) if kind is int else (int, float)
    if isinstance(found, kinds) and not isinstance(found, bool) and low <= found <= high:
        return kind(found)
    raise CheckpointError(
        f"{where}: {key}",
        "is no number that llama.cpp can be told",
        expected=f"{kind.__name__} from {low:g} to {high:g}",
        found="null" if found is None else repr(found),
        fix="correct it, or save config.json with transformers, which writes all out",
    )


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
    windows, layers, where = architecture.windows, layout.num_hidden_layers, layout.where
    if windows is None:
        return {}
    window = _number(where, "sliding_window", config.get("sliding_window"), int)
    kinds = config.get("layer_types")
    if kinds is None:
        key = next((key for key in windows.period_keys if key in config), None)
        period = windows.period if key is None else _number(where, key, config[key], int)
        windowed = [(layer + 1) % period != 0 for layer in range(layers)]
    elif isinstance(kinds, list) and len(kinds) == layers and all(k in KINDS for k in kinds):
        windowed = [kind == "sliding_attention" for kind in kinds]
    else:
        raise CheckpointError(
            f"{where}: layer_types",
            "does not have a kind that llama.cpp knows for every layer",
            expected=f"{layers} of {', '.join(KINDS)}",
            found=repr(kinds),
            fix="correct it",
        )
    return {
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": windowed,
    }


def _check_counted(
    counted: CountedRope | CountedScale | None, layout: Layout, config: Config, head: int
) -> None:
    """Refuse a model that the runtime would run as another one, by the number of its layers."""
    layers, where = layout.num_hidden_layers, layout.where
    if isinstance(counted, CountedRope):
        key = "no_rope_layer_interval"
        step = _number(where, key, config.get(key, counted.step), int)
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


def _notes(
    architecture: Architecture, config: Config, full: Config, where: object
) -> tuple[str, ...]:
    notes, window = [], config.get("sliding_window")
    if architecture.full_beyond and window is not None:
        window = _number(where, "sliding_window", window, int)
        if window < config["max_position_embeddings"]:
            notes.append(
                f"llama.cpp has no windows for this type: after {window:,} tokens it attends to "
                "the whole text, transformers to the last ones"
            )
    if full.get("rope_type") == "yarn" and full.get("truncate") is False:
        notes.append(
            "llama.cpp rounds YaRN's range to whole dimensions, and config.json says not to: "
            "logits differ a little"
        )
    return tuple(notes)


def _full(architecture: Architecture, config: Config, where: object) -> Config:
    """Return the rotary embedding of layers without a window, with its theta and its part.

    Raises:
        CheckpointError: it is no section, or is said twice.
        FamilyError: layers with a window have another one, but for its theta.
    """
    parameters, scaling = (_section(config, key, where) for key in ("rope_parameters", ROPE))
    if parameters and scaling and parameters != scaling:
        raise CheckpointError(
            f"{where}: {ROPE}",
            "says otherwise than rope_parameters",
            found=scaling,
            fix="remove the one that is not meant",
        )
    rope = parameters or scaling
    if "full_attention" in rope:
        full = _section(rope, "full_attention", where)
    elif parameters and ("sliding_attention" in rope or LOCAL in architecture.defaults):
        raise CheckpointError(
            f"{where}: rope_parameters.full_attention",
            "is missing",
            fix="save config.json with transformers, which writes it out",
        )
    else:
        full = rope
    common = {key: config[key] for key in ("rope_theta", PART) if key in config}
    local = {**common, **_section(rope, "sliding_attention", where)}
    full = {**common, **full}
    part = full.get(PART, 1.0)
    if part != 1 and not architecture.partial_rope:
        raise _cannot(where, PART, 1.0, part, SERVE)
    for key, plain in (("rope_type", "default"), (PART, part)):
        found = local.get(key, local.get("type", plain) if key == "rope_type" else plain)
        if found != plain:
            raise _cannot(where, f"rope_parameters.sliding_attention.{key}", plain, found, SERVE)
    return full


def _section(config: Config, key: str, where: object) -> dict[str, Any]:
    """Return a section of config.json, empty where it is missing or null.

    Its nulls are left out, but for rope_theta, for which transformers takes no default then.
    """
    found = config.get(key)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(
            f"{where}: {key}", "is no section", expected="keys", found=repr(found), fix="correct it"
        )
    kept = (found or {}).items()
    return {name: value for name, value in kept if value is not None or name == "rope_theta"}


Tensors = dict[str, np.ndarray]


def _rotary(
    full: Config, config: Config, head: int, where: object
) -> tuple[dict[str, Value], Tensors]:
    """Return keys and tensors of the rotary embedding.

    Raises:
        FamilyError: the runtime does not know the kind of scaling.
        CheckpointError: a number that it needs is missing, or cannot be meant.
    """
    base = _number(where, "rope_theta", full.get("rope_theta"), float)
    part = _number(where, PART, full.get(PART, 1.0), float, most=1)
    size = _number(where, f"{PART} of head_dim", int(head * part), int, least=2)
    values: dict[str, Value] = {"rope.freq_base": base, "rope.dimension_count": size}
    local = _section(_section(config, "rope_parameters", where), "sliding_attention", where)
    if LOCAL in config or "rope_theta" in local:
        theta = local.get("rope_theta", config.get(LOCAL))
        values["rope.freq_base_swa"] = _number(where, LOCAL, theta, float)
    kind = full.get("rope_type", full.get("type", "default"))
    tensors: Tensors = {}
    if kind in ("longrope", "su"):
        values |= _long(full, config, where)
        for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
            tensors[name] = _factors(full, key, size // 2, where)
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        rope = {key: _number(where, key, full.get(key), float) for key in names}
        rope[ORIGINAL] = _original(full, config, where)
        least = float(np.nextafter(rope["low_freq_factor"], np.inf))
        _number(where, "high_freq_factor", rope["high_freq_factor"], float, least=least)
        tensors[FREQUENCIES] = llama3_factors(rope, base, size)
    elif kind in ("linear", "yarn"):
        factor = _number(where, "factor", full.get("factor"), float)
        values |= {"rope.scaling.type": str(kind), "rope.scaling.factor": factor}
        if kind == "yarn":
            values |= _yarn(full, config, where)
    elif kind != "default":
        raise _cannot(where, "rope_type", "default, linear, llama3, longrope, yarn", kind, SERVE)
    return values, tensors


def _factors(full: Config, key: str, count: int, where: object) -> np.ndarray:
    """Return float32 ``[count]``: factors of LongRoPE, one for each pair of dimensions."""
    found = full.get(key)
    if not isinstance(found, list) or len(found) != count:
        raise CheckpointError(
            f"{where}: {key}",
            "has no factor for each pair of dimensions",
            expected=count,
            found=len(found) if isinstance(found, list) else repr(found),
            fix="use the config.json of the published model",
        )
    return np.array([_number(where, key, value, float) for value in found], np.float32)


def _original(full: Config, config: Config, where: object) -> int:
    """Return the context before it was stretched, which is said in either of two places."""
    given = [section[ORIGINAL] for section in (config, full) if ORIGINAL in section]
    if len(given) == 2 and given[0] != given[1]:
        raise CheckpointError(
            f"{where}: {ORIGINAL}", "is said twice", found=given, fix="remove one of them"
        )
    found = given[0] if given else config["max_position_embeddings"]
    return _number(where, ORIGINAL, found, int, least=2)


def _yarn(full: Config, config: Config, where: object) -> dict[str, Value]:
    if full.get("mscale") and full.get("mscale_all_dim") and "attention_factor" not in full:
        raise _cannot(where, "mscale", "no mscale", full["mscale"], SERVE)
    found: dict[str, Value] = {
        "rope.scaling.original_context_length": _original(full, config, where)
    }
    for name, key in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if key in full:
            found[f"rope.scaling.{name}"] = _number(where, key, full[key], float)
    return found


def _long(full: Config, config: Config, where: object) -> dict[str, Value]:
    """Keys of LongRoPE (arXiv 2402.13753); its factors are tensors."""
    if ORIGINAL not in full and ORIGINAL not in config:
        raise CheckpointError(
            f"{where}: {ORIGINAL}", "is missing", fix="use the config.json of the published model"
        )
    original = _original(full, config, where)
    ratio = config["max_position_embeddings"] / original
    scale = _number(where, "factor", full.get("factor", ratio), float)
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    given = full.get("attention_factor", factor)
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": _number(where, "attention_factor", given, float),
    }


def llama3_factors(rope: Config, base: float, size: int) -> np.ndarray:
    """Return float32 ``[size / 2]``: what each frequency is divided by (Llama 3.1's scaling).

    Waves longer than original_max_position_embeddings ÷ low_freq_factor are stretched by
    ``factor``, those shorter than that ÷ high_freq_factor are not, those between them in part.
    """
    waves = 2 * np.pi * base ** (np.arange(0, size, 2) / size)
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope[ORIGINAL] / waves
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
