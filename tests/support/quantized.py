"""Tiny models in quantized formats, with generated codes: as published, but small."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from tests.support import tiny

Tensors = dict[str, torch.Tensor]
GROUP = 16

SECTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": GROUP, "symmetric": True}}
        },
        "ignore": ["lm_head", "re:.*self_attn.*"],
    },
    "int4 with zeros": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": GROUP, "symmetric": False}}
        },
    },
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
    },
    "mxfp4 packed": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    "block": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "block",
                    "block_structure": [GROUP, GROUP],
                }
            }
        },
    },
    "nvfp4": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "channel": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "tensor": {"quant_method": "fp8", "activation_scheme": "static"},
}
"""Name → quantization_config; ``block``, ``channel`` and ``tensor`` are FP8 with such scales."""


def save(path: Path, kind: str, key: str = "qwen3_moe", **changes: Any) -> Path:
    """Save a tiny model whose experts, or linear maps, have generated codes of a format."""
    tiny.save(path, key, dtype=torch.bfloat16, **changes)
    generator = torch.Generator().manual_seed(3)
    file = path / "model.safetensors"
    tensors: Tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith(".weight") and (".experts." in name or (key in DENSE and "_proj" in name)):
            tensors |= codes(name.removesuffix(".weight"), tensor.shape, kind, generator)
        else:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
    set_section(path, SECTIONS[kind])
    return path


def set_section(path: Path, section: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = section
    (path / "config.json").write_text(json.dumps(config))


def codes(at: str, shape: torch.Size, kind: str, generator: torch.Generator) -> Tensors:
    rows, columns = shape
    groups = columns // GROUP

    def numbers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        top = 256 if dtype == torch.uint8 else 2**31 - 1
        return torch.randint(0, top, size, generator=generator).to(dtype)

    def scales(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.rand(size, generator=generator) * 0.02 + 0.01).to(dtype)

    fp8 = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    one = scales(1, dtype=torch.float32)
    return {
        "gptq": lambda: {
            f"{at}.qweight": numbers(columns // 8, rows),
            f"{at}.qzeros": numbers(groups, rows // 8),
            f"{at}.scales": scales(groups, rows, dtype=torch.float16),
            f"{at}.g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
        },
        "awq": lambda: {
            f"{at}.qweight": numbers(columns, rows // 8),
            f"{at}.qzeros": numbers(groups, rows // 8),
            f"{at}.scales": scales(groups, rows, dtype=torch.float16),
        },
        "int4": lambda: {
            f"{at}.weight_packed": numbers(rows, columns // 8),
            f"{at}.weight_scale": scales(rows, groups),
            f"{at}.weight_shape": torch.tensor([rows, columns]),
        },
        "int4 with zeros": lambda: {
            f"{at}.weight_packed": numbers(rows, columns // 8),
            f"{at}.weight_scale": scales(rows, groups),
            f"{at}.weight_zero_point": numbers(rows // 8, groups),
            f"{at}.weight_shape": torch.tensor([rows, columns]),
        },
        "int8": lambda: {
            f"{at}.weight": (numbers(rows, columns, dtype=torch.uint8) - 128).to(torch.int8),
            f"{at}.weight_scale": scales(rows, 1) / 100,
        },
        "mxfp4 packed": lambda: {
            f"{at}.weight_packed": numbers(rows, columns // 2, dtype=torch.uint8),
            f"{at}.weight_scale": 120 + numbers(rows, columns // 32, dtype=torch.uint8) % 5,
        },
        "block": lambda: {
            f"{at}.weight": fp8,
            f"{at}.weight_scale": scales(-(-rows // GROUP), groups),
        },
        "nvfp4": lambda: {
            f"{at}.weight_packed": numbers(rows, columns // 2, dtype=torch.uint8),
            f"{at}.weight_scale": scales(rows, groups).to(torch.float8_e4m3fn),
            f"{at}.weight_global_scale": 1 / one,
            f"{at}.input_global_scale": 2 / one,
        },
        "modelopt": lambda: {
            f"{at}.weight": numbers(rows, columns // 2, dtype=torch.uint8),
            f"{at}.weight_scale": scales(rows, groups).to(torch.float8_e4m3fn),
            f"{at}.weight_scale_2": one[0].clone(),
            f"{at}.input_scale": one[0] * 2,
        },
        "channel": lambda: {f"{at}.weight": fp8, f"{at}.weight_scale": scales(rows, 1)},
        "tensor": lambda: {
            f"{at}.weight": fp8,
            f"{at}.weight_scale": one,
            f"{at}.input_scale": one * 2,
        },
    }[kind]()


def save_mxfp4(path: Path, **changes: Any) -> Path:
    """Save a tiny gpt-oss as published: experts in MXFP4, packed."""
    tiny.save(path, "gpt_oss", dtype=torch.bfloat16, **{"intermediate_size": 64, **changes})
    generator = torch.Generator().manual_seed(3)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*groups, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            120, 125, groups, dtype=torch.uint8, generator=generator
        )
    save_file(tensors, file, {"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    set_section(path, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return path


DENSE = ("llama", "phi3")
"""Model types without experts, of which all linear maps of the layers are quantized."""

PARTS = (
    *("qzeros", "scales", "g_idx", "weight_scale", "weight_zero_point", "weight_shape"),
    *("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale"),
)
"""Last names of what is stored beside codes."""


def plain(path: Path, output: Path) -> Path:
    """Save what ``path`` means as an unquantized checkpoint in float32, decoded code by code."""
    shutil.copytree(path, output)
    config = json.loads((output / "config.json").read_text())
    section = config.pop("quantization_config")
    (output / "config.json").write_text(json.dumps(config))
    file = output / "model.safetensors"
    tensors, found = load_file(file), {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            weight = convert_moe_packed_tensors(tensor, scales, dtype=torch.float32)
            found[name.removesuffix("_blocks")] = weight.contiguous()
        elif part in ("qweight", "weight_packed") or (part == "weight" and tensor.itemsize == 1):
            parts = {
                n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{base}.")
            }
            found[f"{base}.weight"] = decoded(section["quant_method"], parts)
        elif part not in PARTS and not name.endswith("_scales"):
            found[name] = tensor
    save_file(found, file, {"format": "pt"})
    return output


def nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` codes of 4 bits in each element along the last dimension."""
    wide = packed.long()
    parts = [(wide >> (4 * number)) & 15 for number in range(count)]
    return torch.stack(parts, dim=-1).flatten(-2)


def decoded(method: str, parts: Tensors) -> torch.Tensor:
    """``[out, in]`` in float32."""
    if method == "gptq":
        codes = nibbles(parts["qweight"].T, 8).float()
        zeros, group = nibbles(parts["qzeros"], 8).float() + 1, parts["g_idx"].long()
        return ((codes - zeros[group].T) * parts["scales"].float()[group].T).contiguous()
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def outputs(packed: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(len(packed), packed.shape[1] * 8)
            for place, output in enumerate(order):
                found[:, output::8] = ((packed.long() >> (4 * place)) & 15).float()
            return found

        group = torch.arange(len(parts["qweight"])) // GROUP
        codes, zeros = outputs(parts["qweight"]), outputs(parts["qzeros"])
        return ((codes - zeros[group]) * parts["scales"].float()[group]).T.contiguous()
    return _times(parts)


def _times(parts: Tensors) -> torch.Tensor:
    """Codes by rows times their scales: one for all, a row, a group of a row, or a block."""
    scales, packed = parts["weight_scale"].float(), parts.get("weight_packed")
    if packed is None:
        packed = parts["weight"]
    if packed.dtype == torch.int32:
        zeros = torch.full(scales.shape, 8)
        if "weight_zero_point" in parts:
            zeros = nibbles(parts["weight_zero_point"].T, 8).T
        return (nibbles(packed, 8) - spread(zeros)).float() * spread(scales)
    if packed.dtype == torch.uint8:
        values = torch.tensor(FP4_VALUES)[nibbles(packed, 2)]
        if parts["weight_scale"].dtype == torch.uint8:
            return values * spread(torch.exp2(scales - 127), 32)
        by = parts.get("weight_scale_2")
        return values * spread(scales / parts["weight_global_scale"] if by is None else scales * by)
    if scales.numel() not in (1, len(packed)):
        scales = spread(scales).repeat_interleave(GROUP, 0)[: len(packed)]
    return packed.float() * scales


def spread(entries: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """The entry of every column."""
    return entries.repeat_interleave(group, 1)
