"""A checkpoint seen through its family: named axes, their lengths, every tensor accounted for."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.families import FFN, VOCAB, Family, Slot, family_of
from surgery.header import TensorRef

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Layout:
    """The validated shape of a checkpoint."""

    checkpoint: Checkpoint
    family: Family
    vocab_size: int
    """Rows of the embedding."""
    intermediate_size: int
    num_hidden_layers: int
    tied: bool
    """Whether lm_head is the embedding."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Layout":
        """Match every tensor of ``checkpoint`` with its family and check the named axes.

        Raises:
            FamilyError: unknown model type, or a tensor the family does not have.
            CheckpointError: a tensor is missing or its shape contradicts config.json.
        """
        where = checkpoint.path / "config.json"
        family = family_of(checkpoint.config, where)
        layout = cls(
            checkpoint,
            family,
            vocab_size=_size(checkpoint, family.sizes[VOCAB]),
            intermediate_size=_size(checkpoint, family.sizes[FFN]),
            num_hidden_layers=_size(checkpoint, "num_hidden_layers"),
            tied=bool(checkpoint.config.get("tie_word_embeddings", family.tied)),
        )
        for tensor in checkpoint.tensors.values():
            layout._check(tensor)
        layout._check_complete()
        return layout

    @cached_property
    def slots(self) -> dict[str, tuple[Slot, int | None]]:
        """Tensor name → its slot and layer."""
        return {name: self.family.slot(ref) for name, ref in self.checkpoint.tensors.items()}

    @cached_property
    def counted(self) -> tuple[TensorRef, ...]:
        """Tensors whose parameters count: all, but a tied lm_head that is stored again."""
        tensors = self.checkpoint.tensors
        return tuple(t for n, t in tensors.items() if not (self.tied and n == self.family.head))

    def axis_length(self, axis: str) -> int:
        """Length of the named axis."""
        return {VOCAB: self.vocab_size, FFN: self.intermediate_size}[axis]

    def axis_cost(self, axis: str) -> int:
        """Parameters that one position of ``axis`` costs, over the whole model."""
        return sum(
            t.parameters // self.axis_length(axis)
            for t in self.counted
            if axis in self.slots[t.name][0].axes
        )

    def parameters(self, vocab_size: int, intermediate_size: int) -> int:
        """Parameters of the model with these two sizes, tied embeddings counted once.

        The paper's eq. 1 and 2 are the two terms: one row of the vocabulary costs D (2D when
        untied), one channel 3·L·D.
        """
        return (
            sum(t.parameters for t in self.counted)
            - (self.vocab_size - vocab_size) * self.axis_cost(VOCAB)
            - (self.intermediate_size - intermediate_size) * self.axis_cost(FFN)
        )

    def groups(self) -> Counter[str]:
        """Parameters per group of the census, summing to ``parameters`` of the full sizes."""
        counts: Counter[str] = Counter()
        for tensor in self.counted:
            counts[self.slots[tensor.name][0].group] += tensor.parameters
        return counts

    def _check(self, tensor: TensorRef) -> None:
        where = f"{tensor.path}: tensor {tensor.name}"
        slot, layer = self.slots[tensor.name]
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                where,
                "dtype is not one that can be pruned",
                expected=" or ".join(FLOATS),
                found=tensor.dtype,
                fix="use the unquantized checkpoint",
            )
        if layer is not None and layer >= self.num_hidden_layers:
            raise CheckpointError(
                where,
                "layer is beyond config.json's num_hidden_layers",
                expected=f"less than {self.num_hidden_layers}",
                found=layer,
                fix="check config.json",
            )
        for dim, axis in enumerate(slot.axes):
            if axis is None:
                continue
            length = tensor.shape[dim] if len(tensor.shape) == len(slot.axes) else None
            if length != self.axis_length(axis):
                raise CheckpointError(
                    where,
                    f"shape contradicts config.json's {self.family.sizes[axis]}",
                    expected=f"{self.axis_length(axis)} on dimension {dim}",
                    found=list(tensor.shape),
                    fix="check config.json",
                )

    def _check_complete(self) -> None:
        present = Counter(slot.name for slot, _ in self.slots.values())
        for slot in self.family.slots:
            required = slot.required or (slot.name == self.family.head and not self.tied)
            wanted = self.num_hidden_layers if "{layer}" in slot.name else 1
            if required and present[slot.name] != wanted:
                names = (slot.name.format(layer=layer) for layer in range(wanted))
                missing = next(n for n in names if n not in self.checkpoint.tensors)
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {missing}",
                    "is missing",
                    fix="download the checkpoint again",
                )


def _size(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            checkpoint.path / "config.json",
            f"{key} is missing or not a size",
            expected="a positive number",
            found=value,
            fix="check config.json",
        )
    return value
