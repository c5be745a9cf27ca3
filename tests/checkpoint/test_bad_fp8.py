"""FP8 checkpoints that are damaged, and sizes that split blocks, are refused in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import fp8, tiny
from tests.support.command import Run, refusal
from tests.support.contents import bits, weights
from tests.support.fp8 import GATE


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, scales beside their weights; tests must not change it."""
    return fp8.save(tmp_path_factory.mktemp("qwen3") / "model")


def _set(**changes: Any) -> Callable[[Path], None]:
    return lambda path: fp8.set_config(path, **changes)


def _with(edit: fp8.Tensors | dict[str, None]) -> Callable[[Path], None]:
    return lambda path: fp8.change(path, dict(edit))


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no scales": (
        _with({GATE + fp8.SUFFIX: None}),
        (f"tensor {GATE}:", "has no scales", f"expected a tensor {GATE}_scale_inv", "download"),
    ),
    "scales of another shape": (
        _with({GATE + fp8.SUFFIX: torch.ones(6, 3)}),
        (f"{GATE}_scale_inv", "[16, 16]", "F32", "[6, 2]", "F32 [6, 3]", "weight_block_size"),
    ),
    "scales of another dtype": (
        _with({GATE + fp8.SUFFIX: torch.ones(6, 2, dtype=torch.int32)}),
        (f"{GATE}_scale_inv", "expected F32 or BF16", "found I32 [6, 2]"),
    ),
    "scales without a weight": (
        _with({"model.layers.1.mlp.no.weight" + fp8.SUFFIX: torch.ones(6, 2)}),
        ("mlp.no.weight_scale_inv", "without their weight", "F8_E4M3", "found none"),
    ),
    "scales of a weight that is not FP8": (
        _with({GATE: torch.ones(96, 32, dtype=torch.bfloat16)}),
        (f"{GATE}_scale_inv", "without their weight", "F8_E4M3", "found BF16"),
    ),
    "no quantization_config": (
        _set(quantization_config=None),
        ("_scale_inv", "config.json has no quantization_config", "download"),
    ),
    "another kind of FP8": (
        _set(quantization_config={**fp8.section(), "fmt": "e5m2"}),
        ("without their weight", "F8_E5M2", "found F8_E4M3"),
    ),
    "FP8 of three dimensions": (
        _with({GATE: torch.ones(1, 96, 32).to(torch.float8_e4m3fn)}),
        (f"tensor {GATE}:", "no matrix", "found [1, 96, 32]", "unquantized"),
    ),
    "another block size": (
        _set(quantization_config=fp8.section(32)),
        ("_scale_inv", "block of [32, 32]", "weight_block_size"),
    ),
    "another method": (
        _set(quantization_config={"quant_method": "hqq", "bits": 4}),
        ("config.json", "quant_method hqq", "prune the unquantized"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line(
    qwen3: Path, tmp_path: Path, run: Run, case: str
) -> None:
    break_it, words = BROKEN[case]
    path = Path(shutil.copytree(qwen3, tmp_path / "model"))
    break_it(path)
    message = refusal(run, "inspect", path)
    for word in words:
        assert word in message


def test_fp8_without_any_scales_or_config(tmp_path: Path, run: Run) -> None:
    path = tiny.save(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    fp8.change(path, {GATE: torch.ones(96, 32).to(torch.float8_e4m3fn)})
    message = refusal(run, "inspect", path)
    for word in (GATE, "quantization_config", "expected BF16 or F16 or F32,", "found F8_E4M3"):
        assert word in message


@pytest.mark.parametrize("size", [95, 40, 8])
def test_a_size_that_splits_blocks_names_size_block_and_the_way_out(
    qwen3: Path, tmp_path: Path, run: Run, size: int
) -> None:
    sizes = ("--vocab-size", 512, "--intermediate-size", size, "-o", tmp_path / "plan.json")
    message = refusal(run, "plan", qwen3, *sizes)
    for word in ("intermediate_size", str(size), "blocks of 16", "multiples of 16", "--dequantize"):
        assert word in message
    assert run("plan", qwen3, *sizes, "--dequantize").exit_code == 0


def test_a_model_whose_channels_are_no_whole_blocks(tmp_path: Path, run: Run) -> None:
    path = fp8.save(tmp_path / "model", intermediate_size=88)
    plan = tmp_path / "plan.json"
    sizes = ("--vocab-size", 512, "--intermediate-size", 64, "-o", plan)
    assert "found 88 and 64" in refusal(run, "plan", path, *sizes)
    whole = ("--vocab-size", 512, "--intermediate-size", 88, "-o", plan)
    assert run("plan", path, *whole).exit_code == 0
    assert run("apply", plan, "-o", tmp_path / "out").exit_code == 0
    assert bits(weights(tmp_path / "out")[GATE]) == bits(weights(path)[GATE])
    assert run("plan", path, *sizes, "--dequantize", "--force").exit_code == 0


def test_nothing_to_dequantize(llama: Path, tmp_path: Path, run: Run) -> None:
    message = refusal(run, "plan", llama, "--dequantize", "-o", tmp_path / "plan.json")
    assert "--dequantize" in message
    assert "not quantized" in message
