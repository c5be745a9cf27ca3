"""What is stored beside codes, checked against them and config.json before anything is planned."""

from collections.abc import Iterator, Mapping

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.opaque import (
    EXPONENTS,
    GLOBAL,
    SCALES,
    SHAPE,
    ZEROS,
    codes_of,
    grid_of,
    held_of,
    opaque_parts,
    read_array,
    steps_of,
    where_of,
)
from surgery.checkpoint.quantization import Opaque
from surgery.errors import CheckpointError
from surgery.files.safetensors_header import TensorRef
from surgery.hub.shards import Shards

WHOLE = "download config.json and the checkpoint again"


def check_part(checkpoint: Checkpoint, part: TensorRef) -> None:
    """Check the shape and dtype of what is stored beside codes against them and config.json.

    Raises:
        CheckpointError: it has other entries than config.json says, or there are no codes.
    """
    opaque, codes = checkpoint.opaque, codes_of(checkpoint, part)
    if opaque is None or (codes is None and opaque.is_of_cache(part.name)):
        return
    if codes is None:
        raise CheckpointError(where_of(part), "has no codes beside it", fix=WHOLE)
    if steps_of(checkpoint, codes):
        expected, dtypes = _expected(checkpoint, part, codes), _dtypes(part, codes)
    elif not opaque.by_rows and _is_laid_out_as_usual(opaque):
        expected, dtypes = _expected_by_columns(checkpoint, part, codes)
    else:
        return
    if _trimmed(part.shape) != _trimmed(expected) or part.dtype not in dtypes:
        strategy = held_of(checkpoint, codes).strategy
        by_config = bool(strategy) and part.name.endswith((*SCALES, ZEROS))
        says = f", as strategy {strategy} says" if by_config else ""
        raise CheckpointError(
            where_of(part),
            f"does not fit the weight {list(opaque.shape_of(codes.shape, codes.dtype))}",
            expected=f"{' or '.join(dtypes)} {list(expected)}{says}",
            found=f"{part.dtype} {list(part.shape)}",
            fix=WHOLE,
        )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` without ones at its end: a row's scales may be ``[rows]``."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _expected(checkpoint: Checkpoint, part: TensorRef, codes: TensorRef) -> tuple[int, ...]:
    """Return the shape that config.json gives a part.

    Raises:
        CheckpointError: the weight is not in whole groups.
    """
    opaque = checkpoint.opaque
    assert opaque is not None
    if part.name.endswith(SHAPE):
        return (2,)
    full, grid = opaque.shape_of(codes.shape, codes.dtype), grid_of(checkpoint, part, codes)
    if not held_of(checkpoint, codes).block and any(n and full[d] % n for d, n in enumerate(grid)):
        raise CheckpointError(
            where_of(codes),
            "is not in whole groups",
            expected=f"rows and columns in multiples of {[n or 1 for n in grid]}",
            found=list(full),
            fix="quantize it in groups that divide them",
        )
    return tuple(-(-full[d] // n) if n else 1 for d, n in enumerate(grid))


_FLOATS = ("F32", "BF16", "F16")
_BY_COLUMNS = {
    ".qzeros": ("I32",),
    ".g_idx": ("I32", "I64"),
    "_scales": EXPONENTS,
    ".scales": _FLOATS,
}
"""Endings of parts of GPTQ, AWQ and MXFP4, with their dtypes."""

_USUAL = ("", "gptq", "gptq_v2", "gemm", "GEMM")
"""Formats of GPTQ and AWQ, not of one kernel, such as Marlin's."""


def _is_laid_out_as_usual(opaque: Opaque) -> bool:
    """Whether the shapes of parts that are not stored by rows are known."""
    return opaque.variant in _USUAL and 32 % opaque.bits == 0


def _expected_by_columns(
    checkpoint: Checkpoint, part: TensorRef, codes: TensorRef
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return shape and dtypes of a part of GPTQ, AWQ or MXFP4.

    Raises:
        CheckpointError: the codes have another number of dimensions.
    """
    opaque, ending = checkpoint.opaque, next(end for end in _BY_COLUMNS if part.name.endswith(end))
    assert opaque is not None
    dims = 4 if opaque.method == "mxfp4" else 2
    if len(codes.shape) != dims or not all(codes.shape):
        raise CheckpointError(
            where_of(codes),
            "holds no codes in the shape of their format",
            expected=f"{dims} dimensions, each of at least 1",
            found=list(codes.shape),
            fix=WHOLE,
        )
    if opaque.method == "mxfp4":
        return codes.shape[:-1], _BY_COLUMNS[ending]
    rows, columns = opaque.shape_of(codes.shape, codes.dtype)
    scales = opaque_parts(checkpoint, codes).get(".scales", part)
    groups = scales.shape[0] if scales.shape else 1  # where config.json does not say
    if opaque.group:
        groups = -(-columns // opaque.group) if opaque.group > 0 else 1
    packed = opaque.values_of(codes.dtype) if ending == ".qzeros" else 1
    shape = (columns,) if ending == ".g_idx" else (groups, -(-rows // packed))
    return shape, _BY_COLUMNS[ending]


def _dtypes(part: TensorRef, codes: TensorRef) -> tuple[str, ...]:
    """Return the dtypes that a part may have."""
    if part.name.endswith(SHAPE):
        return "I64", "I32"
    if part.name.endswith(ZEROS):
        return ("I32",) if codes.dtype == "I32" else (codes.dtype,)
    if part.name.endswith("zero_point"):
        return "I8", "I32", "F32", "BF16", "F16", codes.dtype
    return (*_FLOATS, "F8_E4M3", *EXPONENTS) if part.name.endswith(SCALES) else _FLOATS


def check_codes(checkpoint: Checkpoint, codes: TensorRef) -> None:
    """Check that a weight has all its parts.

    Raises:
        CheckpointError: naming the one that is missing.
    """
    opaque = checkpoint.opaque
    if opaque is None or not codes.name.endswith((opaque.codes or opaque.weight, opaque.weight)):
        return
    base, parts = opaque.base_of(codes.name), opaque_parts(checkpoint, codes)
    for endings in _required(held_of(checkpoint, codes), codes, parts):
        if not any(ending in parts for ending in endings):
            raise CheckpointError(
                where_of(codes),
                "lacks a part of a quantized weight",
                expected=" or ".join(base + ending for ending in endings),
                fix=WHOLE,
            )


def _required(
    held: Opaque, codes: TensorRef, parts: Mapping[str, TensorRef]
) -> Iterator[tuple[str, ...]]:
    """Yield the endings of which a weight must have one, for each of its parts."""
    if not held.by_rows:
        own = {"mxfp4": ("_scales",)}.get(held.method, (".qzeros", ".scales"))
        yield from ((ending,) for ending in own)
        return
    yield tuple(ending for ending in SCALES if ending in held.beside)
    if not held.symmetric and codes.dtype in ("I32", "I8"):
        yield (ZEROS,)
    if codes.dtype == "I32":
        yield (SHAPE,)
    scales = next((parts[ending] for ending in SCALES if ending in parts), None)
    if codes.dtype == "U8" and scales is not None and scales.dtype not in EXPONENTS:
        yield tuple(ending for ending in GLOBAL if ending in held.beside)


def check_shape(checkpoint: Checkpoint, codes: TensorRef) -> None:
    """Check the numbers in a weight's ``SHAPE`` against its codes, where both are on the disk.

    Raises:
        CheckpointError: its columns are no multiple of the codes in an int32, or others.
    """
    opaque, part = checkpoint.opaque, opaque_parts(checkpoint, codes).get(SHAPE)
    if opaque is None or part is None or not part.path.exists() or part.nbytes > 16:
        return
    if len(codes.shape) != 2:
        return
    expected = opaque.shape_of(codes.shape, codes.dtype)
    found = tuple(read_array(part, Shards()).tolist())
    if found != expected:
        raise CheckpointError(
            where_of(part),
            f"has other rows and columns than whole int32 of {opaque.values_of(codes.dtype)} codes",
            expected=list(expected),
            found=list(found),
            fix="prune the unquantized checkpoint, then quantize the result",
        )
