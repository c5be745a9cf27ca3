"""What a checkpoint must have for its family: every tensor, in the shape config.json says."""

from collections import defaultdict
from typing import TYPE_CHECKING

from surgery.errors import CheckpointError
from surgery.family import VOCAB, Slot
from surgery.header import TensorRef
from surgery.places import CARRIED
from surgery.scales import check_weight

if TYPE_CHECKING:
    from surgery.layout import Layout

FLOATS = ("BF16", "F16", "F32")


def check_layout(layout: "Layout") -> None:
    """Check every tensor, and that none is missing.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in layout.checkpoint.tensors.items():
        if not layout.places[name].scales:  # their weight's check is theirs, too
            _check_tensor(layout, tensor)
    _check_complete(layout)


def _check_tensor(layout: "Layout", tensor: TensorRef) -> None:
    place = layout.places[tensor.name]
    where = f"{tensor.path}: tensor {tensor.name}"
    if tensor.dtype.startswith("F8_"):
        check_weight(layout.checkpoint, tensor)
    elif tensor.dtype not in FLOATS and (place.slot.required and place.slot is not CARRIED):
        raise CheckpointError(
            where,
            "dtype is not one that can be pruned",
            expected=" or ".join(FLOATS),
            found=tensor.dtype,
            fix="use the unquantized checkpoint",
        )
    if place.layer is not None and place.layer >= layout.num_hidden_layers:
        raise CheckpointError(
            where,
            f"layer is beyond config.json's {layout.family.depth}",
            expected=f"less than {layout.num_hidden_layers}",
            found=place.layer,
            fix="check config.json",
        )
    for number, dim in enumerate(place.slot.dims):
        key = layout.key_of(dim)
        if dim is None or key is None:
            continue
        wanted = (layout.vocab_size if key == VOCAB else layout.widths[key]) * layout.unit(dim)
        fits = len(tensor.shape) == len(place.slot.dims)
        if not fits or tensor.shape[number] != wanted:
            raise CheckpointError(
                where,
                f"shape contradicts config.json's {'vocab_size' if key == VOCAB else key}",
                expected=f"{wanted} on dimension {number}",
                found=list(tensor.shape),
                fix="check config.json",
            )


def _check_complete(layout: "Layout") -> None:
    """Every layer has what all layers need, one FFN, and its blocks whole."""
    present = {(p.slot.name, p.layer, p.expert) for p in layout.places.values()}
    blocks: dict[int | None, set[str]] = defaultdict(set)
    for place in layout.places.values():
        blocks[place.layer].add(place.slot.block)
    for slot in layout.family.slots:
        for layer in range(layout.num_hidden_layers) if "{layer}" in slot.name else [None]:
            if not _needs(layout, slot, blocks[layer]):
                continue
            for expert in range(layout.experts) if "{expert}" in slot.name else [None]:
                if (slot.name, layer, expert) not in present:
                    raise _missing(layout, slot.name.format(layer=layer, expert=expert))
    watched = [slot.name for slot in layout.family.slots if slot.watched]
    for layer, axes in enumerate(layout.watched):
        if watched and not axes:
            raise _missing(layout, watched[0].format(layer=layer, expert=0))


def _needs(layout: "Layout", slot: Slot, blocks: set[str]) -> bool:
    if slot.name == layout.family.head:
        return not layout.tied
    conditions = (*slot.beside, slot.block) if slot.block else slot.beside
    return slot.required and (not conditions or not blocks.isdisjoint(conditions))


def _missing(layout: "Layout", name: str) -> CheckpointError:
    return CheckpointError(
        f"{layout.checkpoint.path}: tensor {name}",
        "is missing",
        fix="download the checkpoint again",
    )
