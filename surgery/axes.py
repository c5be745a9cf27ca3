"""Which key of config.json gives an axis of channels its length, and what carries it."""

import re
from dataclasses import dataclass

from surgery.evidence import Evidence, Tensors, is_size
from surgery.family import EXPERT, FFN, SHARED, WIDTHS

WIDTH_KEY = re.compile(r"inter|inner|ffn|ff_|_ff|mlp|feed", re.IGNORECASE)
"""Keys of config.json that are likely to hold a width."""

_NO_WIDTH = re.compile(r"vocab|position|token|layer|head|^hidden_size$|embd|d_model|_id$")
_OF_AXIS = {EXPERT: re.compile("moe|expert"), SHARED: re.compile("shared")}
_DOWN = re.compile(r"down|(^|[._])(w2|wo|fc2|fc_out|c_proj|out\w*)([._]|$)|4h_to_h")


@dataclass(frozen=True)
class Length:
    """A length that config.json gives an axis."""

    key: str
    times: str
    """A key by whose number the axis is longer, or ""."""
    channels: int


@dataclass(frozen=True)
class Cut:
    """How tensors carry an axis."""

    tensors: Tensors
    dim: int
    copies: int
    out: bool
    """Whether they lead out of the channels, not into them."""


def lengths(seen: Evidence) -> dict[str, Length]:
    """Axis → the length that accounts for most of its tensors; axes without one are absent."""
    found = {}
    for axis in WIDTHS:
        ranked = [(_rank(seen, axis, length), length) for length in _candidates(seen, axis)]
        fit = [pair for pair in ranked if pair[0][0]]
        if fit:
            found[axis] = max(fit, key=lambda pair: pair[0])[1]
    return found


def cuts(seen: Evidence, axis: str, length: Length) -> list[Cut]:
    """How the weights of ``axis`` carry ``length``; none unless some lead in and some out."""
    members = [t for t in seen.inside if t.group == "ffn" and t.axis == axis]
    found = [cut for t in members if (cut := _cut(seen, t, length.channels))]
    return found if {cut.out for cut in found} == {True, False} else []


def _rank(seen: Evidence, axis: str, length: Length) -> tuple[int, bool, bool, bool]:
    """How well a length fits; the first number is 0 where it does not."""
    words = _OF_AXIS.get(axis)
    named = words.search(length.key) if words else None
    others = any(w.search(length.key) for a, w in _OF_AXIS.items() if a != axis)
    likely = bool(WIDTH_KEY.search(length.key))
    fit = len(cuts(seen, axis, length))
    return fit, likely, bool(named) or (not words and not others), not length.times


def _candidates(seen: Evidence, axis: str) -> list[Length]:
    """Lengths that keys of config.json give; a key that is null stands for what is there."""
    sizes = {k: v for k, v in seen.config.items() if is_size(v) and not _NO_WIDTH.search(k)}
    found = [
        Length(key, "", size)
        for key, size in sizes.items()
        if size != seen.hidden_size or WIDTH_KEY.search(key)
    ]
    if axis == SHARED:
        found += [
            Length(key, times, size * sizes[times])
            for key, size in sizes.items()
            for times in sizes
            if WIDTH_KEY.search(key) and "shared" in times and times != key
        ]
    null = [k for k, v in seen.config.items() if v is None and WIDTH_KEY.search(k)]
    if axis == FFN and null and not any(cuts(seen, axis, length) for length in found):
        there = {n for t in seen.inside if t.group == "ffn" for n in t.shape}
        found += [Length(null[0], "", n) for n in sorted(there - {seen.hidden_size, 1, -1})]
    return found


def _cut(seen: Evidence, tensors: Tensors, channels: int) -> Cut | None:
    shape, first = tensors.shape, int(tensors.stacked)
    dims = range(first, len(shape))
    down = bool(_DOWN.search(tensors.path))
    matrix = tensors.part == "weight" or (tensors.stacked and not (down and len(shape) == 2))
    if len(shape) < 2 or not matrix:
        return None
    exact = [dim for dim in dims if shape[dim] == channels]
    if exact:
        dim = exact[-1] if down else exact[0]
        return Cut(tensors, dim, 1, _leads_out(seen, tensors, dim, channels))
    twice = [dim for dim in dims if shape[dim] == 2 * channels]
    if not twice or down or (not tensors.stacked and twice[0] != 0):
        return None
    return Cut(tensors, twice[0], 2, False)


def _leads_out(seen: Evidence, tensors: Tensors, dim: int, channels: int) -> bool:
    """By the length of the bias; else by name where orders differ; else as ``nn.Linear``."""
    if tensors.stacked:
        return len(tensors.shape) > 2 and bool(_DOWN.search(tensors.path))
    biases = (t.shape for t in seen.inside if t.local == f"{tensors.path}.bias")
    other = tensors.shape[1 - dim]
    for bias in biases:
        if other != channels and bias in ((channels,), (other,)):
            return bias == (other,)
    return dim == 1
