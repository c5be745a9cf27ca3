"""What the models of a type show on the meta device: slots, axes and widths."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery.families.schema import (
    EXPERT,
    EXPERT_KEYS,
    EXPERTS,
    FFN,
    SHARED,
    VOCAB,
    WIDTHS,
    Dim,
    Slot,
    Width,
)
from surgery.probe.evidence import group_of
from tools.derive.axes import (
    Built,
    Dependence,
    channel_keys,
    home,
    switches,
    template,
    value_at,
    vocab_keys,
    with_value,
)
from tools.derive.configs import Kwargs

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layer")
BESIDE_EXPERTS = ("experts", "packed")
BESIDE_TEXT = {"phi4_multimodal": ("model.embed_tokens_extend.",)}
"""Model type without a section for its text → prefixes of what reads images and sounds."""

_BLOCKS = {FFN: "dense", SHARED: "shared"}
_DOWN = re.compile(r"down|(^|[._])(w2|wo|fc2|fc_out|ff_out|c_proj|out\w*)([._]|$)|4h_to_h", re.I)


@dataclass
class Seen:
    """What the models of one type have shown."""

    model_type: str
    pairs: bool = False
    """Whether gate and up are neighbours in fused tensors, which no shape shows."""
    built: list[Built] = field(default_factory=list)
    axes: dict[str, dict[int, Dim]] = field(default_factory=lambda: defaultdict(dict))
    """Template → dimension → axis."""
    widths: dict[str, Width] = field(default_factory=dict)
    embedding: str = ""
    head: str = ""
    tied: bool = False
    section: str = ""
    depth: str = ""
    experts: str = ""
    """Key of the config for the number of routed experts."""

    def models(self, config: Kwargs, auto_class: Any) -> None:
        """Take in the model of ``config``, and those of its other switches."""
        found = Dependence(self.model_type, config, auto_class)
        if not self.built:
            self._ends(found)
        self._vocabulary(found)
        self._channels(found)
        self.built.append(found.base)
        for path, value in switches(config):
            try:
                changed = with_value(config, path, value)
                self.built.append(Built.of(self.model_type, changed, auto_class))
            except Exception:  # any error of a library that has not seen such a value
                continue
        for built in self.built:
            head = built.model.get_output_embeddings()
            self.head = self.head or ("" if head is None else built.name_of(head))

    def _ends(self, found: Dependence) -> None:
        into, out = (getattr(found.base.model, f"get_{p}put_embeddings")() for p in ("in", "out"))
        self.embedding = found.base.name_of(into)
        self.tied = getattr(out, "weight", None) is into.weight
        self.section = min(vocab_keys(found), key=len).rpartition(".")[0]
        config = value_at(found.config, self.section) if self.section else found.config
        self.depth = next((key for key in DEPTH_KEYS if key in config), "layers_block_type")

    def _vocabulary(self, found: Dependence) -> None:
        for key in vocab_keys(found):
            for (name, dim), unit in found.by_key[key].items():
                if unit == 1:
                    self.axes[template(name)][dim] = Dim(VOCAB)

    def _channels(self, found: Dependence) -> None:
        shapes = found.base.shapes
        for path in found.by_key:
            if _last(path) in EXPERT_KEYS:
                for (name, dim), unit in found.by_key[path].items():
                    if unit == 1:
                        self.axes[template(name)].setdefault(dim, Dim(EXPERTS))
                        self.experts = _last(path)
        for path, places in channel_keys(found).items():
            null = value_at(found.config, path) is None
            for (name, dim), unit in places.items():
                others = () if null else sorted(found.keys_of[name, dim] - {path})
                copies, times = int(unit), list[str]()
                for other in others:
                    size = value_at(found.config, other)
                    if type(size) is int and copies % size == 0:
                        copies, times = copies // size, [*times, _last(other)]
                axis = _axis(name, shapes[name])
                known = self.axes[template(name)].get(dim)
                if known and known.axis == axis and known.copies < copies:
                    continue  # a layer that is twice as wide; the table says which, by hand
                self.axes[template(name)][dim] = Dim(axis, copies, self.pairs and copies > 1)
                self.widths[axis] = Width(_last(path), *times[:1])

    @cached_property
    def presence(self) -> dict[str, list[set[str]]]:
        """Template of a tensor in the layers → the layers that have it, by model."""
        found: dict[str, list[set[str]]] = {}
        for number, built in enumerate(self.built):
            for name in built.shapes:
                each = found.setdefault(template(name), [set() for _ in self.built])
                each[number].add(_layer(name))
        return found

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Template → number of dimensions."""
        return {
            template(n): len(shape) for built in self.built for n, shape in built.shapes.items()
        }

    @cached_property
    def buffers(self) -> set[str]:
        """Templates of what the models hold as buffers."""
        return {template(name) for built in self.built for name in built.buffers}

    @cached_property
    def layers(self) -> str:
        """Path of the module that holds the text model's layers."""
        root = self.embedding.rpartition(".")[0].rpartition(".")[0]
        inside = [n.partition(".{layer}")[0] for n in self.presence if ".{layer}" in n]
        near = [name for name in inside if name.startswith(root)] or inside
        wide = [n for n, dims in self.axes.items() if {d.axis for d in dims.values()} & {*WIDTHS}]
        near = [n.partition(".{layer}")[0] for n in wide if ".{layer}" in n] or near
        return max(set(near), key=lambda name: (near.count(name), name))

    @cached_property
    def depths(self) -> list[set[str]]:
        """By model: the numbers of its layers."""
        inside = [
            each for name, each in self.presence.items() if name.startswith(self.layers + ".{")
        ]
        return [set().union(*(each[m] for each in inside)) for m in range(len(self.built))]

    def slots(self) -> list[Slot]:
        """All tensors of the text model, by name."""
        first = [self._slot(name) for name in sorted(self.presence) if self._is_text(name)]
        blocks: dict[str, list[set[tuple[int, str]]]] = defaultdict(list)
        for slot in first:
            if slot.block:
                blocks[slot.block].append(self._places(slot.name))
        return [self._required(slot, blocks) for slot in first]

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """Prefixes of all other tensors."""
        text = [name for name in self.presence if self._is_text(name)]
        return tuple(sorted(prefixes_of(self.presence.keys() - set(text), text)))

    def _is_text(self, name: str) -> bool:
        if name in (self.embedding, self.head):
            return True
        if name.startswith(BESIDE_TEXT.get(self.model_type, ())):
            return False
        if not self.section:
            packed = EXPERT in {dim.axis for dim in self.axes.get(name, {}).values()}
            return packed or name.startswith(self.layers + ".") or "{" not in name
        if name.startswith(self.layers + "."):
            return True
        roots = (self.layers.rpartition(".")[0], ".".join(self.embedding.split(".")[:-2]))
        starts = [f"{root}." if root else "" for root in roots]
        inside = [name.removeprefix(start) for start in starts if name.startswith(start)]
        return "{" not in name and any(local.count(".") <= 1 for local in inside)

    @property
    def mixed(self) -> bool:
        """Whether a layer may have no FFN, where others have one."""
        names = [n for n, dims in self.axes.items() if {d.axis for d in dims.values()} & {*WIDTHS}]
        layers = {(m, layer) for m, every in enumerate(self.depths) for layer in every}
        return bool(names) and not layers <= set().union(*map(self._places, names))

    def _places(self, name: str) -> set[tuple[int, str]]:
        return {(model, layer) for model, each in enumerate(self.presence[name]) for layer in each}

    def _everywhere(self, name: str) -> bool:
        return self.presence[name] == self.depths

    @cached_property
    def _with_experts(self) -> set[tuple[int, str]]:
        names = [n for n, dims in self.axes.items() if EXPERT in {d.axis for d in dims.values()}]
        return set().union(*map(self._places, names))

    @cached_property
    def _around_experts(self) -> tuple[str, ...]:
        """Prefixes of the modules that hold experts."""
        names = [n for n, dims in self.axes.items() if EXPERT in {d.axis for d in dims.values()}]
        return tuple({f"{n.partition('experts')[0].rpartition('.')[0]}." for n in names})

    def _leads_out(self, name: str, dims: tuple[Dim | None, ...]) -> bool:
        """Whether a tensor is the map out of the channels."""
        of_channels = any(dim and dim.axis in WIDTHS for dim in dims)
        if not of_channels or self.ranks[name] < 2:
            return False
        beside = [other for other in self.axes if home(other) == home(name)]
        if any(_DOWN.search(_map(other)) for other in beside):
            return bool(_DOWN.search(_map(name)))
        return bool(dims[-1] and dims[-1].axis in WIDTHS)

    def _dims(self, name: str) -> tuple[Dim | None, ...]:
        dims = self.axes.get(name, {})
        if name.endswith(".bias") and not dims:
            weight = (
                self._dims(f"{name.removesuffix('bias')}weight") if self._has_weight(name) else ()
            )
            out = self._leads_out(f"{name.removesuffix('bias')}weight", weight)
            return () if out or not weight or not weight[0] else weight[:1]
        if name == self.head and not dims:
            return (Dim(VOCAB), None)
        return tuple(map(dims.get, range(self.ranks[name]))) if dims else ()

    def _has_weight(self, bias: str) -> bool:
        return f"{bias.removesuffix('bias')}weight" in self.presence

    def _slot(self, name: str) -> Slot:
        """A slot, of which it is not known yet whether it is required."""
        if name.endswith(".bias") and self._has_weight(name):
            weight = self._slot(f"{name.removesuffix('bias')}weight")
            dims = self._dims(name)
            return Slot(name, weight.group, dims, False, weight.block, weight.beside)
        dims = self._dims(name)
        width = next((dim.axis for dim in dims if dim and dim.axis in WIDTHS), None)
        block, beside = self._block(name, dims, width)
        group = (
            "vocabulary" if Dim(VOCAB) in dims else group_of(name.partition("{layer}.")[2] or name)
        )
        if width or beside or block in ("experts", "packed", "dense", "shared"):
            group = "ffn"
        out = self._leads_out(name, dims)
        return Slot(
            name, group, dims, True, block, beside, out, is_parameter=name not in self.buffers
        )

    def _block(
        self, name: str, dims: tuple[Dim | None, ...], width: str | None
    ) -> tuple[str, tuple[str, ...]]:
        if ".{layer}" not in name:
            return "", ()
        matrix = Dim(EXPERTS) in dims and len(dims) > 1
        if width == EXPERT or (matrix and home(name).endswith("experts")):
            return ("experts" if "{expert}" in name else "packed"), ()
        if width == SHARED or (width == FFN and EXPERT in self.widths):
            return _BLOCKS[width], ()
        if Dim(EXPERTS) in dims:
            return "", BESIDE_EXPERTS
        if self._everywhere(name):
            return "", ()
        if name.startswith(self._around_experts) and self._places(name) <= self._with_experts:
            return "", BESIDE_EXPERTS
        whole = all(
            each in (set(), d) for each, d in zip(self.presence[name], self.depths, strict=True)
        )
        inside = name.removeprefix(f"{self.layers}.{{layer}}.")
        return ("" if whole else inside.partition(".")[0]), ()

    def _required(self, slot: Slot, blocks: Mapping[str, list[set[tuple[int, str]]]]) -> Slot:
        numbered = "{expert}" in slot.name and not slot.of_expert
        if not slot.required or not slot.is_parameter or slot.name == self.head or numbered:
            return replace(slot, required=False)
        places = self._places(slot.name)
        if slot.block:
            return replace(slot, required=places >= set().union(*blocks[slot.block]))
        if slot.beside:
            return replace(slot, required=places >= self._with_experts)
        if ".{layer}" in slot.name:
            return replace(slot, required=self._everywhere(slot.name))
        return replace(slot, required=len({model for model, _ in places}) == len(self.built))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _layer(name: str) -> str:
    """The first number in a name, or ""."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _map(name: str) -> str:
    """Name of the linear map, without ``.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _axis(name: str, shape: tuple[int, ...]) -> str:
    """The channel axis that a tensor has."""
    module = home(name)
    if re.search("shared|share_expert", module):
        return SHARED
    routed = (
        re.search(r"experts?\.\{expert\}", module)
        or len(shape) == 3
        or (len(shape) == 2 and "experts" in module)
    )
    return EXPERT if routed else FFN


def prefixes_of(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """Return the shortest prefixes, whole modules, of ``names`` that none of ``others`` has."""
    found = set()
    for name in names:
        parts = name.split(".")
        modules = [".".join(parts[: n + 1]) + "." for n in range(len(parts) - 1)]
        found.add(next(p for p in (*modules, name) if not any(o.startswith(p) for o in others)))
    return found
