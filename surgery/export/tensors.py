"""The tensors of a GGUF file, made of rows of the checkpoint's and streamed by windows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.shard import DTYPE, WINDOW_BYTES
from surgery.checkpoint.fp8 import from_bf16, to_bf16
from surgery.errors import GET_AGAIN, CheckpointError, FamilyError, NotFiniteError
from surgery.export.architectures import Architecture
from surgery.export.embedders import POSITIONS, first_position
from surgery.families.blocks import BUFFER
from surgery.families.schema import EXPERT, HEAD, Dim, Slot
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import Buffer, ShardFile
from surgery.layout.layout import Layout
from surgery.layout.roles import FLOATS

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that weights can be written as."""

MXFP4 = "mxfp4"
"""The type of weights that are kept as they are: groups of 32 codes of 4 bits with a scale."""

OWN_TYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""safetensors dtype → the same type."""

BLOCK = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), MXFP4: (32, 17)}
"""Type → values of a block, and its bytes."""

AS_F32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types")
"""Routers and tables that the runtime reads as f32 only."""

MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names of an expert's projections."""


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of the checkpoint, perhaps in another order."""

    ref: TensorRef
    first: int
    count: int
    columns: int
    """Elements of a row."""
    block: int = 1
    """Rows that are put in order together; ``count`` is a multiple of it."""
    order: tuple[int, ...] = ()
    """Rows of a block in their order, perhaps not all of them; empty for all as they are."""
    scales: TensorRef | None = None
    """Of MXFP4 codes: a byte for each 16 bytes of ``ref``."""


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix of the checkpoint, as rows of the output."""

    ref: TensorRef
    first: int
    """Row at which the matrix begins."""
    rows: int
    kept: slice
    """Which columns."""


Part = Rows | Columns


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file."""

    name: str
    type: str
    """One of ``TYPES``, or MXFP4."""
    shape: tuple[int, ...]
    """The slowest dimension first, as in the checkpoint; the file has them reversed."""
    parts: tuple[Part, ...] = ()
    """What it is made of, one after the other."""
    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """float32: its values, where it has no parts."""
    offset: float = 0.0
    """What is added to every value."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        values, nbytes = BLOCK[self.type]
        return math.prod(self.shape) // values * nbytes


def tensors_of(
    layout: Layout, architecture: Architecture, type_: str, names: Any
) -> list[GgufTensor]:
    """Return the tensors of the file that are made from the checkpoint's.

    Args:
        layout: The checkpoint.
        architecture: How its type is written.
        type_: What weights become, one of ``TYPES``; norms, biases and routers become f32.
        names: gguf's map of names, for the number of layers.

    Raises:
        FamilyError: llama.cpp has no name for a tensor.
        CheckpointError: weights are quantized, but not in MXFP4.
    """
    made = []
    for name, parts, shape in _sources(layout, architecture):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise FamilyError(
                f"{parts[0].ref.path}: tensor {parts[0].ref.name}",
                "llama.cpp has no tensor like it for this model type",
                fix="use llama.cpp's convert_hf_to_gguf.py",
            )
        offset = architecture.norm_offset if name.endswith("norm.weight") else 0.0
        kind = _type(known, parts[0], shape, type_)
        made.append(GgufTensor(known, kind, shape, parts, offset=offset))
        if name == layout.family.embedding and architecture.own_head and layout.tied:
            made.append(replace(made[-1], name="output.weight"))
    return made


def _type(name: str, part: Part, shape: tuple[int, ...], type_: str) -> str:
    """Return the type of a tensor, as llama.cpp's converter chooses it."""
    if isinstance(part, Rows) and part.scales is not None:
        return MXFP4
    module = name.split(".")[-2]
    plain = len(shape) == 1 or module.endswith("_norm") or module in AS_F32
    if plain or not name.endswith(".weight"):
        return "f32"
    return "f16" if shape[-1] % BLOCK[type_][0] else type_


Source = tuple[str, tuple[Part, ...], tuple[int, ...]]
"""A tensor of transformers' text model, with experts joined, and gate and up apart: its name, its
parts, its shape."""


def _sources(layout: Layout, architecture: Architecture) -> Iterator[Source]:
    heads = _heads(layout) if architecture.interleaved_heads else {}
    experts: dict[str, list[TensorRef]] = {}
    for name, ref in layout.by_name.items():
        role = layout.roles[ref.name]
        if role.slot.block == BUFFER or (layout.tied and name == layout.family.head):
            continue
        if architecture.encoder and role.slot.block == HEAD:
            continue
        if role.opaque and ref.name.endswith("_blocks"):
            yield from _mxfp4(layout, ref, name, role.slot)
            continue
        _check_float(ref)
        if role.slot.of_expert:
            joined = _of_all_experts(name, role.expert)
            found = experts.setdefault(joined, [])
            found.append(ref)
            if len(found) == layout.experts:
                found.sort(key=lambda ref: layout.roles[ref.name].expert or 0)
                yield joined, tuple(map(_rows, found)), (layout.experts, *ref.shape)
        elif role.slot.packed:
            yield from _packed(ref, name, role.slot)
        else:
            full = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            rows, shape = _rows(ref, heads.get(full.split(".")[-2])), ref.shape
            if architecture.encoder and full == POSITIONS:
                first = first_position(layout)
                rows = replace(rows, first=first, count=rows.count - first)
                shape = (rows.count, rows.columns)
            yield full, (rows,), shape


def _check_float(ref: TensorRef) -> None:
    if ref.dtype not in FLOATS:
        raise CheckpointError(
            f"{ref.path}: tensor {ref.name}",
            "is quantized, and is not exported like this",
            expected=", ".join(FLOATS),
            found=ref.dtype,
            fix="plan with `dequantize`, apply, and export the result",
        )


def _heads(layout: Layout) -> dict[str, int]:
    """Return module → heads whose rows are put in pairs."""
    heads = layout.config["num_attention_heads"]
    return {"q_proj": heads, "k_proj": layout.config.get("num_key_value_heads") or heads}


def _rows(ref: TensorRef, heads: int | None = None) -> Rows:
    """All rows of ``ref``; with ``heads``, those of each in pairs, one row of each half."""
    columns = 1 if heads and len(ref.shape) == 1 else ref.shape[-1]
    rows = Rows(ref, 0, ref.parameters // columns, columns)
    if not heads:
        return rows
    size = rows.count // heads
    pairs = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    return replace(rows, block=size, order=tuple(pairs.tolist()))


def _of_all_experts(name: str, expert: int | None) -> str:
    """Return the name of the tensor that has this one of all experts."""
    path, _, last = name.rpartition(f".experts.{expert}.")
    module, _, suffix = last.partition(".")
    path = path.replace("block_sparse_moe", "mlp")
    return f"{path}.experts.{MIXTRAL.get(module, module)}.{suffix}"


def _copies(slot: Slot) -> Dim | None:
    """Return how gate and up lie in a tensor; None where it has not both."""
    return next((d for d in slot.dims if d and d.axis == EXPERT and d.copies == 2), None)


def _names(name: str, slot: Slot) -> list[str]:
    """Return the names of what a packed tensor holds."""
    stem, suffix = name.removesuffix("_bias"), ".bias" if name.endswith("_bias") else ".weight"
    parts = ("gate_", "up_") if _copies(slot) else ("gate_up_",)
    return [stem.replace("gate_up_", part) + suffix for part in parts]


def _packed(ref: TensorRef, name: str, slot: Slot) -> Iterator[Source]:
    """Take apart experts in one tensor: weights ``[experts, out, in]``, or with ``in`` first, or
    biases ``[experts, out]``. gate and up are halves of ``out``, or take turns in it.
    """
    transposed = len(ref.shape) == 3 and slot.dims[2 if slot.ffn_output else 1] is None
    experts, (out, *inner) = ref.shape[0], ref.shape[1:]
    if transposed:
        out, inner = inner[0], [out]
    both = _copies(slot)
    for half, new in enumerate(_names(name, slot)):
        kept = slice(0, out)
        if both is not None:
            turns = slice(half, out, 2)
            kept = turns if both.interleaved else slice(half * out // 2, (half + 1) * out // 2)
        count = len(range(*kept.indices(out)))
        parts: list[Part] = []
        for expert in range(experts):
            if transposed:
                parts.append(Columns(ref, expert * inner[0], inner[0], kept))
            elif kept.step == 2:
                columns = math.prod(inner)
                parts.append(Rows(ref, expert * out, out, columns, block=2, order=(half,)))
            else:
                parts.append(Rows(ref, expert * out + kept.start, count, math.prod(inner)))
        yield new, tuple(parts), (experts, count, *inner)


def _mxfp4(layout: Layout, ref: TensorRef, name: str, slot: Slot) -> Iterator[Source]:
    """Experts in MXFP4, ``[experts, out, groups, 16]``; gate and up take turns in ``out``."""
    scales = layout.checkpoint.tensors[ref.name.removesuffix("_blocks") + "_scales"]
    experts, out, groups, nbytes = ref.shape
    rows = Rows(ref, 0, experts * out, groups * nbytes, scales=scales)
    names = _names(name, slot)
    for half, new in enumerate(names):
        own = replace(rows, block=2, order=(half,)) if len(names) == 2 else rows
        yield new, (own,), (experts, out // len(names), groups * nbytes * 2)


def pieces(tensor: GgufTensor, shards: Mapping[Path, ShardFile]) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor in the file, some windows at a time.

    Args:
        tensor: The tensor.
        shards: The open shards, by path.

    Raises:
        CheckpointError: a shard ends early, or a value is too large for the type.
        NotFiniteError: a value that is converted is NaN or infinity.
    """
    if not tensor.parts:
        yield tensor.values
    for part in tensor.parts:
        shard, ref = shards[part.ref.path], part.ref
        if isinstance(part, Columns):
            for bits in _transposed(part, shard):
                yield _encode(bits, ref, tensor)
        elif part.scales is not None:
            groups = part.columns // 16
            of_scales = replace(part, ref=part.scales, columns=groups)
            step = _step(part)
            codes = _ordered(part, shard, step)
            for own, scale in zip(
                codes, _ordered(of_scales, shards[part.scales.path], step), strict=True
            ):
                yield _repacked(own, scale)
        else:
            for bits in _ordered(part, shard, _step(part)):
                yield _encode(bits, ref, tensor)


def _step(part: Rows) -> int:
    """Rows of a window, in whole blocks."""
    nbytes = part.columns * part.ref.itemsize * part.block
    return max(1, WINDOW_BYTES // nbytes) * part.block


def _ordered(part: Rows, shard: ShardFile, step: int) -> Iterator[np.ndarray]:
    """Yield the rows as plain bits ``[rows, columns]``; ``step`` of the source's at a time."""
    ref, buffer = part.ref, Buffer()
    width, order = part.columns * ref.itemsize, np.array(part.order, np.int64)
    for start in range(0, part.count, step):
        rows = min(step, part.count - start)
        offset = ref.start + (part.first + start) * width
        data = shard.window(offset, rows * width, buffer)
        bits = data.view(DTYPE[ref.itemsize]).reshape(-1, part.block, part.columns)
        taken = bits[:, order] if part.order else bits
        yield taken.reshape(-1, part.columns)


def _transposed(part: Columns, shard: ShardFile) -> Iterator[np.ndarray]:
    """Yield columns of one matrix as rows of plain bits; the memory holds all that are kept."""
    ref, width = part.ref, part.ref.shape[-1]
    columns = len(range(*part.kept.indices(width)))
    made, filled = np.empty((columns, part.rows), DTYPE[ref.itemsize]), 0
    rows = Rows(ref, part.first, part.rows, width)
    for bits in _ordered(rows, shard, _step(rows)):
        made[:, filled : filled + len(bits)] = bits[:, part.kept].T
        filled += len(bits)
    step = max(1, WINDOW_BYTES // (part.rows * ref.itemsize))
    for column in range(0, columns, step):
        yield made[column : column + step]


def _repacked(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return MXFP4 as GGUF has it: of each group its scale, then codes i and i + 16 in a byte.

    The checkpoint has codes 2 i and 2 i + 1 in a byte.
    """
    groups = codes.reshape(-1, 16)
    values = np.stack((groups & 15, groups >> 4), axis=2).reshape(-1, 32)
    packed = values[:, :16] | values[:, 16:] << 4
    return np.concatenate((scales.reshape(-1, 1), packed), axis=1)


def _encode(bits: np.ndarray, ref: TensorRef, tensor: GgufTensor) -> np.ndarray:
    """Return rows of plain bits of ``ref`` as the type of ``tensor``."""
    if OWN_TYPE[ref.dtype] == tensor.type and not tensor.offset:
        return bits
    values = bits.view(np.float16).astype(np.float32) if ref.dtype == "F16" else _floats(bits)
    if tensor.offset:
        values = values + np.float32(tensor.offset)
    with np.errstate(over="ignore", invalid="ignore"):
        if tensor.type == "q8_0":
            made = quantized(values)
            scales = made.reshape(-1, BLOCK["q8_0"][1])[:, :2]
            numbers = scales.copy().view(np.float16)  # NaN and infinity reach the scale
        elif tensor.type == "bf16":
            made = to_bf16(values)
            numbers = from_bf16(made)
        else:
            dtype = np.float16 if tensor.type == "f16" else np.float32
            numbers = made = values.astype(dtype, copy=False)
    if not np.isfinite(numbers).all():
        raise _not_finite(values, ref, tensor.type)
    return made


def _not_finite(values: np.ndarray, ref: TensorRef, type_: str) -> CheckpointError:
    """Return the error for ``values`` that are not finite, or not as ``type_``."""
    where = f"{ref.path}: tensor {ref.name}"
    if np.isfinite(values).all():
        return CheckpointError(
            where,
            f"has values that are too large for {type_}",
            found=f"{np.abs(values).max():g}",
            fix="choose another `type`, such as f32",
        )
    return NotFiniteError(
        where,
        "has a number that is not finite",
        expected="finite numbers",
        found=f"NaN or infinity in {ref.dtype}",
        fix=GET_AGAIN,
    )


def _floats(bits: np.ndarray) -> np.ndarray:
    return from_bf16(bits) if bits.dtype == np.uint16 else bits.view(np.float32)


def quantized(values: np.ndarray) -> np.ndarray:
    """Return rows as q8_0: of each 32 values a scale in f16, then 32 int8."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return np.asarray(quantize(values, GGMLQuantizationType.Q8_0))
