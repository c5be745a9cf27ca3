"""Rows of a GGUF file that are columns of the checkpoint: the right bits in little memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.export.tensors import Columns, GgufTensor, pieces
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import ShardFile

MB = 1 << 20


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_columns_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Of any matrix of a tensor, halves and turns, whatever the window."""
    shape = tuple(data.draw(st.integers(2, 9)) for _ in range(3))
    matrix, half = data.draw(st.integers(0, shape[0] - 1)), shape[2] // 2
    kept = data.draw(
        st.sampled_from(
            [slice(0, half), slice(half, shape[2]), slice(0, None, 2), slice(1, None, 2)]
        )
    )
    values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = tmp_path_factory.mktemp("shard") / "shard"
    path.write_bytes(b"odd" + values.tobytes())
    part = Columns(TensorRef("t", path, "BF16", shape, 3), matrix * shape[1], shape[1], kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.export.tensors.WINDOW_BYTES", data.draw(st.integers(1, 64)))
        assert np.array_equal(np.concatenate(exported(part)), values[matrix][:, kept].T)


@pytest.mark.parametrize("kept", [slice(0, 2048), slice(1, 4096, 2)])
def test_memory_for_columns_is_what_is_kept_of_one_matrix(tmp_path: Path, kept: slice) -> None:
    values, path = np.zeros((2, 2048, 4096), np.uint16), tmp_path / "shard"
    path.write_bytes(values.data)
    part = Columns(TensorRef("t", path, "BF16", values.shape, 0), 2048, 2048, kept)
    tracemalloc.start()
    with ShardFile(path) as shard:
        for _ in pieces(GgufTensor("t", "bf16", (2048, 2048), (part,)), {path: shard}):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (8 + 3) * MB


def exported(part: Columns) -> list[np.ndarray]:
    """Return the pieces of a tensor of one part, as they are."""
    tensor = GgufTensor("t", "bf16", (part.rows,), (part,))
    with ShardFile(part.ref.path) as shard:
        return [piece.copy() for piece in pieces(tensor, {part.ref.path: shard})]
