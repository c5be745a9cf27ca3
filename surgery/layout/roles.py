"""The role of each tensor: its slot in the table of axes, with its layer and expert."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import weight_of
from surgery.errors import ADD_FAMILY, CheckpointError, FamilyError
from surgery.families.schema import FFN, Family, Slot, template
from surgery.files.safetensors_header import TensorRef

FLOATS = ("BF16", "F16", "F32")
"""dtypes of weights that can be pruned without conversion."""

CARRIED = Slot("carried", "other")
"""The slot of all tensors outside the language model."""

BUFFERS_BESIDE = re.compile(
    r"(^|\.)(position_ids|inv_freq|running_mean|running_var|num_batches_tracked)$"
)
"""Names of buffers that files store of modules beside the language model, such as encoders."""

DRAFT = Slot("draft", "other")
"""The slot of all tensors for multi-token prediction, which no output has."""


@dataclass(frozen=True, slots=True)
class TensorRole:
    """The slot of a tensor, with its layer and expert."""

    slot: Slot
    name: str
    """The tensor's name in transformers' text model."""
    layer: int | None = None
    expert: int | None = None
    scales: bool = False
    """Whether the tensor holds the scales of this weight, or what else is stored beside its codes;
    scales are not parameters."""
    opaque: bool = False
    """Whether the tensor is part of a quantized weight in a format ``Opaque``."""

    @property
    def dropped(self) -> bool:
        """Whether the output lacks the tensor."""
        return self.slot is DRAFT

    @property
    def is_parameter(self) -> bool:
        """Whether transformers holds it as a parameter, not as a buffer."""
        if self.slot is CARRIED:
            return not BUFFERS_BESIDE.search(self.name)
        return self.slot.is_parameter and not self.scales


@dataclass(frozen=True)
class TensorRoles:
    """Finds the role of each tensor of a checkpoint."""

    checkpoint: Checkpoint
    family: Family
    depths: Sequence[int]
    """Number of layers that transformers runs, of each of the family's stacks."""
    drafts: int
    """Number of layers after them, for multi-token prediction."""
    first_wide: int
    """The first of the layers whose dense FFN is twice as wide."""

    def of(self, tensor: TensorRef) -> TensorRole:
        """Return the role of ``tensor``.

        Raises:
            FamilyError: the family has no such tensor.
            CheckpointError: it holds scales, but there is no FP8 weight for them.
        """
        opaque = self.checkpoint.opaque
        if opaque is not None:
            stored = opaque.weight_of(tensor.name)
            if stored is not None:
                role = self._of_name(replace(tensor, name=stored[0]))
                return replace(role, scales=stored[1], opaque=True)
            role = self._of_name(tensor)
            own_name = not opaque.codes or opaque.method == "compressed-tensors"
            return replace(role, opaque=own_name and tensor.dtype not in FLOATS)
        weight = weight_of(self.checkpoint, tensor)
        if weight is not None:
            return replace(self.of(weight), scales=True)
        return self._of_name(tensor)

    def _of_name(self, tensor: TensorRef) -> TensorRole:
        for name in self.family.spellings(tensor.name):
            pattern, numbers = template(name)
            slot = self.family.by_name.get(pattern)
            if slot is None and len(numbers) > 1:  # as in encoder.block.{layer}.layer.1
                pattern, numbers = template(name, 1)
                slot = self.family.by_name.get(pattern)
            if numbers and self._is_draft(name, numbers[0]):
                return TensorRole(DRAFT, name)
            if slot is not None and len(numbers) == slot.name.count("{"):
                number, expert = (*numbers, None, None)[:2]
                layer = self._layer(tensor, slot, number)
                if slot.width == FFN and layer is not None and layer >= self.first_wide:
                    slot = self.family.wide(slot)
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

    def _layer(self, tensor: TensorRef, slot: Slot, number: int | None) -> int | None:
        """Return the layer with this number in its stack, counted over all stacks."""
        if number is None:
            return None
        stack = next((n for n, s in enumerate(self.family.stacks) if slot.name.startswith(s)), 0)
        if number >= self.depths[stack]:
            keys = (self.family.depth, self.family.decoder_depth)
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name}",
                f"layer number is beyond config.json's {keys[stack]}",
                expected=f"less than {self.depths[stack]}",
                found=number,
                fix="check config.json",
            )
        return sum(self.depths[:stack]) + number

    def _is_draft(self, name: str, layer: int) -> bool:
        inside = name.startswith(f"{self.family.layers}.{layer}.")
        return inside and 0 <= layer - self.depths[0] < self.drafts
