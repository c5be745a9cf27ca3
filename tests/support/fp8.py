"""Tiny checkpoints in FP8 with block scales, and the same numbers without quantization."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.files.model_files import INDEX_NAME
from tests.support import tiny

BLOCK = 16
QUANTIZED = re.compile(r"model\.layers\..+_proj(_with_mqa)?\.weight")
"""What published checkpoints have in FP8: linear maps of the layers, but no router."""
GATE = "model.layers.1.mlp.gate_proj.weight"
SUFFIX = "_scale_inv"
APART = "scales.safetensors"

Tensors = dict[str, torch.Tensor]


def section(block: int = BLOCK) -> dict[str, object]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }


def save(
    path: Path,
    key: str = "qwen3",
    *,
    block: int = BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    apart: bool = False,
    also: str = "",
    sharded: bool = False,
    **changes: Any,
) -> Path:
    """Save a tiny checkpoint of ``key`` in FP8; ``apart`` puts all scales into one more shard.

    ``also`` is the name of one more tensor to quantize.
    """
    tiny.save(path, key, dtype=torch.bfloat16, sharded=sharded or apart, **changes)
    set_config(path, quantization_config=section(block))
    scales: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        found: Tensors = {}
        for name, tensor in load_file(file).items():
            if not QUANTIZED.fullmatch(name) and name != also:
                found[name] = tensor
                continue
            found[name], made = quantized(tensor.float(), block, scale_dtype)
            (scales if apart else found)[name + SUFFIX] = made
        save_file(found, file, {"format": "pt"})
    if apart:
        save_file(scales, path / APART, {"format": "pt"})
    write_index(path)
    return path


def quantized(
    weight: torch.Tensor, block: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ``weight``: the largest number of a block is the largest of E4M3."""
    rows, columns = (-(-size // block) for size in weight.shape)
    scales = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = weight[row * block : (row + 1) * block, column * block : (column + 1) * block]
            scales[row, column] = part.abs().max() / 448
    if scale_dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(scale_dtype)
    wide = spread(scales, block, weight.shape)
    return (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, block: int, shape: torch.Size) -> torch.Tensor:
    """The scale of every element."""
    wide = scales.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return wide[: shape[0], : shape[1]]


def plain(path: Path, output: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save what torch makes of the FP8 weights of ``path``, as a checkpoint without quantization.

    Args:
        path: Of ``save``, or cut from it.
        output: A new directory.
        dtype: Of the weights that were FP8.
    """
    shutil.copytree(path, output)
    block = json.loads((path / "config.json").read_text())["quantization_config"][
        "weight_block_size"
    ][0]
    files = sorted(output.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in files:
        file.unlink()
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(SUFFIX):
            found[name] = tensor
            if tensor.dtype == torch.float8_e4m3fn:
                wide = spread(tensors[name + SUFFIX], block, tensor.shape)
                found[name] = (tensor.float() * wide).to(dtype)
    save_file(found, output / "model.safetensors", {"format": "pt"})
    (output / INDEX_NAME).unlink(missing_ok=True)
    set_config(output, quantization_config=None)
    return output


def set_config(path: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept, indent=2))


def change(path: Path, edit: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint, in whatever shard; None removes one."""
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        if not edit.keys() & tensors.keys() and file.name != "model.safetensors":
            continue
        wanted = {n: t for n, t in edit.items() if n in tensors or file.name == "model.safetensors"}
        changed = {n: t for n, t in (tensors | wanted).items() if t is not None}
        save_file(changed, file, {"format": "pt"})
    write_index(path)


def write_index(path: Path) -> None:
    """Make the index anew, where there is one."""
    if not (path / INDEX_NAME).exists():
        return
    files = sorted(path.glob("*.safetensors"))
    weight_map = {name: file.name for file in files for name in load_file(file)}
    total = sum(t.nbytes for file in files for t in load_file(file).values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX_NAME).write_text(json.dumps(index, indent=2))
