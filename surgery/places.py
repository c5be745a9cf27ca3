"""Where each tensor of a checkpoint belongs: slot, layer, expert."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import ADD_FAMILY, CheckpointError, FamilyError
from surgery.family import Family, Slot, template
from surgery.header import TensorRef
from surgery.scales import weight_of

CARRIED = Slot("carried", "other")
"""Stands for tensors that belong to no language model."""

DRAFT = Slot("draft", "other")
"""Stands for tensors of layers that only guess ahead."""


@dataclass(frozen=True, slots=True)
class Place:
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


@dataclass(frozen=True)
class Places:
    """Finds the places of a checkpoint's tensors."""

    checkpoint: Checkpoint
    family: Family
    depth: int
    """Layers that transformers runs."""
    drafts: int
    """Layers behind them that only guess ahead."""

    def of(self, tensor: TensorRef) -> Place:
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
                return Place(DRAFT, name)
            if slot is not None and len(numbers) == slot.name.count("{"):
                layer, expert = (*numbers, None, None)[:2]
                return Place(slot, name, layer, expert)
        if tensor.name.startswith(self.family.carried):
            return Place(CARRIED, tensor.name)
        if tensor.name.startswith(self.family.left_out):
            return Place(DRAFT, tensor.name)
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
