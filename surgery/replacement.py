"""Tensors of an output that come from a file of their own, not from the source."""

from pathlib import Path

import msgspec

from surgery.errors import PlanError
from surgery.header import TensorRef, read_header
from surgery.selection import MAKE_AGAIN


class Replacement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file whose tensors take the place of the source's."""

    what: str
    """How they were made."""
    file: str
    """Its absolute path."""
    digest: str
    """SHA-256 of the file."""
    tensors: list[str]
    """Names in the output."""

    def refs(self) -> dict[str, TensorRef]:
        """Name in the output → where it lies.

        Raises:
            PlanError: the file has other tensors.
            CheckpointError: it is gone or no safetensors file.
        """
        found = {ref.name: ref for ref in read_header(Path(self.file)).tensors}
        if sorted(found) != sorted(self.tensors):
            other = sorted({*found} ^ {*self.tensors})
            raise PlanError(
                self.file,
                "does not hold the tensors that the plan replaces",
                expected=f"{len(self.tensors)} tensors",
                found=f"{len(found)}, differing in {other[0] if other else 'number'}",
                fix=MAKE_AGAIN,
            )
        return found


def check_replaced(ref: TensorRef, dtype: str | None, shape: tuple[int, ...] | None) -> None:
    """Refuse a tensor that the output has in another ``dtype`` or ``shape``, or not at all (None).

    Raises:
        PlanError: naming the tensor.
    """
    if (ref.dtype, ref.shape) != (dtype, shape):
        raise PlanError(
            f"{ref.path}: {ref.name}",
            "does not fit the output",
            expected=(dtype, shape) if dtype else "a tensor of the output",
            found=(ref.dtype, ref.shape),
            fix=MAKE_AGAIN,
        )
