"""Read the layout of a checkpoint: match its tensors with its family, then check each one."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import check_weight
from surgery.checkpoint.parts import check_codes, check_part, check_shape
from surgery.errors import CheckpointError
from surgery.families.blocks import BUFFER
from surgery.families.schema import EXPERT_KEYS, EXPERTS, TEXT_VOCAB, VOCAB, Family, Slot
from surgery.families.table import family_of
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import same_values
from surgery.layout.layout import Layout, no_size, size_in
from surgery.layout.roles import CARRIED, FLOATS


def read_layout(checkpoint: Checkpoint, family: Family | None = None) -> Layout:
    """Match every tensor of ``checkpoint`` with its family and check the named axes.

    Args:
        checkpoint: The checkpoint; its headers are enough.
        family: An entry that is not in the table; None takes the table's entry.

    Raises:
        UnknownTypeError: the table has no entry for the model type.
        FamilyError: the family does not have a tensor.
        CheckpointError: a tensor is missing or its shape contradicts config.json.
    """
    where = checkpoint.config_path
    family = family or family_of(checkpoint.config, where, checkpoint.family)
    config = family.text_config(checkpoint.config)
    depth = _depth(config, family.depth, where)
    if depth is None:
        raise no_size(where, family.depth, config.get(family.depth))
    if depth > len(checkpoint.tensors):
        raise CheckpointError(
            where,
            f"{family.depth} is larger than the number of tensors",
            expected=f"at most {len(checkpoint.tensors)}",
            found=depth,
            fix="check config.json",
        )
    of_decoder = _decoder_depth(checkpoint, family, config, depth)
    unsized = Layout(
        checkpoint, family, 0, {}, depth + of_decoder, tied=False, decoder_layers=of_decoder
    )
    lengths = _lengths(unsized, config, where)
    vocab_size = lengths.pop(VOCAB, 0)
    widths = {key: lengths[key] for key in sorted(lengths, key=lambda k: -unsized.weights[k])}
    tied = unsized.says_tied and not _has_own_head(unsized)
    layout = replace(unsized, vocab_size=vocab_size, widths=widths, tied=tied)
    _check(layout)
    _check_experts(layout)
    return layout


def _depth(config: Mapping[str, Any], key: str, where: object) -> int | None:
    """The number of layers: a number, or a list with an entry for each."""
    listed = config.get(key)
    return len(listed) if isinstance(listed, list) and listed else size_in(config, key, where)


def _decoder_depth(
    checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], depth: int
) -> int:
    """The number of a decoder's layers; 0 where there is no decoder beside an encoder, or only the
    encoder was saved, as of an embedding model."""
    if len(family.stacks) < 2:
        return 0
    inside = f"{family.stacks[1]}."
    if not any(n.startswith(inside) for name in checkpoint.tensors for n in family.spellings(name)):
        return 0
    where = checkpoint.config_path
    return size_in(config, family.decoder_depth, where) or depth


def _check_experts(layout: Layout) -> None:
    """Check that config.json has as many experts as the tensors."""
    if layout.family.experts is None or not layout.experts:
        return
    for key in EXPERT_KEYS:
        if size_in(layout.config, key, layout.where, least=0) not in (None, layout.experts):
            raise CheckpointError(
                layout.where,
                f"{key} is not the number of experts that the tensors have",
                expected=layout.experts,
                found=layout.config[key],
                fix="check config.json",
            )


def _has_own_head(layout: Layout) -> bool:
    """Whether the stored lm_head has other values than the embedding.

    transformers 5 then loads both, whatever config.json says. A model of which only the headers are
    here cannot be compared.
    """
    head = layout.by_name.get(layout.family.head)
    embedding = layout.by_name.get(layout.family.embedding)
    if head is None or embedding is None or not head.path.exists() or not embedding.path.exists():
        return False
    return not same_values(head, embedding)


def _lengths(layout: Layout, config: Mapping[str, Any], where: object) -> dict[str, int]:
    """VOCAB and each width that some tensor has → its length in config.json, else in the tensor."""
    found: dict[str, int] = {}
    for name, role in layout.roles.items():
        for number, dim in enumerate(role.slot.dims):
            key = layout.key_of(dim) if dim and dim.axis != TEXT_VOCAB else None
            if dim is None or key is None or key == EXPERTS or key in found or role.scales:
                continue
            configured = size_in(config, "vocab_size" if key == VOCAB else key, where)
            if key != VOCAB and config.get(layout.family.rounds, bool(layout.family.rounds)):
                configured = None
            shape = layout.checkpoint.tensors[name].shape
            if role.opaque and configured is None:
                raise no_size(where, key, None)
            in_tensor = (shape[number] if number < len(shape) else 0) // layout.unit(dim)
            found[key] = configured or in_tensor
    return found


def _check(layout: Layout) -> None:
    """Check each tensor, and that none is missing."""
    packed: dict[tuple[int, ...], TensorRef] = {}
    for name, tensor in layout.checkpoint.tensors.items():
        role = layout.roles[name]
        if role.opaque and role.scales:
            check_part(layout.checkpoint, tensor)
        elif not role.scales:  # checked with their weight
            _check_tensor(layout, tensor)
            if role.opaque:
                check_codes(layout.checkpoint, tensor)
                packed.setdefault(tensor.shape, tensor)
    for tensor in packed.values():  # equal codes are padded equally; each is a read
        check_shape(layout.checkpoint, tensor)
    _check_complete(layout)


_NAMES = {VOCAB: "vocab_size", EXPERTS: "number of experts"}


def _check_tensor(layout: Layout, tensor: TensorRef) -> None:
    role = layout.roles[tensor.name]
    where = f"{tensor.path}: tensor {tensor.name}"
    if 0 in tensor.shape and role.slot.block != BUFFER:
        raise CheckpointError(
            where,
            "holds no values",
            expected="at least 1 on every dimension",
            found=list(tensor.shape),
            fix="use a checkpoint with all its weights",
        )
    if role.opaque:
        pass  # its bytes are moved as they are
    elif tensor.dtype.startswith("F8_"):
        check_weight(layout.checkpoint, tensor)
    elif tensor.dtype not in FLOATS and (role.slot.required and role.slot is not CARRIED):
        raise CheckpointError(
            where,
            "dtype is not one that can be pruned",
            expected=" or ".join(FLOATS),
            found=tensor.dtype,
            fix="use the unquantized checkpoint",
        )
    steps = layout.steps_of(tensor)
    for number, dim in enumerate(role.slot.dims):
        key = layout.key_of(dim)
        step = steps[number] if number < len(steps) else 1
        if dim is None or key is None or step == 0:
            continue
        expected = -(-layout.length(key) * layout.unit(dim) // step) - layout.missing(dim)
        fits = role.opaque or len(tensor.shape) == len(role.slot.dims)
        if not fits or number >= len(tensor.shape) or tensor.shape[number] != expected:
            raise CheckpointError(
                where,
                f"shape contradicts config.json's {_NAMES.get(key, key)}",
                expected=f"{expected} on dimension {number}",
                found=list(tensor.shape),
                fix="check config.json",
            )


def _check_complete(layout: Layout) -> None:
    """Check that every layer has all required tensors, an FFN, and its blocks whole."""
    present = {(p.slot.name, p.layer, p.expert) for p in layout.roles.values()}
    blocks: dict[int | None, set[str]] = defaultdict(set)
    for role in layout.roles.values():
        blocks[role.layer].add(role.slot.block)
    for slot in layout.family.slots:
        for layer in layout.layers_of(slot) if "{layer}" in slot.name else [None]:
            if not _needs(layout, slot, blocks[layer]):
                continue
            for expert in range(layout.experts) if "{expert}" in slot.name else [None]:
                if (slot.name, layer, expert) not in present:
                    raise _missing(layout, _spelled(layout, slot, layer, expert))
    outputs = [slot for slot in layout.family.slots if slot.ffn_output]
    for layer, axes in enumerate(layout.ffn_outputs):
        if outputs and not axes and not layout.family.mixed:
            slot = next(slot for slot in outputs if layer in layout.layers_of(slot))
            raise _missing(layout, _spelled(layout, slot, layer, 0))


def _spelled(layout: Layout, slot: Slot, layer: int | None, expert: int | None) -> str:
    """Return the name of a tensor of ``slot``."""
    if layer is None:
        return slot.name
    return slot.name.format(layer=layer - layout.layers_of(slot).start, expert=expert)


def _needs(layout: Layout, slot: Slot, blocks: set[str]) -> bool:
    if slot.name == layout.family.head:
        return not layout.tied and not layout.without_head
    conditions = (*slot.beside, slot.block) if slot.block else slot.beside
    return slot.required and (not conditions or not blocks.isdisjoint(conditions))


def _missing(layout: Layout, name: str) -> CheckpointError:
    return CheckpointError(
        f"{layout.checkpoint.path}: tensor {name}",
        "is missing",
        fix="use a whole checkpoint, or correct the model type in config.json",
    )
