"""A plan's replaced tensors: written whole or not at all, and checked before they are used."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from surgery.api import apply_plan
from surgery.errors import SurgeryError
from surgery.files.safetensors_header import read_header
from surgery.planning.plan import Plan
from surgery.planning.replacement import Entry, ReplacementWriter
from surgery.verify.files import verify_files
from tests.support import tiny
from tests.support.contents import bits, weights
from tests.support.plans import random_plan

NAME = "model.layers.1.mlp.down_proj.weight"
SHAPE = (32, 40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", "llama", sharded=True)


def entries(model: Path, shape: tuple[int, ...] = SHAPE) -> list[Entry]:
    dtypes = {r.name: r.dtype for f in model.glob("*.safetensors") for r in read_header(f).tensors}
    names = [NAME.replace("1", str(layer)) for layer in range(tiny.LAYERS)]
    return [(name, dtypes[name], shape) for name in names]


def values(entry: Entry, seed: int = 0) -> np.ndarray:
    size = int(np.prod(entry[2])) * {"F32": 4, "BF16": 2, "F16": 2}[entry[1]]
    return np.random.default_rng(seed).integers(0, 60, size, dtype=np.uint8)


def replaced(model: Path, file: Path, **changes: object) -> tuple[Plan, np.ndarray]:
    """A plan whose second layer's down_proj comes from ``file``."""
    plan = random_plan(model, 400, 40)
    every = entries(model)
    with ReplacementWriter(file, every) as writer:
        writer.add(NAME, values(every[1]).data)
    made = writer.replacement("test")
    assert made is not None
    made = msgspec.structs.replace(made, **changes)
    return msgspec.structs.replace(plan, replaced=made), values(every[1])


def test_the_output_has_the_file_s_bytes(model: Path, tmp_path: Path) -> None:
    plan, expected = replaced(model, tmp_path / "new.safetensors")
    plan.save(tmp_path / "plan.json")
    apply_plan(Plan.load(tmp_path / "plan.json"), source=model, output=tmp_path / "out")
    apply_plan(
        msgspec.structs.replace(plan, replaced=None), source=model, output=tmp_path / "plain"
    )
    found, plain = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert bits(found[NAME]) == expected.tobytes() != bits(plain[NAME])
    for name in found.keys() - {NAME}:
        assert bits(found[name]) == bits(plain[name])
    assert verify_files(tmp_path / "out", plan, model).ok


def test_the_place_of_the_file_is_no_part_of_what_a_plan_does(model: Path, tmp_path: Path) -> None:
    one, _ = replaced(model, tmp_path / "one.safetensors")
    other, _ = replaced(model, tmp_path / "other.safetensors")
    changed, _ = replaced(model, tmp_path / "one.safetensors", digest="0" * 64)
    assert one.digest == other.digest != changed.digest


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "checksum differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "new.safetensors"),
        (lambda path: path.write_bytes(b"no"), "new.safetensors"),
    ],
)
def test_a_file_that_changed_is_refused(
    model: Path, tmp_path: Path, harm: object, message: str
) -> None:
    plan, _ = replaced(model, tmp_path / "new.safetensors")
    harm(tmp_path / "new.safetensors")  # type: ignore[operator]
    with pytest.raises(SurgeryError, match=message):
        apply_plan(plan, source=model, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_tensors_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    plan, _ = replaced(model, tmp_path / "new.safetensors", tensors=[NAME, "other"])
    with pytest.raises(SurgeryError, match=r"does not hold the tensors.*other"):
        apply_plan(plan, source=model, output=tmp_path / "out")
    wide = entries(model, (SHAPE[0], 41))[1]
    for entry in (wide, ("model.other", *wide[1:])):
        with ReplacementWriter(tmp_path / "new.safetensors", [entry]) as writer:
            writer.add(entry[0], values(entry).data)
        plan = msgspec.structs.replace(plan, replaced=writer.replacement("test"))
        with pytest.raises(SurgeryError, match="does not fit the output"):
            apply_plan(plan, source=model, output=tmp_path / "out")


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    entry: Entry = ("a", "F32", (2,))
    writer = ReplacementWriter(tmp_path / "new.safetensors", [entry]).__enter__()
    writer.add("a", values(entry).data)
    writer.__exit__(OSError)
    with ReplacementWriter(tmp_path / "new.safetensors", [entry]) as writer:
        writer.add("a", values(entry).data)
        writer.discard()
    assert writer.replacement("test") is None
    assert not list(tmp_path.iterdir())


def test_tensors_come_in_any_order_and_not_all(tmp_path: Path) -> None:
    every: list[Entry] = [(f"tensor {n}", "F32", (n, 3)) for n in range(1, 12)]
    chosen = [every[n] for n in (9, 0, 4)]
    with ReplacementWriter(tmp_path / "new.safetensors", every) as writer:
        for seed, entry in enumerate(chosen):
            writer.add(entry[0], values(entry, seed).data)
    found = load_file(tmp_path / "new.safetensors")
    assert sorted(found) == sorted(name for name, _, _ in chosen)
    for seed, entry in enumerate(chosen):
        expected = torch.from_numpy(values(entry, seed).view(np.float32).reshape(entry[2]))
        assert torch.equal(found[entry[0]], expected)
