"""Structure of an unknown decoder, from names, shapes and config.json: ends, layers, axes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgery.errors import FamilyError
from surgery.families.schema import EXPERT, FFN, SHARED, WIDTHS, template
from surgery.files.safetensors_header import TensorRef

_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DRAFTS = re.compile(r"nextn|mtp|predict")
_ATTENTION = re.compile(r"att(n|ention)|qkv|(^|[._])[qkvo]_proj|rotary|mixer", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln([._\d]|$)|ln_", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|feed_?forward|expert|moe|router|(^|\.)fc", re.IGNORECASE)
_HEAD = re.compile(r"head|out", re.IGNORECASE)
_FINAL = re.compile(r"final|ln_f|norm_f|(^|\.)norm$")


def group_of(name: str) -> str:
    """The group of the census that a name suggests."""
    patterns = {"norms": _NORM, "attention": _ATTENTION, "ffn": _FFN}
    return next((group for group, words in patterns.items() if words.search(name)), "other")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose names differ only in the numbers of layer and expert."""

    name: str
    """Their common name, as in ``Slot``."""
    local: str
    """The part after the layer's number."""
    shape: tuple[int, ...]
    """-1 where sizes differ; empty where the numbers of dimensions differ."""
    everywhere: bool
    """Whether every layer has such a tensor."""

    @property
    def path(self) -> str:
        """Path of the module."""
        return self.local.rpartition(".")[0] if self.part else self.local

    @property
    def part(self) -> str:
        """ "weight" or "bias"; "" for any other parameter."""
        last = self.local.rpartition(".")[2]
        return last if last in ("weight", "bias") else ""

    @property
    def group(self) -> str:
        """Its group of the census by name, else by shape."""
        group = group_of(self.path)
        return group if group != "other" else "ffn" if len(self.shape) > 2 else "attention"

    @property
    def stacked(self) -> bool:
        """Whether its first dimension may count experts."""
        alone = "{expert}" in self.name or "shared" in self.path
        return not alone and (len(self.shape) > 2 or "experts" in self.path)

    @property
    def axis(self) -> str:
        """The channel axis that it has, if it has any."""
        if "shared" in self.path:
            return SHARED
        return EXPERT if "{expert}" in self.name or self.stacked else FFN


@dataclass(frozen=True)
class Evidence:
    """The structure that a checkpoint shows."""

    config: Mapping[str, Any]
    layers: str
    """Path of the module that holds the layers."""
    depth: str
    """Key of config.json for the number of layers."""
    draft_layers: str
    """Key for the number of MTP layers after them, or ""."""
    inside: tuple[TensorGroup, ...]
    """Tensors in the layers."""
    outside: Mapping[str, tuple[int, ...]]
    """Name → shape of tensors without numbers in their names."""
    elsewhere: tuple[str, ...]
    """Other modules that hold numbered modules, such as a vision tower."""

    @classmethod
    def read(cls, config: Mapping[str, Any], tensors: Iterable[TensorRef]) -> "Evidence":
        """Group ``tensors`` by their names without numbers.

        Raises:
            FamilyError: no name has a number, or config.json has no such number of layers.
        """
        found: dict[str, dict[str, list[tuple[int, TensorRef]]]] = defaultdict(dict)
        outside = {}
        for ref in tensors:
            pattern, numbers = template(ref.name)
            module, dot, _ = pattern.partition(".{layer}")
            if numbers and dot and not re.search(r"[{}]", ref.name):
                found[module].setdefault(pattern, []).append((numbers[0], ref))
            elif numbers or re.search(r"[{}]", ref.name):
                raise _unknown(ref.name[:80], "is a name that no entry can match")
            else:
                outside[ref.name] = ref.shape
        if not found:
            raise _unknown("names of tensors", "have no layer numbers")
        layers = max(found, key=lambda module: _parameters(found[module].values()))
        count = 1 + max(number for refs in found[layers].values() for number, _ in refs)
        depth, drafts = _depth(config, count)
        inside = [
            _tensors(pattern, layers, refs, config[depth])
            for pattern, refs in found[layers].items()
            if min(number for number, _ in refs) < config[depth]
        ]
        elsewhere = tuple(module for module in found if module != layers)
        return cls(config, layers, depth, drafts, tuple(inside), outside, elsewhere)

    @cached_property
    def tables(self) -> tuple[str, str]:
        """Names of the embedding and of the head; the latter "" where it is tied.

        Raises:
            FamilyError: no tensor has one row per token.
        """
        rows = self.config.get("vocab_size")
        found = [
            name
            for name, shape in self.outside.items()
            if len(shape) == 2 and shape[0] == rows and name.endswith(".weight")
        ]
        if not found:
            raise _unknown("vocab_size", "no tensor has this number of rows", found=rows)
        heads = [name for name in found if _HEAD.search(name)]
        embeddings = [name for name in found if name not in heads] or heads[:1]
        return embeddings[0], next((name for name in heads if name != embeddings[0]), "")

    @cached_property
    def final_norm(self) -> str:
        """Path of the norm before the head, or ""."""
        found = [
            name.removesuffix(".weight")
            for name, shape in self.outside.items()
            if name.endswith(".weight") and len(shape) == 1 and _NORM.search(name)
        ]
        final = [name for name in found if _FINAL.search(name)]
        return (final or (found if len(found) == 1 else [""]))[0]

    @cached_property
    def hidden_size(self) -> int:
        """The hidden size in config.json, else the embedding's."""
        found = [self.config[key] for key in _HIDDEN if is_size(self.config.get(key))]
        return int(found[0]) if found else self.outside[self.tables[0]][1]


def _parameters(patterns: Iterable[list[tuple[int, TensorRef]]]) -> int:
    return sum(ref.parameters for refs in patterns for _, ref in refs)


def _tensors(
    pattern: str, layers: str, refs: list[tuple[int, TensorRef]], depth: int
) -> TensorGroup:
    shapes = {ref.shape for _, ref in refs}
    same_rank = len({len(shape) for shape in shapes}) == 1
    sizes = zip(*shapes, strict=True) if same_rank else ()
    shape = tuple(size[0] if len(set(size)) == 1 else -1 for size in sizes)
    local = pattern.removeprefix(f"{layers}.{{layer}}").removeprefix(".")
    return TensorGroup(
        pattern, local, shape, len({number for number, _ in refs if number < depth}) == depth
    )


def _depth(config: Mapping[str, Any], count: int) -> tuple[str, str]:
    """Keys for the number of layers and, if there are any, of MTP layers after them."""
    keys = [key for key in config if key in _DEPTH or re.search("layer|depth|block", key)]
    sizes = {
        k: config[k] for k in sorted(keys, key=lambda k: k not in _DEPTH) if is_size(config[k])
    }
    for key, size in sizes.items():
        if size == count:
            return key, ""
    for key, size in sizes.items():
        for other, more in config.items():
            if _DRAFTS.search(other) and is_size(more) and size + more == count:
                return key, other
    raise _unknown("config.json", "no key gives the number of layers", expected=count)


def is_size(value: object) -> bool:
    """Whether a value of config.json is a positive number."""
    return type(value) is int and value > 0


def _unknown(where: str, problem: str, **facts: object) -> FamilyError:
    return FamilyError(where, problem, **facts, fix="write the entry by hand")


WIDTH_KEY = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed", re.IGNORECASE)
"""Keys of config.json that are likely to hold a width."""

_NO_WIDTH = re.compile(r"vocab|position|token|layer|head|^hidden_size$|embd|d_model|_id$")
_OF_AXIS = {EXPERT: re.compile("moe|expert"), SHARED: re.compile("shared")}
_DOWN = re.compile(r"down|(^|[._])(w2|wo|fc2|fc_out|c_proj|out\w*)([._]|$)|4h_to_h")


@dataclass(frozen=True)
class AxisLength:
    """A possible length of a channel axis, with its key of config.json."""

    key: str
    times: str
    """Key of a factor that multiplies the length, or ""."""
    channels: int


@dataclass(frozen=True)
class AxisUse:
    """The dimension on which tensors have a channel axis."""

    tensors: TensorGroup
    dim: int
    copies: int
    out: bool
    """Whether they map out of the channels, not into them."""


def lengths(evidence: Evidence) -> dict[str, AxisLength]:
    """Axis → the length that fits most of its tensors; axes without a length are absent."""
    found = {}
    for axis in WIDTHS:
        ranked = [(_rank(evidence, axis, length), length) for length in _candidates(evidence, axis)]
        fit = [pair for pair in ranked if pair[0][0]]
        if fit:
            found[axis] = max(fit, key=lambda pair: pair[0])[1]
    return found


def axis_uses(evidence: Evidence, axis: str, length: AxisLength) -> list[AxisUse]:
    """The weights of ``axis`` that have ``length``; none unless some map in and some out."""
    members = [t for t in evidence.inside if t.group == "ffn" and t.axis == axis]
    found = [use for t in members if (use := _use(evidence, t, length.channels))]
    return found if {use.out for use in found} == {True, False} else []


def _rank(evidence: Evidence, axis: str, length: AxisLength) -> tuple[int, bool, bool, bool]:
    """Sort key: how well a length fits; the first number is 0 where it does not fit."""
    words = _OF_AXIS.get(axis)
    named = words.search(length.key) if words else None
    others = any(w.search(length.key) for a, w in _OF_AXIS.items() if a != axis)
    likely = bool(WIDTH_KEY.search(length.key))
    fit = len(axis_uses(evidence, axis, length))
    return fit, likely, bool(named) or (not words and not others), not length.times


def _candidates(evidence: Evidence, axis: str) -> list[AxisLength]:
    """Possible lengths from config.json; a null key stands for the lengths in the shapes."""
    sizes = {k: v for k, v in evidence.config.items() if is_size(v) and not _NO_WIDTH.search(k)}
    found = [
        AxisLength(key, "", size)
        for key, size in sizes.items()
        if size != evidence.hidden_size or WIDTH_KEY.search(key)
    ]
    if axis == SHARED:
        found += [
            AxisLength(key, times, size * sizes[times])
            for key, size in sizes.items()
            for times in sizes
            if WIDTH_KEY.search(key) and "shared" in times and times != key
        ]
    null = [k for k, v in evidence.config.items() if v is None and WIDTH_KEY.search(k)]
    if axis == FFN and null and not any(axis_uses(evidence, axis, length) for length in found):
        sizes_there = {n for t in evidence.inside if t.group == "ffn" for n in t.shape}
        found += [
            AxisLength(null[0], "", n) for n in sorted(sizes_there - {evidence.hidden_size, 1, -1})
        ]
    return found


def _use(evidence: Evidence, tensors: TensorGroup, channels: int) -> AxisUse | None:
    shape, first = tensors.shape, int(tensors.stacked)
    dims = range(first, len(shape))
    down = bool(_DOWN.search(tensors.path))
    matrix = tensors.part == "weight" or (tensors.stacked and not (down and len(shape) == 2))
    if len(shape) < 2 or not matrix:
        return None
    exact = [dim for dim in dims if shape[dim] == channels]
    if exact:
        dim = exact[-1] if down else exact[0]
        return AxisUse(tensors, dim, 1, _leads_out(evidence, tensors, dim, channels))
    twice = [dim for dim in dims if shape[dim] == 2 * channels]
    if not twice or down or (not tensors.stacked and twice[0] != 0):
        return None
    return AxisUse(tensors, twice[0], 2, False)


def _leads_out(evidence: Evidence, tensors: TensorGroup, dim: int, channels: int) -> bool:
    """Whether tensors map out of the channels: by name if stacked, by bias, else as Linear."""
    if tensors.stacked:
        return len(tensors.shape) > 2 and bool(_DOWN.search(tensors.path))
    biases = (t.shape for t in evidence.inside if t.local == f"{tensors.path}.bias")
    other = tensors.shape[1 - dim]
    for bias in biases:
        if other != channels and bias in ((channels,), (other,)):
            return bias == (other,)
    return dim == 1
