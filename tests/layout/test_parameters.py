"""Every parameter that transformers counts is counted, and nothing else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.api import make_plan, open_model
from surgery.families.blocks import BUFFER
from surgery.families.table import FAMILIES
from tests.support import tiny
from tests.support.sample import sampled
from tests.support.tiny_configs import TINY


def counted_by_transformers(path: Path, key: str) -> int:
    return int(tiny.auto_class(key).from_pretrained(path).num_parameters())


@pytest.mark.parametrize("key", sampled(TINY))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_those_of_transformers(tmp_path: Path, key: str, tied: bool) -> None:
    source = tiny.save(tmp_path / "source", key, tied=tied)
    census = open_model(source).census()
    assert census.parameters == counted_by_transformers(source, key)
    assert census.parameters == sum(census.groups.values())


def stored_buffers(key: str) -> list[str]:
    """Names of the buffers that old files of the family have in a layer."""
    family = FAMILIES[key.partition(":")[0]]
    slots = getattr(family, "slots", ())
    return [slot.name for slot in slots if slot.block == BUFFER]


def add(path: Path, names: list[str], shape: tuple[int, ...]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors |= {name: torch.ones(shape) for name in names}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", [key for key in sampled(TINY) if stored_buffers(key)])
def test_stored_buffers_change_no_count_and_no_size(tmp_path: Path, key: str) -> None:
    source = tiny.save(tmp_path / "source", key)
    before, bare = open_model(source).census(), make_plan(source, ratio=0.2, multiple_of=1)
    names = [name.format(layer=n) for name in stored_buffers(key) for n in range(tiny.LAYERS)]
    add(source, names, (1, 1, 512, 512))
    after = open_model(source).census()
    assert after.parameters == before.parameters == counted_by_transformers(source, key)
    assert after.groups == before.groups
    assert after.nbytes > before.nbytes
    plan = make_plan(source, ratio=0.2, multiple_of=1)
    assert (plan.after.vocab_size, plan.after.widths) == (bare.after.vocab_size, bare.after.widths)
    assert plan.after.parameters == bare.after.parameters


def test_buffers_of_an_image_encoder_are_not_counted(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "gemma3")
    before = open_model(source).census().parameters
    add(source, ["vision_tower.vision_model.embeddings.position_ids"], (1, 16))
    assert open_model(source).census().parameters == before
