"""Edits: each output tensor as a copy or a selection of one source tensor."""

import math
from dataclasses import dataclass

import numpy as np

from surgery.budget import Sizes
from surgery.errors import PlanError
from surgery.families import FFN, VOCAB
from surgery.header import TensorRef
from surgery.layout import Layout
from surgery.plan import Plan, Shape, cut_shape, shape_of


@dataclass(frozen=True, eq=False)
class Edit:
    """One output tensor."""

    source: TensorRef
    shape: tuple[int, ...]
    """Of the output."""
    dim: int = 0
    """The dimension that ``indices`` select on."""
    indices: np.ndarray | None = None
    """Ascending positions that stay; None copies the tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return math.prod(self.shape) * self.source.itemsize


def edits(plan: Plan, layout: Layout) -> dict[str, list[Edit]]:
    """Return the edits that ``plan`` makes of ``layout``: shard → tensors in the source's order.

    Raises:
        PlanError: the plan was made for another source, or its channels are not chosen yet.
    """
    if plan.fingerprint != layout.checkpoint.fingerprint:
        raise PlanError(
            layout.checkpoint.path,
            "is not the checkpoint that the plan was made for",
            expected=f"fingerprint {plan.fingerprint[:12]}",
            found=layout.checkpoint.fingerprint[:12],
            fix="make the plan again",
        )
    if not plan.complete:
        raise PlanError(
            "plan",
            "predicts sizes only: its channels are not chosen",
            fix="calibrate, then plan again with --stats",
        )
    full = Sizes(layout.vocab_size, layout.intermediate_size)
    sizes = Sizes(plan.after.vocab_size, plan.after.intermediate_size)
    for part, found, wanted in (("before", plan.before, full), ("after", plan.after, sizes)):
        _check_shape(f"plan: {part}", found, shape_of(layout, wanted))
    if len(plan.kept_channels) not in (0, layout.num_hidden_layers):
        raise PlanError(
            "plan: kept_channels",
            "does not have an entry per layer",
            expected=layout.num_hidden_layers,
            found=len(plan.kept_channels),
            fix="make the plan again",
        )
    kept_tokens = plan.ids().kept
    kept_channels = [plan.channels(layer) for layer in range(layout.num_hidden_layers)]

    def edit(tensor: TensorRef) -> Edit:
        slot, layer = layout.slots[tensor.name]
        shape = cut_shape(layout, tensor, sizes)
        for dim, axis in enumerate(slot.axes):
            if axis is not None and shape[dim] != tensor.shape[dim]:
                if axis == FFN and layer is not None:
                    return Edit(tensor, shape, dim, kept_channels[layer])
                if axis == VOCAB:
                    return Edit(tensor, shape, dim, kept_tokens)
        return Edit(tensor, shape)

    return {
        name: [edit(tensor) for tensor in header.tensors]
        for name, header in layout.checkpoint.shards.items()
    }


def _check_shape(where: str, found: Shape, expected: Shape) -> None:
    for name in Shape.__struct_fields__:
        if getattr(found, name) != getattr(expected, name):
            raise PlanError(
                f"{where}.{name}",
                "is not what the source has or comes to",
                expected=getattr(expected, name),
                found=getattr(found, name),
                fix="make the plan again",
            )
