"""Quantized checkpoints: FP8 with block scales is read, other methods are refused by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from surgery.errors import AMEND, CheckpointError

SCALE_SUFFIX = "_scale_inv"
"""Suffix of the name of a weight's scales. In spite of ``inv``, they multiply."""

FORMATS = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
"""``fmt`` of a quantization_config → the safetensors dtype of the weights."""

MOST_BLOCK = 1 << 16
"""Far above the usual side of a block, 128; code may loop over a block's positions."""

ORIGINAL = "prune the unquantized checkpoint that it was made from, then quantize the result"


def _dequantize(load: str) -> str:
    # save_original_format: by default transformers 5.23 saves a dequantized model under the names
    # of its quantized tensors, or quantizes it again, and does not record that in config.json.
    return (
        f"dequantize it once with transformers: AutoModelForCausalLM.from_pretrained({load}"
        ".save_pretrained(new_dir, save_original_format=False), and copy the tokenizer's files"
    )


DEQUANTIZE_FP8 = _dequantize("dir, quantization_config=FineGrainedFP8Config(dequantize=True))")
_UNPACK = _dequantize("dir, quantization_config=CompressedTensorsConfig(dequantize=True))")

ADVICE = {
    "mxfp4": _dequantize("dir, quantization_config=Mxfp4Config(dequantize=True))"),
    "compressed-tensors": f"{ORIGINAL}, or {_UNPACK}",
    "bitsandbytes": f"{ORIGINAL}, or {_dequantize('dir).dequantize()')}",
}
"""quant_method → the fix, for methods that have more than ``ORIGINAL``."""

PLAIN = {
    "activation_scheme": ("dynamic", DEQUANTIZE_FP8),
    "expert_dtype": ("fp8", DEQUANTIZE_FP8),
    "modules_to_convert": (None, ORIGINAL),
}
"""Key of quantization_config → the only supported value, and the fix for any other. Another value
means further scales."""


@dataclass(frozen=True)
class Fp8:
    """FP8 weights with one scale per block, as DeepSeek-V3 publishes them."""

    block_shape: tuple[int, int]
    """Rows and columns that share a scale; a weight may end inside a block."""
    dtype: str
    """Safetensors dtype of the quantized weights; the others have the model's own dtype."""

    @staticmethod
    def scales_of(weight: str) -> str:
        """Name of the scales that belong to the tensor ``weight``."""
        return weight + SCALE_SUFFIX

    @staticmethod
    def weight_of(scales: str) -> str:
        """Name of the tensor that ``scales`` belong to."""
        return scales.removesuffix(SCALE_SUFFIX)


def quantization_of(config: dict[str, Any], where: Path) -> Fp8 | None:
    """Return how a checkpoint's weights are quantized: None, or FP8 with block scales.

    Args:
        config: Content of config.json. As in transformers, a quantization_config at the top level
            has precedence over that of text_config.
        where: Path of config.json, for errors.

    Raises:
        CheckpointError: quantized by another method, which the error names.
    """
    text_config = config.get("text_config")
    inner = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    section = config.get("quantization_config") or inner
    if not section:
        return None
    if not isinstance(section, dict):
        _refuse(where, f"quantization_config {section!r}", ORIGINAL)
    method = _method(section)
    if method != "fp8":
        _refuse(where, f"quant_method {method}", ADVICE.get(method, ORIGINAL))
    # DeepSeek-V4 has this key at the top level of its config.
    return _block_fp8({"expert_dtype": config.get("expert_dtype"), **section}, where)


def _method(section: dict[str, Any]) -> str:
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_method" not in section and "bits" in section:
        return "mlx"
    return str(section.get("quant_method", "unknown"))


def _block_fp8(section: dict[str, Any], where: Path) -> Fp8:
    """Read the block shape; refuse FP8 without block scales, or with further scales."""
    if "weight_block_size" not in section:  # as AutoFP8 writes it: weight_scale, one a tensor
        _refuse(where, "quant_method fp8 without a weight_block_size", ORIGINAL)
    if section["weight_block_size"] is None:
        _refuse(where, "quant_method fp8 with one scale a tensor", DEQUANTIZE_FP8)
    for key, (only, advice) in PLAIN.items():
        value = section.get(key) or only
        if value != only:
            _refuse(where, f"quant_method fp8 with {key} {value}", advice)
    fmt = str(section.get("fmt") or "e4m3")
    if fmt not in FORMATS:
        _refuse(where, f"quant_method fp8 with fmt {fmt}", ORIGINAL)
    return Fp8(_block_shape(section["weight_block_size"], where), FORMATS[fmt])


def _block_shape(sizes: Any, where: Path) -> tuple[int, int]:
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(type(size) is int and 0 < size <= MOST_BLOCK for size in sizes)
    ):
        raise CheckpointError(
            where,
            "weight_block_size is not a shape",
            expected=f"two numbers from 1 to {MOST_BLOCK}",
            found=sizes,
            fix=AMEND,
        )
    return sizes[0], sizes[1]


def _refuse(where: Path, found: str, fix: str) -> NoReturn:
    raise CheckpointError(
        where,
        "checkpoint is quantized",
        expected="bf16, fp16 or fp32 weights, or FP8 with block scales",
        found=found,
        fix=fix,
    )
