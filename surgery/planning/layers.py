"""Which layers an output is made of: read from text, chosen by influence, checked, written out."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from surgery.errors import ADD_FAMILY, BudgetError, FamilyError
from surgery.families.blocks import BUFFER
from surgery.families.layer_rules import PerLayer
from surgery.families.schema import Family
from surgery.layout.layout import FLOATS, Layout

GroupedLayers = Sequence[Sequence[int]]
"""Per layer of the output the source's layers that it is made of; empty: all as they are."""

_SPEC = re.compile(r"\d{1,6}(-\d{1,6}|(\+\d{1,6})+)?(,\d{1,6}(-\d{1,6}|(\+\d{1,6})+)?)*")
_NO_LAYERS = re.compile(r"_token_ids?$|^architectures$|^suppress_tokens$|^keys_to_ignore")
"""Keys whose lists have no entry for each layer, however long they are."""


def parse_layers(text: str) -> list[list[int]]:
    """Read "0-20,21+22+23,24-29": ranges stay, what "+" joins becomes one layer.

    Raises:
        BudgetError: it is written otherwise.
    """
    groups: list[list[int]] = []
    for part in text.split(",") if _SPEC.fullmatch(text) else ():
        if "-" in part:
            first, last = map(int, part.split("-"))
            groups += [[layer] for layer in range(first, last + 1)] or [[]]
        else:
            groups.append([int(layer) for layer in part.split("+")])
    if not groups or not all(groups):
        raise BudgetError(
            "`layers`",
            "does not say which layers stay",
            expected="such as 0-20,21+22+23,24-29",
            found=text[:80],
            fix="correct it",
        )
    return groups


def spelled_layers(groups: GroupedLayers) -> str:
    """The text that ``parse_layers`` reads as ``groups``."""
    parts = []
    runs = groupby(enumerate(groups), lambda item: (len(item[1]), item[1][0] - item[0]))
    for (size, _), run in runs:
        members = [group for _, group in run]
        if size > 1 or len(members) == 1:
            parts += ["+".join(map(str, group)) for group in members]
        else:
            parts.append(f"{members[0][0]}-{members[-1][0]}")
    return ",".join(parts)


def layers_by_influence(influence: np.ndarray, count: int) -> list[list[int]]:
    """Keep the ``count`` layers of largest block influence (ShortGPT, arXiv 2403.03853).

    Of equal ones the first stay.

    Args:
        influence: float64 ``[L]``, 1 − mean cosine of what goes into a layer and comes out.
        count: Layers of the output.

    Raises:
        BudgetError: not between 1 and L.
    """
    if not 1 <= count <= len(influence):
        raise BudgetError(
            "`num_hidden_layers`",
            "is out of reach",
            expected=f"1 to {len(influence)} (the source's layers)",
            found=count,
            fix="choose a number in this range",
        )
    chosen = np.sort(np.argsort(-influence, kind="stable")[:count])
    return [[layer] for layer in chosen.tolist()]


def check_layers(layout: Layout, groups: GroupedLayers) -> None:
    """Refuse layers that are not there, in another order, or that cannot become one.

    Raises:
        BudgetError: naming the layer or tensor.
        FamilyError: layers of this model type differ by number.
    """
    if not groups:
        return
    order = [layer for group in groups for layer in group]
    depth = layout.num_hidden_layers
    ascending = all(a < b for a, b in pairwise(order))
    if not all(groups) or not order or not ascending or not 0 <= order[0] <= order[-1] < depth:
        raise BudgetError(
            "layers",
            "are not ascending numbers of the source's layers, each at most once",
            expected=f"0 to {depth - 1}",
            found=spelled_layers([group for group in groups if group]),
            fix="correct them",
        )
    layer_keys(layout.config, layout.family, groups, depth, layout.where)
    left = {axis for group in groups for axis in layout.ffn_outputs[group[0]]}
    for axes in layout.ffn_outputs:
        for axis in axes.keys() - left:
            raise BudgetError(
                "layers", f"none that stays has the {axis} channels", fix="keep one that has them"
            )
    for group in groups:
        for other in group[1:]:
            _check_alike(layout, group[0], other)


def _check_alike(layout: Layout, first: int, other: int) -> None:
    """Two layers can be added up: the same tensors in the same shape and dtype, none in FP8."""
    found = [_shapes(layout, layer) for layer in (first, other)]
    for key in found[0].keys() | found[1].keys():
        one, two = (shapes.get(key) for shapes in found)
        if one != two:
            raise BudgetError(
                f"layers {first} and {other}",
                f"cannot become one, for they differ in {key[0]}",
                expected=one or "none",
                found=two or "none",
                fix="drop one of them instead",
            )
        if one is not None and one[0] not in FLOATS:
            raise BudgetError(
                f"layers {first} and {other}",
                f"cannot become one, for {key[0]} is {one[0]}",
                expected=" or ".join(FLOATS),
                fix="drop one of them instead, or use a checkpoint in bf16",
            )


def _shapes(layout: Layout, layer: int) -> dict[tuple[str, int | None], tuple[str, Any]]:
    """(slot, expert) → dtype and shape of what a layer computes with."""
    places = ((ref, layout.roles[ref.name]) for ref in layout.of_layer[layer].values())
    return {
        (place.slot.name, place.expert): (ref.dtype, ref.shape)
        for ref, place in places
        if place.slot.block != BUFFER
    }


def kind_notes(layout: Layout, groups: GroupedLayers) -> list[str]:
    """What to know of layers that config.json says are of several kinds."""
    notes = []
    for kind in layout.family.layer_rules or ():
        value = layout.config.get(kind.key)
        if not isinstance(kind, PerLayer) or not isinstance(value, list):
            continue
        mixed = [group for group in groups if len({str(value[n]) for n in group}) > 1]
        if mixed:
            notes.append(f"{spelled_layers(mixed)} differ in {kind.key}; each becomes as its first")
        if len(set(map(str, value))) > 1:
            notes.append(
                f"{kind.key} says which kind each layer is; an engine that counts layers instead "
                "runs another model"
            )
    return notes


def layer_keys(
    config: Mapping[str, Any], family: Family, groups: GroupedLayers, depth: int, where: object
) -> dict[str, Any]:
    """Return what the language model's ``config`` says otherwise when its layers are ``groups``.

    A layer made of several is of its first one's kind.

    Raises:
        FamilyError: the model type is not known to allow it, or a list with an entry for each
            layer is under a key that is not known.
    """
    if family.layer_rules is None:
        raise FamilyError(
            where,
            f"layers of model type {family.text_type or family.model_type} cannot go: their "
            "number says, in ways that config.json does not, what they are",
            fix="keep all layers",
        )
    firsts = [group[0] for group in groups]
    changes: dict[str, Any] = {family.depth: len(groups)}
    for kind in family.layer_rules:
        changes |= kind.renumbered(config, firsts, where)
    widths = {width.key for width in family.widths.values()}
    for key in widths & config.keys():
        if isinstance(config[key], list):
            changes[key] = config[key][: len(groups)]
    known = {*changes, *(kind.key for kind in family.layer_rules)}
    for key, value in config.items():
        lists = isinstance(value, list) and len(value) == depth
        if lists and key not in known and not _NO_LAYERS.search(key):
            raise FamilyError(
                f"{where}: {key}",
                "may have an entry for each layer, but is not known to",
                fix=f"keep all layers, or add the key; {ADD_FAMILY}",
            )
    return changes
