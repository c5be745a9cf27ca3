"""A new entry of the table of families, as Python text, from the evidence of a checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from surgery.families.blocks import (
    LAYER,
    attention,
    ends,
    fused,
    gated,
    into,
    norms,
    optional,
    out_of,
    packed,
    per_layer,
    router,
    transposed,
)
from surgery.families.schema import EXPERT, EXPERTS, FFN, SHARED, Dim, Family, Slot, Width
from surgery.probe.evidence import (
    AxisLength,
    AxisUse,
    Evidence,
    TensorGroup,
    axis_uses,
    group_of,
    lengths,
)

_BLOCKS = {FFN: "dense", EXPERT: "experts", SHARED: "shared"}
_GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Piece:
    """Slots, and the Python text that creates them."""

    text: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Entry:
    """A proposed entry and its text."""

    text: str
    family: Family

    @classmethod
    def of(cls, evidence: Evidence) -> "Entry":
        """Build an entry from the blocks of the table.

        Raises:
            FamilyError: the evidence shows no embedding.
        """
        embedding, head = evidence.tables
        found = lengths(evidence)
        pieces = _pieces(evidence, found)
        widths = {axis: Width(length.key, length.times) for axis, length in found.items()}
        options: dict[str, Any] = {"tied": not head, "widths": widths, "depth": evidence.depth}
        options |= {"embedding": embedding, "head": head or "lm_head.weight"}
        options |= {"carried": tuple(f"{module}." for module in evidence.elsewhere)}
        options |= {"draft_layers": evidence.draft_layers}
        family = Family(tuple(s for piece in pieces for s in piece.slots), **options)
        plain = Family((), tied=False)
        words = [
            f"{name}={_value(value)}"
            for name, value in options.items()
            if name == "tied" or value != getattr(plain, name)
        ]
        slots = "\n    + ".join(piece.text for piece in pieces)
        lines = ",\n    ".join([slots, *words])
        return cls(f"Family(\n    {lines},\n)", family)


def _pieces(evidence: Evidence, lengths: Mapping[str, AxisLength]) -> list[Piece]:
    """Building blocks for every tensor; tensors of no block get slots of their own."""
    at = f"{evidence.layers}.{{layer}}."
    pieces = [_ends(evidence)]
    for group, block in (("attention", attention), ("norms", norms)):
        found = [t for t in evidence.inside if t.group == group and t.everywhere]
        weights = [t.path for t in found if t.part == "weight"]
        if weights:
            pieces.append(_call(block, weights, {"at": at}))
    for axis, length in lengths.items():
        pieces += _channels(evidence, axis, length, at)
    known = {slot.name for piece in pieces for slot in piece.slots}
    rest = [tensors for tensors in evidence.inside if tensors.name not in known]
    pieces += _leftover(rest, at, EXPERT in lengths)
    elsewhere = tuple(f"{module}." for module in evidence.elsewhere)
    alone = [n for n in evidence.outside if n not in known and not n.startswith(elsewhere)]
    return pieces + [_call(per_layer, (group_of(name), name), {"at": ""}) for name in alone]


def _ends(evidence: Evidence) -> Piece:
    embedding, head = (name.removesuffix(".weight") for name in evidence.tables)
    norm = evidence.final_norm
    given = {"embedding": embedding, "norm": norm or "model.norm", "head": head or "lm_head"}
    piece = _call(ends, (), given)
    if norm:
        return piece
    return Piece(f"optional('norms', {piece.text})", optional("norms", piece.slots))


def _channels(evidence: Evidence, axis: str, length: AxisLength, at: str) -> list[Piece]:
    """Linear maps into and out of the channels of ``axis``, with their biases."""
    found = axis_uses(evidence, axis, length)
    always = all(use.tensors.everywhere for use in found)
    block = "" if axis == FFN and always else _BLOCKS[axis]
    common = {"axis": axis, "block": block}
    if at == LAYER and (path := _gated(found)):
        return [_call(gated, (), {"path": path, **common})]
    return _pair(found, axis, at) or [p for use in found for p in _map(evidence, use, common, at)]


def _gated(uses: list[AxisUse]) -> str:
    """Path of the FFN if ``uses`` are its gate, up and down projection, else ""."""
    path = uses[0].tensors.path.rpartition(".")[0]
    found = {u.tensors.local: u.out for u in uses if u.copies == 1 and u.dim == int(u.out)}
    usual = {f"{path}.{name}.weight": name == "down_proj" for name in _GATED}
    return path if found == usual and len(uses) == len(usual) else ""


def _pair(uses: list[AxisUse], axis: str, at: str) -> list[Piece]:
    """One block for two Conv1D, or for packed experts without biases."""
    if len(uses) != 2 or uses[0].out == uses[1].out:
        return []
    first, second = sorted(uses, key=lambda use: use.out)
    names = [use.tensors.local for use in (first, second)]
    where = (first.dim, second.dim)
    if first.tensors.stacked and first.copies == 2 and where in ((1, 2), (2, 1)):
        if at == LAYER:
            return [_call(packed, names, {"transposed": where == (2, 1)})]
    elif axis == FFN and first.copies == 1 and where == (1, 0):
        return [_call(transposed, (first.tensors.path, second.tensors.path), {"at": at})]
    return []


def _map(evidence: Evidence, use: AxisUse, common: Mapping[str, Any], at: str) -> list[Piece]:
    """A single linear map, with its bias."""
    found = use.tensors
    linear = not found.stacked and len(found.shape) == 2 and found.part == "weight"
    if linear and use.dim == int(use.out):
        function = out_of if use.out else fused if use.copies == 2 else into
        return [_call(function, (found.path,), {**common, "at": at})]
    channels = Dim(common["axis"], use.copies)
    axes: list[Dim | str | None] = [None] * len(found.shape)
    axes[use.dim] = channels if use.copies > 1 else common["axis"]
    if found.stacked:
        axes[0] = EXPERTS
    block = "packed" if found.stacked else common["block"]
    piece = [_single(Slot(found.name, "ffn", tuple(axes), block=block, ffn_output=use.out))]
    if not found.stacked and not use.out:
        bias = [t.name for t in evidence.inside if t.local == f"{found.path}.bias"]
        piece += [_single(Slot(n, "ffn", (axes[use.dim],), False, block)) for n in bias]
    return piece


def _leftover(rest: Iterable[TensorGroup], at: str, routed: bool) -> list[Piece]:
    """Pieces for the tensors that no other block has; they are never pruned."""
    found: dict[tuple[str, bool], list[str]] = {}
    for tensors in rest:
        group = "router" if tensors.group == "ffn" and routed else tensors.group
        found.setdefault((group, tensors.everywhere), []).append(tensors.local)
    pieces = []
    for (group, everywhere), names in found.items():
        if group == "router" and at == LAYER:
            pieces.append(_call(router, names, {"required": everywhere}))
        else:
            group = "ffn" if group == "router" else group
            pieces.append(_call(per_layer, (group, *names), {"required": everywhere, "at": at}))
    return pieces


def _call(
    make: Callable[..., tuple[Slot, ...]], names: Sequence[str], options: Mapping[str, Any]
) -> Piece:
    """A call of the building block ``make``; options with default values are left out."""
    known = signature(make).parameters
    given = {k: v for k, v in options.items() if k in known and v != known[k].default}
    words = [repr(name) for name in names]
    words += [f"{k}={v.upper() if k == 'axis' else _value(v)}" for k, v in given.items()]
    return Piece(f"{make.__name__}({', '.join(words)})", make(*names, **given))


def _single(slot: Slot) -> Piece:
    axes = ", ".join(map(_axis, slot.axes)) + ("," if len(slot.axes) == 1 else "")
    more = "" if slot.required else ", required=False"
    more += f", block={slot.block!r}" if slot.block else ""
    more += ", ffn_output=True" if slot.ffn_output else ""
    return Piece(f"(Slot({slot.name!r}, {slot.group!r}, ({axes}){more}),)", (slot,))


def _axis(axis: Dim | str | None) -> str:
    if isinstance(axis, Dim):
        return f"Dim({axis.axis.upper()}, copies={axis.copies})"
    return "None" if axis is None else axis.upper()


def _value(value: Any) -> str:
    """Python text of an argument; widths are written with the names of their axes."""
    if not isinstance(value, dict):
        return repr(value)
    pairs = (f"{axis.upper()}: {_width(width)}" for axis, width in value.items())
    return "{" + ", ".join(pairs) + "}"


def _width(width: Width) -> str:
    return f"Width({', '.join(map(repr, filter(None, (width.key, width.times))))})"
