"""A pruned model equals the dense one with those channels zeroed and those logits dropped."""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.api import apply_plan
from surgery.apply.edits import kept_parts
from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import bits, weights
from tests.support.plans import assert_equals_masked_dense, layout_of, random_plan


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    vocab_size=st.integers(280, tiny.VOCAB_SIZE),
    intermediate_size=st.integers(1, tiny.INTERMEDIATE_SIZE),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_and_channels_equal_masked_dense(
    llama: Path, tmp_path: Path, vocab_size: int, intermediate_size: int, seed: int
) -> None:
    plan = random_plan(llama, vocab_size, intermediate_size, seed)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    apply_plan(plan, source=llama, output=tmp_path / "out")
    assert_equals_masked_dense(llama, tmp_path / "out", plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_kept_values_are_bit_identical(tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    source = tiny.save(tmp_path / "source", dtype=dtype, sharded=sharded, mlp_bias=True)
    plan = random_plan(source, 384, 32)
    apply_plan(plan, source=source, output=tmp_path / "out", jobs=2)
    old, new = weights(source), weights(tmp_path / "out")
    rows = plan.ids().kept
    kept = [part.channels for part in kept_parts(plan, layout_of(source))]
    assert list(old) == list(new)
    for name, tensor in old.items():
        channels = kept[int(name.split(".")[2]) if "layers" in name else 0]["ffn"][0]
        if "embed_tokens" in name or "lm_head" in name:
            tensor = tensor[rows]
        elif "gate_proj" in name or "up_proj" in name:
            tensor = tensor[channels]
        elif "down_proj.weight" in name:
            tensor = tensor[:, channels]
        assert new[name].dtype == tensor.dtype == dtype
        assert new[name].shape == tensor.shape
        assert bits(new[name]) == bits(tensor), name


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_keeping_everything_reproduces_every_byte(tmp_path: Path, run: Run, sharded: bool) -> None:
    source = tiny.save(tmp_path / "source", dtype=torch.bfloat16, sharded=sharded)
    sizes = ("--vocab-size", tiny.VOCAB_SIZE, "--intermediate-size", tiny.INTERMEDIATE_SIZE)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", source, *sizes, "-o", plan).exit_code == 0
    assert run("apply", plan, "-o", out).exit_code == 0
    old, new = weights(source), weights(out)
    assert {name: bits(tensor) for name, tensor in old.items()} == {
        name: bits(tensor) for name, tensor in new.items()
    }
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_output_loads_without_a_warning_and_generates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    source = tiny.save(tmp_path / "source", model_type, tied=True, special_first=False)
    out = tmp_path / "out"
    apply_plan(random_plan(source, 400, 48), source=source, output=out)
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(out)
        inputs = tokenizer("The state of the union is", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not caplog.records, caplog.text
    assert not any(info.values()), info
    assert len(tokenizer) <= model.config.vocab_size == 400
    assert int(ids.max()) < 400
    assert tokenizer.decode(ids[0])
    for config in (model.config, model.generation_config):
        assert tokenizer.convert_ids_to_tokens(config.bos_token_id) == "<s>"
        assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == "</s>"
        assert tokenizer.convert_ids_to_tokens(config.pad_token_id) == "<pad>"


def test_same_plan_gives_the_same_bytes(tmp_path: Path, llama: Path) -> None:
    plan = random_plan(llama, 512, 64)
    for name in ("one", "two"):
        apply_plan(plan, source=llama, output=tmp_path / name, jobs=2)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
