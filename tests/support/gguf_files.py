"""Small GGUF files and tensors as their reader returns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


def make_reader_tensor(name: str, values: NDArray[np.float32]) -> gguf.ReaderTensor:
    """Wrap an array as the GGUF reader would return it, unquantized."""
    kind = gguf.GGMLQuantizationType.F32
    shape = np.array(values.shape[::-1], dtype=np.uint32)
    field = gguf.ReaderField(0, name)
    return gguf.ReaderTensor(name, kind, shape, values.size, values.nbytes, 0, values, field)


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, NDArray[np.float32]],
) -> Path:
    """Write a small unquantized GGUF and return its path."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Return the values and the tensors of a GGUF file, by key and by name."""
    reader = gguf.GGUFReader(path)
    return {k: field.contents() for k, field in reader.fields.items()}, {
        tensor.name: tensor for tensor in reader.tensors
    }
