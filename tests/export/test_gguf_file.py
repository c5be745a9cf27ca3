"""GGUF files hold every value of the checkpoint, and appear whole or not at all."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import surgery
from surgery.errors import CheckpointError
from surgery.export.architectures import ARCHITECTURES
from tests.support import gguf_models, quantized, tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import bits, weights
from tests.support.gguf_files import read_gguf
from tests.support.plans import random_plan

READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "phi3")


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    shape = [int(size) for size in reversed(tensor.shape)]
    return np.asarray(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


@pytest.mark.parametrize("key", gguf_models.CHANGES)
def test_every_value_is_in_the_file(tmp_path: Path, key: str) -> None:
    source, file = gguf_models.save(tmp_path / "model", key), tmp_path / "model.gguf"
    made = surgery.export_gguf(source, file, pre="gpt-2")
    wanted = gguf_models.expected(key, weights(source))
    if ARCHITECTURES[key].own_head and "output.weight" not in wanted:
        wanted["output.weight"] = wanted["token_embd.weight"]
    keys, found = read_gguf(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(torch.from_numpy(values_of(found[name]).copy()), tensor), name
    assert (made.type, made.pre, made.nbytes) == ("f32", "gpt-2", file.stat().st_size)
    assert keys["general.architecture"] == ARCHITECTURES[key].name


@pytest.mark.parametrize("key", READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, key: str) -> None:
    source = gguf_models.save(tmp_path / "model", key)
    surgery.export_gguf(source, tmp_path / "own.gguf", pre="gpt-2")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="own.gguf", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            read.eval()(ids).logits, tiny.load(source, key)(ids).logits, atol=2e-4, rtol=1e-3
        )


def test_a_pruned_model_equals_its_checkpoint(tmp_path: Path) -> None:
    source, out = gguf_models.save(tmp_path / "model", "llama", sharded=True), tmp_path / "out"
    surgery.apply_plan(random_plan(source, 512, 64, layers=[[0], [2]]), source=source, output=out)
    surgery.export_gguf(out, tmp_path / "out.gguf", pre="gpt-2")
    keys, found = read_gguf(tmp_path / "out.gguf")
    for name, tensor in gguf_models.expected("llama", weights(out)).items():
        assert np.array_equal(values_of(found[name]), tensor.numpy()), name
    assert (keys["llama.block_count"], keys["llama.vocab_size"]) == (2, 512)
    assert keys["llama.feed_forward_length"] == 64
    assert len(keys["tokenizer.ggml.tokens"]) == 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", None])
def test_types(tmp_path: Path, dtype: torch.dtype, type_: str | None) -> None:
    source, file = tiny.save(tmp_path / "model", dtype=dtype), tmp_path / "model.gguf"
    made = surgery.export_gguf(source, file, pre="gpt-2", type=type_)
    own = "bf16" if dtype == torch.bfloat16 else "f16"
    assert made.type == (type_ or own)
    _, found = read_gguf(file)
    for name, tensor in gguf_models.expected("llama", weights(source)).items():
        kind, values = found[name].tensor_type, values_of(found[name])
        if tensor.ndim == 1:
            assert kind == gguf.GGMLQuantizationType.F32
        else:
            assert kind == gguf.GGMLQuantizationType[made.type.upper()]
        wanted = tensor.numpy()
        if made.type == "q8_0" and tensor.ndim > 1:
            blocks = wanted.reshape(-1, 32)
            error = np.abs(values.reshape(-1, 32) - blocks).max(axis=1)
            assert (error <= np.abs(blocks).max(axis=1) / 127).all()
        elif made.type in ("f32", own) or tensor.ndim == 1:
            assert np.array_equal(values, wanted)
        else:
            np.testing.assert_allclose(values, wanted, rtol=2**-8, atol=2**-24)


def test_rows_that_are_no_multiple_of_32_stay_f16(tmp_path: Path) -> None:
    source, out = tiny.save(tmp_path / "model"), tmp_path / "out"
    surgery.apply_plan(random_plan(source, 640, 72), source=source, output=out)
    made = surgery.export_gguf(out, tmp_path / "out.gguf", pre="gpt-2", type="q8_0")
    assert made.tensors == {"q8_0": 20, "f32": 7, "f16": 3}
    assert made.notes == (
        "3 matrices are f16, for their rows are no multiple of 32: blk.0.ffn_down.weight has rows "
        "of 72",
    )


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


def with_value(folder: Path, name: str, value: float) -> Path:
    """A model in bf16 with one other number in the tensor ``name``."""
    source = tiny.save(folder / "model", dtype=torch.bfloat16)
    tensors = weights(source)
    tensors[name].view(-1)[7] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize(("type_", "value"), [("f16", 1e6), ("q8_0", 9e6)])
def test_a_value_too_large_for_a_type_is_refused(tmp_path: Path, type_: str, value: float) -> None:
    source, file = with_value(tmp_path, UP, value), tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"up_proj.weight: has values that are too large"):
        surgery.export_gguf(source, file, pre="gpt-2", type=type_)
    assert sorted(tmp_path.iterdir()) == [source]  # nothing is left of the file


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("type_", "name"),
    [("f32", UP), ("f16", UP), ("q8_0", UP), ("bf16", NORM)],  # a norm becomes f32 in any file
)
def test_nan_and_infinity_are_refused_where_values_are_converted(
    tmp_path: Path, run: Run, type_: str, name: str, value: float
) -> None:
    source, file = with_value(tmp_path, name, value), tmp_path / "model.gguf"
    refused = run("export", source, "-o", file, "--pre", "gpt-2", "--type", type_)
    words = (f"model.safetensors: tensor {name}", "has a number that is not finite")
    assert_refused(refused, *words, "found NaN or infinity in BF16; download the file again")
    assert sorted(tmp_path.iterdir()) == [source]


def test_numbers_of_the_same_type_are_copied_as_they_are(tmp_path: Path, run: Run) -> None:
    source, file = with_value(tmp_path, UP, math.nan), tmp_path / "model.gguf"
    made = run("export", source, "-o", file, "--pre", "gpt-2", "--type", "bf16")
    assert made.exit_code == 0, made.output
    written = read_gguf(file)[1]["blk.1.ffn_up.weight"].data
    assert written.tobytes() == bits(weights(source)[UP])


KILLED = """
import os, signal, sys
import surgery

def progress(stage: str, done: int, total: int) -> None:
    if stage == "export" and 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)

surgery.export_gguf(sys.argv[1], sys.argv[2], pre="gpt-2", progress=progress)
"""


def test_a_killed_export_leaves_no_file_and_the_next_one_cleans_up(
    tmp_path: Path, llama: Path, run: Run
) -> None:
    file, whole = tmp_path / "model.gguf", tmp_path / "whole.gguf"
    killed = subprocess.run([sys.executable, "-c", KILLED, llama, file], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not file.exists()
    (begun,) = tmp_path.iterdir()
    assert begun.stat().st_size > 0
    assert run("export", llama, "-o", file, "--pre", "gpt-2").exit_code == 0
    assert not begun.exists()
    surgery.export_gguf(llama, whole, pre="gpt-2")
    assert file.read_bytes() == whole.read_bytes()


def test_mxfp4_stays_as_it_is(tmp_path: Path) -> None:
    source = quantized.save_mxfp4(tmp_path / "model")
    made = surgery.export_gguf(source, tmp_path / "model.gguf", pre="gpt-2")
    assert made.tensors["mxfp4"] == 3 * tiny.LAYERS
    stored, (_, found) = weights(source), read_gguf(tmp_path / "model.gguf")
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}.mlp.experts."
        for module, outputs in (
            ("gate_up_proj", {"gate": slice(0, None, 2), "up": slice(1, None, 2)}),
            ("down_proj", {"down": slice(None)}),
        ):
            parts = (stored[f"{at}{module}_{name}"] for name in ("blocks", "scales"))
            # transformers has [experts, in, out]
            dense = convert_moe_packed_tensors(*parts, dtype=torch.float32).transpose(1, 2)
            for name, rows in outputs.items():
                own = values_of(found[f"blk.{layer}.ffn_{name}_exps.weight"])
                assert np.array_equal(own, dense[:, rows].numpy())


def test_the_command(tmp_path: Path, llama: Path, run: Run) -> None:
    file = tmp_path / "model.gguf"
    assert_refused(run("export", llama, "-o", file), "tokenizer.json", "--pre", "llama-bpe")
    done = run("export", llama, "-o", file, "--pre", "gpt-2", "--type", "bf16")
    assert done.exit_code == 0, done.output
    assert f"wrote {file}: " in done.output
    assert "23 in bf16, 7 in f32; pre-tokenizer gpt-2" in done.output
    assert_refused(run("export", llama, "-o", file, "--pre", "gpt-2"), "is there already")
    again = run("export", llama, "-o", file, "--pre", "gpt-2", "--force", "--json")
    facts = json.loads(again.output)
    assert (facts["output"], facts["type"]) == (str(file), "f32")
    assert facts["nbytes"] == file.stat().st_size


def test_refusals(tmp_path: Path, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    named = run("export", llama, "-o", file, "--pre", "smolm")
    assert_refused(named, "--pre", "did you mean smollm", "llama-bpe")
    assert "did you mean" not in run("export", llama, "-o", file, "--pre", "nonsense").output
    for kind in ("q4_k", "Q4_K_M", "Q4_0", "iq4_xs"):
        makes = run("export", llama, "-o", file, "--type", kind)
        assert_refused(makes, "--type", f"llama-quantize {file} OTHER.gguf {kind.upper()}")
    eight = run("export", llama, "-o", file, "--type", "int8", "--pre", "gpt-2")
    assert_refused(eight, "--type", "f32, f16, bf16, q8_0", "'int8'")
    inside = run("export", llama, "-o", llama / "model.gguf", "--pre", "gpt-2")
    assert_refused(inside, "is inside a directory that is only read")
    other = tiny.save(tmp_path / "phi", "phi")
    named = run("export", other, "-o", file, "--pre", "gpt-2")
    assert_refused(named, "found phi", "convert_hf_to_gguf.py", "'gpt-2'")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    no_space = run("export", llama, "-o", file, "--pre", "gpt-2")
    assert_refused(no_space, "no space", "1,000 free")
    assert "--resume" not in no_space.output
    monkeypatch.setitem(sys.modules, "gguf", None)
    needs = run("export", llama, "-o", file, "--pre", "gpt-2")
    assert_refused(needs, "needs the package gguf", "compact-surgery[gguf]")
    assert not file.exists()
