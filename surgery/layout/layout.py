"""A checkpoint seen through its family: the role of every tensor, named axes, lengths."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import weight_of
from surgery.errors import ADD_FAMILY, CheckpointError, FamilyError
from surgery.families.schema import EXPERT, STACK, VOCAB, Dim, Family, Slot, template
from surgery.files.safetensors_header import TensorRef

CARRIED = Slot("carried", "other")
"""Stands for tensors that belong to no language model."""

BUFFERS_BESIDE = re.compile(
    r"(^|\.)(position_ids|inv_freq|running_mean|running_var|num_batches_tracked)$"
)
"""Names of buffers that files store of modules beside the language model, such as encoders."""

DRAFT = Slot("draft", "other")
"""Stands for tensors of layers that only guess ahead."""


@dataclass(frozen=True, slots=True)
class TensorRole:
    """Where a tensor belongs."""

    slot: Slot
    name: str
    """As transformers' text model spells it."""
    layer: int | None = None
    expert: int | None = None
    scales: bool = False
    """Whether the tensor holds the scales of the FP8 weight that is here: no parameters."""

    @property
    def dropped(self) -> bool:
        """Whether the output does not have it."""
        return self.slot is DRAFT

    @property
    def is_parameter(self) -> bool:
        """Whether transformers holds it as a parameter, not as a buffer."""
        if self.slot is CARRIED:
            return not BUFFERS_BESIDE.search(self.name)
        return self.slot.is_parameter and not self.scales


@dataclass(frozen=True)
class TensorRoles:
    """Finds the places of a checkpoint's tensors."""

    checkpoint: Checkpoint
    family: Family
    depth: int
    """Layers that transformers runs."""
    drafts: int
    """Layers behind them that only guess ahead."""

    def of(self, tensor: TensorRef) -> TensorRole:
        """Return the place of ``tensor``.

        Raises:
            FamilyError: the family has no such tensor.
            CheckpointError: it holds scales of no FP8 weight.
        """
        weight = weight_of(self.checkpoint, tensor)
        if weight is not None:
            return replace(self.of(weight), scales=True)
        for name in self.family.spellings(tensor.name):
            pattern, numbers = template(name)
            slot = self.family.by_name.get(pattern)
            if numbers and self._guesses_ahead(name, numbers[0]):
                return TensorRole(DRAFT, name)
            if slot is not None and len(numbers) == slot.name.count("{"):
                layer, expert = (*numbers, None, None)[:2]
                return TensorRole(slot, name, layer, expert)
        if tensor.name.startswith(self.family.carried):
            return TensorRole(CARRIED, tensor.name)
        if tensor.name.startswith(self.family.left_out):
            return TensorRole(DRAFT, tensor.name)
        raise FamilyError(
            f"{tensor.path}: tensor {tensor.name}",
            "is not a tensor of this model's family",
            fix=f"remove it, or add it to the family's slots if it belongs; {ADD_FAMILY}",
        )

    def _guesses_ahead(self, name: str, layer: int) -> bool:
        inside = name.startswith(f"{self.family.layers}.{layer}.")
        return inside and 0 <= layer - self.depth < self.drafts


def without_numbers(names: list[str]) -> list[str]:
    """Return ``names`` with those of several experts as one."""
    return list(dict.fromkeys(re.sub(r"experts\.\d+\.", "experts.{expert}.", n) for n in names))


def size_in(config: Mapping[str, Any], key: str, where: object, *, least: int = 1) -> int | None:
    """The size in config.json, one for all layers; None where it says none.

    Raises:
        CheckpointError: not a number, or below ``least``, or not the same for all layers.
    """
    value = config.get(key)
    if isinstance(value, list) and value and len(set(map(str, value))) == 1:
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or value < least:
        raise no_size(where, key, value)
    return value


def no_size(where: object, key: str, value: object) -> CheckpointError:
    """The error of a key that holds no size."""
    return CheckpointError(
        where,
        f"{key} is missing or not a size",
        expected="a positive number",
        found=value,
        fix="check config.json",
    )


FLOATS = ("BF16", "F16", "F32")
"""dtypes of weights that can be pruned as they are."""


@dataclass(frozen=True)
class Layout:
    """The validated shape of a checkpoint; ``read_layout`` makes it."""

    checkpoint: Checkpoint
    family: Family
    vocab_size: int
    """Rows of the embedding."""
    widths: Mapping[str, int]
    """Key of config.json → channels; those that some tensor has, the costliest first."""
    num_hidden_layers: int
    tied: bool
    """Whether lm_head is the embedding."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers whose parameters count; None is all of them."""

    def with_layers(self, groups: Sequence[Sequence[int]]) -> "Layout":
        """The same, of which only the first layer of each group counts; all, where there is none.

        ``groups`` are as in a plan; other layers go, or become one with the first.
        """
        return replace(self, layers=tuple(group[0] for group in groups)) if groups else self

    @property
    def where(self) -> object:
        """config.json, for errors."""
        return self.checkpoint.path / "config.json"

    @property
    def config(self) -> Mapping[str, Any]:
        """What config.json says of the language model."""
        return self.family.text_config(self.checkpoint.config)

    @cached_property
    def roles(self) -> dict[str, TensorRole]:
        """Tensor name of the file → its place."""
        key = self.family.draft_layers
        drafts = (size_in(self.config, key, self.where, least=0) if key else None) or 0
        places = TensorRoles(self.checkpoint, self.family, self.num_hidden_layers, drafts)
        return {name: places.of(ref) for name, ref in self.checkpoint.tensors.items()}

    @cached_property
    def by_name(self) -> dict[str, TensorRef]:
        """Tensors of the language model as transformers' text model spells them."""
        tensors = self.checkpoint.tensors
        return {
            place.name: tensors[name]
            for name, place in self.roles.items()
            if place.slot not in (CARRIED, DRAFT) and not place.scales
        }

    @cached_property
    def of_layer(self) -> list[dict[str, TensorRef]]:
        """Per layer the part of ``by_name`` that lies in it."""
        found: list[dict[str, TensorRef]] = [{} for _ in range(self.num_hidden_layers)]
        for name, ref in self.by_name.items():
            layer = self.roles[ref.name].layer
            if layer is not None:
                found[layer][name] = ref
        return found

    @cached_property
    def counted(self) -> tuple[TensorRef, ...]:
        """Tensors whose values are parameters, as transformers counts them.

        Buffers are none, and a tied lm_head that is stored again is the embedding.
        """
        twice = self.family.head if self.tied else ""
        places = self.roles
        return tuple(
            t
            for n, t in self.checkpoint.tensors.items()
            if places[n].name != twice and not places[n].dropped and places[n].is_parameter
            if self.layers is None or places[n].layer in (None, *self.layers)
        )

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer; 0 without any."""
        counts = [0]
        for name, place in self.roles.items():
            if place.slot.width == EXPERT:
                packed = Dim(STACK) in place.slot.dims
                shape = self.checkpoint.tensors[name].shape
                counts.append(shape[0] if packed and shape else (place.expert or 0) + 1)
        return max(counts)

    def channels_of(self, axis: str) -> int:
        """Length of one of the channel axes; 0 where the model has no such axis."""
        width = self.family.widths.get(axis)
        if width is None or width.key not in self.widths:
            return 0
        return self.widths[width.key] * self.times(axis)

    def times(self, axis: str) -> int:
        """How many times its width a channel axis is long."""
        key = self.family.widths[axis].times
        return (size_in(self.config, key, self.where, least=0) if key else None) or 1

    @cached_property
    def ffn_outputs(self) -> tuple[dict[str, int], ...]:
        """Per layer: channel axis → number of experts (1 for an FFN that is no expert)."""
        found: list[dict[str, int]] = [{} for _ in range(self.num_hidden_layers)]
        for place in self.roles.values():
            if place.slot.ffn_output and place.layer is not None and place.slot.width:
                routed = place.expert is not None or Dim(STACK) in place.slot.dims
                found[place.layer][place.slot.width] = self.experts if routed else 1
        return tuple(found)

    @cached_property
    def dropped(self) -> list[str]:
        """Tensors that no output has, those of several experts as one name."""
        return without_numbers([n for n, place in self.roles.items() if place.dropped])

    def axis_cost(self, key: str) -> int:
        """Parameters that one row (VOCAB) or one channel of the width ``key`` costs."""
        length = self.vocab_size if key == VOCAB else self.widths[key]
        return self.weights[key] // length

    def parameters(self, vocab_size: int, widths: Mapping[str, int]) -> int:
        """Parameters of the model with these sizes, tied embeddings counted once.

        The paper's eq. 1 and 2 are two of the terms: one row of the vocabulary costs D (2D when
        untied), one channel 3·L·D.
        """
        return (
            self.groups.total()
            - (self.vocab_size - vocab_size) * self.axis_cost(VOCAB)
            - sum((self.widths[key] - widths[key]) * self.axis_cost(key) for key in self.widths)
        )

    @cached_property
    def groups(self) -> Counter[str]:
        """Parameters per group of the census, summing to ``parameters`` of the full sizes."""
        counts: Counter[str] = Counter()
        for tensor in self.counted:
            counts[self.roles[tensor.name].slot.group] += tensor.parameters
        return counts

    def key_of(self, dim: Dim | None) -> str | None:
        """VOCAB or the key of config.json that ``dim`` follows; None where it is never cut."""
        if dim is None or dim.axis == STACK:
            return None
        if dim.axis == VOCAB:
            return VOCAB
        width = self.family.widths.get(dim.axis)
        return width.key if width else None

    def unit(self, dim: Dim) -> int:
        """Positions on a dimension that one step of its width takes."""
        return dim.copies * (1 if dim.axis == VOCAB else self.times(dim.axis))

    @cached_property
    def weights(self) -> Counter[str]:
        """VOCAB or key of a width → parameters of all tensors that have it."""
        found: Counter[str] = Counter()
        for tensor in self.counted:
            for key in {self.key_of(dim) for dim in self.roles[tensor.name].slot.dims} - {None}:
                found[str(key)] += tensor.parameters
        return found
