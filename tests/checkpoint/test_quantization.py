"""What is quantized is read where it has FP8 block scales, and refused by name elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from surgery.checkpoint.quantization import ADVICE, Fp8, opaque_of, quantization_of
from surgery.errors import CheckpointError

CONFIG = Path("model") / "config.json"
DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""As published; Qwen3's FP8 checkpoints have the same."""
PRUNE = "prune the unquantized checkpoint that it was made from, then quantize the result"


def found(section: Any, **config: Any) -> Fp8 | None:
    return quantization_of({"quantization_config": section, **config}, CONFIG)


def refusal(section: Any, **config: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        found(section, **config)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": None}],
)
def test_unquantized(config: dict[str, Any]) -> None:
    assert quantization_of(config, CONFIG) is None


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"scale_fmt": "ue8m0"},  # DeepSeek-V3.1: the scales are powers of two
        {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
        {"ignored_layers": ["lm_head"], "dequantize": False},
        {"modules_to_convert": [], "expert_dtype": "fp8"},
    ],
)
def test_block_fp8(extra: dict[str, Any]) -> None:
    fp8 = found({**DEEPSEEK_V3, **extra})
    assert fp8 == Fp8((128, 128), "F8_E4M3")
    assert fp8.scales_of("model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight_scale_inv"
    )


def test_block_fp8_in_other_shapes_and_formats() -> None:
    assert found({"quant_method": "fp8", "weight_block_size": [64, 32]}) == Fp8((64, 32), "F8_E4M3")
    assert found({**DEEPSEEK_V3, "fmt": "e5m2"}) == Fp8((128, 128), "F8_E5M2")


def test_text_config_counts_where_the_top_says_nothing() -> None:
    inner = {"text_config": {"quantization_config": DEEPSEEK_V3}}
    assert quantization_of(inner, CONFIG) == Fp8((128, 128), "F8_E4M3")
    assert "quant_method gptq" in refusal({"quant_method": "gptq"}, **inner)


OTHERS = [method.value for method in QuantizationMethod if method != QuantizationMethod.FP8]


@pytest.mark.parametrize("method", [*OTHERS, "exl3", "modelopt", "no_such_method"])
def test_every_other_method_is_refused_by_name(method: str) -> None:
    message = refusal({"quant_method": method, "bits": 4})
    assert message.startswith(f"{CONFIG}: checkpoint is quantized: expected bf16, fp16 or fp32")
    assert f"found quant_method {method}; " in message
    assert message.endswith(f"; {ADVICE.get(method, PRUNE)}")


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("gptq", PRUNE),
        ("awq", PRUNE),
        (
            "mxfp4",
            "dequantize it once with transformers: AutoModelForCausalLM.from_pretrained(dir, "
            "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(new_dir, "
            "save_original_format=False), and copy the tokenizer's files",
        ),
        (
            "compressed-tensors",
            f"{PRUNE}, or dequantize it once with transformers: AutoModelForCausalLM"
            ".from_pretrained(dir, quantization_config=CompressedTensorsConfig(dequantize=True))"
            ".save_pretrained(new_dir, save_original_format=False), and copy the tokenizer's files",
        ),
        (
            "bitsandbytes",
            f"{PRUNE}, or dequantize it once with transformers: AutoModelForCausalLM"
            ".from_pretrained(dir).dequantize().save_pretrained(new_dir, "
            "save_original_format=False), and copy the tokenizer's files",
        ),
    ],
)
def test_advice(method: str, advice: str) -> None:
    assert refusal({"quant_method": method}).endswith(f"; {advice}")


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"load_in_4bit": True}, "quant_method bitsandbytes"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        ({"group_size": 64, "bits": 4}, "quant_method mlx"),
        ({"group_size": 64}, "quant_method unknown"),
        ({"quant_method": ["fp8"]}, "quant_method ['fp8']"),
        ("gptq", "quantization_config 'gptq'"),
    ],
)
def test_methods_that_are_not_spelled_out(section: Any, name: str) -> None:
    assert f"found {name}; " in refusal(section)


@pytest.mark.parametrize(
    ("change", "name", "advice"),
    [
        ({"fmt": "e3m4"}, "with fmt e3m4", PRUNE),
        ({"fmt": ["e4m3"]}, "with fmt ['e4m3']", PRUNE),
        ({"expert_dtype": "fp4"}, "with expert_dtype fp4", "FineGrainedFP8Config("),
    ],
)
def test_fp8_that_is_not_block_fp8(change: dict[str, Any], name: str, advice: str) -> None:
    message = refusal({**DEEPSEEK_V3, **change})
    assert f"found quant_method fp8 {name}; " in message
    assert advice in message


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"modules_to_convert": ["embed"]},
    ],
)
def test_fp8_with_other_scales_is_made_of_codes_and_parts(change: dict[str, Any]) -> None:
    section = {**DEEPSEEK_V3, **change}
    opaque = opaque_of({"quantization_config": section})
    assert opaque is not None
    assert (opaque.method, opaque.block) == ("fp8", section["weight_block_size"] and (128, 128))


def test_fp4_experts_named_at_the_top() -> None:
    message = refusal(DEEPSEEK_V3, expert_dtype="fp4")
    assert "found quant_method fp8 with expert_dtype fp4; " in message


def test_modelopt_files_beside_config_json_are_no_unquantized_model(tmp_path: Path) -> None:
    where, beside = tmp_path / "config.json", tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    with pytest.raises(CheckpointError) as error:
        quantization_of({}, where)
    message = str(error.value)
    assert message.startswith(f"{beside}: checkpoint is quantized")
    assert "found quant_algo NVFP4 of ModelOpt" in message
    assert "export it again" in message
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert opaque_of({"quantization_config": section}) is not None
    beside.write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "FP8"}}))
    assert quantization_of({}, where) is None


@pytest.mark.parametrize("size", [[], [128], [128, 128, 1], [0, 128], [128, -1], [1.5, 2], 128, ""])
def test_block_size_that_is_no_shape(size: Any) -> None:
    message = refusal({**DEEPSEEK_V3, "weight_block_size": size})
    assert "weight_block_size is not a shape" in message
    assert "expected two numbers from 1 to 65536, found" in message


def test_the_advice_for_mxfp4_gives_a_checkpoint_that_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        dtype="bfloat16",
    )
    source, target = tmp_path / "source", tmp_path / "target"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    names = _pack_experts(source)
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=Mxfp4Config(dequantize=True)
    ).save_pretrained(target, save_original_format=False)
    assert quantization_of(json.loads((target / "config.json").read_text()), CONFIG) is None
    tensors = load_file(target / "model.safetensors")
    assert names <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _pack_experts(directory: Path) -> set[str]:
    """Store the experts in MXFP4, as gpt-oss is published, and return their names without it."""
    shard = directory / "model.safetensors"
    tensors = load_file(shard)
    names = {
        name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }
    for name in names:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(groups, 120, dtype=torch.uint8)
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    return names
