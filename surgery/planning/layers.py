"""The layers of an output: parsed from text, chosen by block influence, checked, formatted."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from surgery.errors import ADD_FAMILY, BudgetError, FamilyError
from surgery.families.blocks import BUFFER
from surgery.families.layer_rules import CONVERTER, LayerNumbers, PerLayer
from surgery.families.schema import Family
from surgery.layout.layout import Layout
from surgery.layout.roles import FLOATS

GroupedLayers = Sequence[Sequence[int]]
"""For each layer of the output, the source's layers that it is made of; empty keeps all layers."""

_SPEC = re.compile(r"\d{1,6}(-\d{1,6}|(\+\d{1,6})+)?(,\d{1,6}(-\d{1,6}|(\+\d{1,6})+)?)*")
PLAIN_LISTS = re.compile(r"_token_ids?$|^architectures$|^suppress_tokens$|^keys_to_ignore")
"""Keys whose lists have no entry for each layer or expert, whatever their length."""


def parse_layers(text: str) -> list[list[int]]:
    """Parse "0-20,21+22+23,24-29": keep the ranges, and make one layer of those joined by "+".

    Raises:
        BudgetError: ``text`` has another form.
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
            "does not name the layers to keep",
            expected="such as 0-20,21+22+23,24-29",
            found=text[:80],
            fix="correct it",
        )
    return groups


def format_layers(groups: GroupedLayers) -> str:
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


def layers_by_influence(
    influence: np.ndarray, count: int, needed: Collection[int] = ()
) -> list[list[int]]:
    """Keep the ``count`` layers of largest block influence (ShortGPT, arXiv 2403.03853).

    Of equal ones, keep the first.

    Args:
        influence: float64 ``[L]``, 1 − the mean cosine between a layer's input and output.
        count: Layers to keep.
        needed: From ``needed_layers``: these are among them, whatever their influence.

    Raises:
        BudgetError: ``count`` is less than 1 or the layers ``needed``, or more than L.
    """
    least = max(1, len(needed))
    if not least <= count <= len(influence):
        raise BudgetError(
            "`num_hidden_layers`",
            "is out of reach",
            expected=f"{least} to {len(influence)} (the source's layers)",
            found=count,
            fix="choose a number in this range",
        )
    return [[layer] for layer in sorted(ranked(influence, needed)[:count])]


def ranked(influence: np.ndarray, needed: Collection[int] = ()) -> list[int]:
    """Return the layers in the order in which they are kept: those ``needed`` first."""
    order = np.argsort(-influence, kind="stable").tolist()
    return sorted(order, key=lambda layer: layer not in needed)


def needed_layers(layout: Layout, influence: np.ndarray) -> list[int]:
    """Return the layers of largest ``influence`` without which ``check_layers`` refuses the rest.

    Such are one of each kind of FFN, one with full attention, or the first layer, as the model
    type's rules say.
    """
    found: list[int] = []
    for need in sorted(_needs(layout), key=len):
        if not need.intersection(found):
            found.append(max(sorted(need), key=lambda layer: influence[layer]))
    return found


def _needs(layout: Layout) -> Iterator[set[int]]:
    """Yield sets of layers: of each, at least one must be kept."""
    axes = {axis for each in layout.ffn_outputs for axis in each}
    found = [{n for n, each in enumerate(layout.ffn_outputs) if axis in each} for axis in axes]
    for rule in layout.family.layer_rules or ():
        found.append(set())
        for layer in range(layout.num_hidden_layers):
            with suppress(FamilyError):  # the rule does without all others, or it does not
                rule.renumbered(layout.config, [layer], layout.where)
                found[-1].add(layer)
    for need in found:
        if 0 < len(need) < layout.num_hidden_layers:
            yield need


def check_layers(layout: Layout, groups: GroupedLayers) -> None:
    """Refuse layers that do not exist, are out of order, or cannot be merged into one.

    Raises:
        BudgetError: naming the layer or tensor.
        FamilyError: layers of this model type cannot be removed.
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
            found=format_layers([group for group in groups if group]),
            fix="correct them",
        )
    layer_keys(layout.config, layout.family, groups, depth, layout.where)
    left = {axis for group in groups for axis in layout.ffn_outputs[group[0]]}
    for axes in layout.ffn_outputs:
        for axis in axes.keys() - left:
            raise BudgetError(
                "layers", f"no kept layer has the {axis} channels", fix="keep one that has them"
            )
    for group in groups:
        for other in group[1:]:
            _check_alike(layout, group[0], other)


def check_removable(layout: Layout) -> None:
    """Refuse a model of several layers of which none can be removed.

    Raises:
        BudgetError, FamilyError: as ``check_layers``.
    """
    alike = np.zeros(layout.num_hidden_layers)
    needed, most = needed_layers(layout, alike), max(1, layout.num_hidden_layers - 1)
    check_layers(layout, layers_by_influence(alike, max(most, len(needed)), needed))


def check_mergeable(layout: Layout) -> None:
    """Refuse a model whose layers cannot be added to each other, for some have other shapes.

    Raises:
        BudgetError: naming two layers.
    """
    one, *others = (
        {key: shape for key, (_, shape) in _shapes(layout, layer).items()}
        for layer in range(layout.num_hidden_layers)
    )
    for other, found in enumerate(others, start=1):
        for key in one.keys() | found.keys():
            if one.get(key) != found.get(key):
                raise BudgetError(
                    f"layers 0 and {other}",
                    f"cannot be merged into one: they differ in {key[0]}",
                    expected=one.get(key) or "none",
                    found=found.get(key) or "none",
                    fix="remove layers instead",
                )


def _check_alike(layout: Layout, first: int, other: int) -> None:
    """Refuse to add two layers unless their tensors are alike in shape and dtype, none in FP8."""
    found = [_shapes(layout, layer) for layer in (first, other)]
    for key in found[0].keys() | found[1].keys():
        one, two = (shapes.get(key) for shapes in found)
        if one != two:
            raise BudgetError(
                f"layers {first} and {other}",
                f"cannot be merged into one: they differ in {key[0]}",
                expected=one or "none",
                found=two or "none",
                fix="remove one of them instead",
            )
        if one is not None and one[0] not in FLOATS:
            raise BudgetError(
                f"layers {first} and {other}",
                f"cannot be merged into one: {key[0]} is {one[0]}",
                expected=" or ".join(FLOATS),
                fix="remove one of them instead, or use a checkpoint in bf16",
            )


def _shapes(layout: Layout, layer: int) -> dict[tuple[str, int | None], tuple[str, Any]]:
    """(slot, expert) → dtype and shape of each tensor that a layer computes with."""
    roles = ((ref, layout.roles[ref.name]) for ref in layout.of_layer[layer].values())
    return {
        (role.slot.name, role.expert): (ref.dtype, ref.shape)
        for ref, role in roles
        if role.slot.block != BUFFER
    }


def kind_notes(
    layout: Layout, groups: GroupedLayers, influence: np.ndarray | None = None
) -> list[str]:
    """Return notes on layers that are of several kinds according to config.json.

    By their ``influence``, where it is known, layers that keep the pattern are offered.
    """
    notes, firsts = [], [group[0] for group in groups]
    kept = pattern_layers(
        layout,
        len(firsts),
        np.bincount(firsts, minlength=layout.num_hidden_layers) if influence is None else influence,
    )
    for rule, kinds in _listed(layout):
        mixed = [group for group in groups if len({str(kinds[n]) for n in group}) > 1]
        if mixed:
            notes.append(f"{format_layers(mixed)} differ in {rule.key}; each becomes as its first")
        if len(set(map(str, kinds))) > 1:
            notes += _counting(layout, rule, [kinds[first] for first in firsts], kept)
    return notes


def _listed(layout: Layout) -> list[tuple[PerLayer | LayerNumbers, list[object]]]:
    """Return the rules that tell kinds of layers apart, and the kind of each layer.

    A list with too few entries tells nothing.
    """
    rules = [r for r in layout.family.layer_rules or () if isinstance(r, PerLayer | LayerNumbers)]
    found, depth = ((rule, rule.kinds(layout.config)) for rule in rules), layout.num_hidden_layers
    return [(rule, kinds[:depth]) for rule, kinds in found if kinds and len(kinds) >= depth]


def _counting(
    layout: Layout,
    rule: PerLayer | LayerNumbers,
    kinds: Sequence[object],
    kept: GroupedLayers | None,
) -> list[str]:
    """Say which engines run another model, for they count layers, and what to do.

    Args:
        layout: The source's.
        rule: That tells the layers apart.
        kinds: Those of the layers that are kept.
        kept: As many layers that keep the pattern, if there are such.
    """
    if rule.period is None:
        return [
            f"{rule.key} says which kind each layer is; an engine that counts layers instead "
            "runs another model"
        ]
    if kinds == rule.period.kinds(layout.config, len(kinds)):
        return []
    engines, every = rule.period.counted_by, rule.period.length(layout.config)
    who = " and ".join([", ".join(engines[:-1]), *engines[-1:]] if engines[1:] else engines)
    start = " from the first on" if rule.period.begins else ""
    note = f"{rule.key}: {who or 'an engine that counts layers'} would take each {every}. layer"
    note += f"{start} for one of {rule.period.last!r}, and run another model"
    if CONVERTER in engines:
        note += "; compact-surgery export tells llama.cpp, or refuses"
    if kept is not None:
        return [f"{note}; `layers` {format_layers(kept)} keeps the pattern"]
    return [f"{note}; no {len(kinds)} layers keep the pattern, so run the output in transformers"]


def nearest_layers(
    kinds: Sequence[object],
    wanted: Sequence[object],
    weights: Sequence[float] | np.ndarray,
    needs: Sequence[Collection[int]] = (),
) -> list[int] | None:
    """Return layers of the ``wanted`` kinds, in order, of the largest sum of ``weights``.

    None where there are no such layers.

    Args:
        kinds: The kind of each of the source's layers.
        wanted: The kinds of the layers to keep.
        weights: What speaks for each of the source's layers, such as its block influence.
        needs: Sets of layers; one of each is among those that are returned.
    """
    # best[n, met]: of the choices of the first n wanted that have one of the needs ``met``, that
    # with the largest sum of weights.
    best: dict[tuple[int, frozenset[int]], tuple[float, list[int]]] = {(0, frozenset()): (0, [])}
    for layer, kind in enumerate(kinds):
        own = {number for number, need in enumerate(needs) if layer in need}
        for (n, met), (total, before) in list(best.items()):
            if n < len(wanted) and kind == wanted[n]:
                key, more = (n + 1, met | own), total + float(weights[layer])
                if key not in best or more > best[key][0]:
                    best[key] = (more, [*before, layer])
    found = best.get((len(wanted), frozenset(range(len(needs)))))
    return found[1] if found else None


def pattern_layers(layout: Layout, count: int, influence: np.ndarray) -> list[list[int]] | None:
    """Return the ``count`` layers of largest influence that an engine which counts takes rightly.

    None where layers differ by no pattern, or where no such layers are left that ``check_layers``
    allows.
    """
    found = [(rule.period, kinds) for rule, kinds in _listed(layout) if rule.period is not None]
    if not found:
        return None
    every = list(zip(*(kinds for _, kinds in found), strict=True))
    wanted = list(zip(*(period.kinds(layout.config, count) for period, _ in found), strict=True))
    kept = nearest_layers(every, wanted, influence, list(_needs(layout)))
    return None if kept is None else [[layer] for layer in kept]


def layer_keys(
    config: Mapping[str, Any], family: Family, groups: GroupedLayers, depth: int, where: object
) -> dict[str, Any]:
    """Return the keys of the language model's ``config`` that change with its layers ``groups``.

    A layer made of several has the kind of its first one.

    Raises:
        FamilyError: the model type has no rules for its layers, or an unknown key holds a list
            as long as the model has layers.
    """
    if family.layer_rules is None:
        why = "what a layer is depends on its number, in ways that config.json does not state"
        if family.decoder_depth:
            why = "no rule chooses among those of an encoder and of a decoder"
        raise FamilyError(
            where,
            f"layers of model type {family.text_type or family.model_type} cannot be removed: "
            f"{why}",
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
        if lists and key not in known and not PLAIN_LISTS.search(key):
            raise FamilyError(
                f"{where}: {key}",
                "may have an entry for each layer; the table of families does not tell",
                fix=f"keep all layers, or add the key; {ADD_FAMILY}",
            )
    return changes
