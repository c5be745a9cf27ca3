"""Quantized checkpoints: FP8 with block scales, weights that are only moved whole, and refusals."""

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Opaque:
    """Weights in a format whose bytes are moved as they are: only whole experts and layers go.

    Such a weight is stored as codes and, beside them, scales, zero points and the like. They have
    the weight's name with other endings.
    """

    method: str
    """As config.json names it."""
    codes: str = ""
    """Ending of the codes' names; "" where they have the weight's own."""
    beside: tuple[str, ...] = ()
    """Endings of the names of what is stored beside the codes."""
    weight: str = ".weight"
    """Ending of the weight's name in the unquantized model."""
    bits: int = 4
    """Bits of a code that is packed with others."""
    variant: str = ""
    """What config.json says of the layout: ``checkpoint_format`` or ``version``."""

    def weight_of(self, name: str) -> tuple[str, bool] | None:
        """Return the weight that the tensor ``name`` belongs to, and whether it is beside codes."""
        for ending in (self.codes, *self.beside) if self.codes else self.beside:
            if name.endswith(ending):
                return name.removesuffix(ending) + self.weight, ending != self.codes
        return None

    def base_of(self, codes: str) -> str:
        """Return what the names of a weight's parts begin with, for the tensor ``codes``."""
        own = self.codes and codes.endswith(self.codes)
        return codes.removesuffix(self.codes if own else self.weight)

    def shape_of(self, codes: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """Return the shape of the weight in the unquantized model, for that of its codes."""
        if (
            self.method == "mxfp4"
        ):  # [experts, out, groups, bytes]; the model has [experts, in, out]
            return codes[0], codes[2] * codes[3] * 2, codes[1]
        rows, columns = codes
        if self.method == "gptq":
            return columns, rows * self.values_of(dtype)
        if self.method == "awq":
            return columns * self.values_of(dtype), rows
        return rows, columns * self.values_of(dtype)

    def values_of(self, dtype: str) -> int:
        """Return how many codes an element of this safetensors dtype holds."""
        return {"I32": 32, "U32": 32, "U8": 8}.get(dtype, self.bits) // self.bits


OPAQUE = (
    Opaque("mxfp4", "_blocks", ("_scales",), weight=""),
    Opaque("gptq", ".qweight", (".qzeros", ".scales", ".g_idx")),
    Opaque("awq", ".qweight", (".qzeros", ".scales")),
    Opaque(
        "compressed-tensors",
        ".weight_packed",
        (
            *(f".weight_{part}" for part in ("scale", "zero_point", "shape", "g_idx")),
            *(".weight_global_scale", ".input_global_scale", ".input_scale", ".input_zero_point"),
        ),
    ),
    Opaque("modelopt", "", (".weight_scale", ".weight_scale_2", ".input_scale")),
    Opaque("fbgemm_fp8", "", (".weight_scale", ".input_scale_ub")),
    Opaque("fp8", "", (".weight_scale", ".weight_scale_inv", ".input_scale")),
)
"""Formats of which whole experts can be removed. ``fp8`` is that without block scales."""


def opaque_of(config: dict[str, Any]) -> Opaque | None:
    """Return the format of weights that are only moved whole.

    None where they are plain, or in FP8 with block scales, or where ``quantization_of`` refuses
    them by name.
    """
    text_config = config.get("text_config")
    inner = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    section = config.get("quantization_config") or inner
    if not section or not isinstance(section, dict):
        return None
    method = _method(section)
    if method == "fp8" and _is_block(section):
        return None
    found = {each.method: each for each in OPAQUE}.get(method)
    bits = section.get("bits", section.get("w_bit"))
    variant = str(section.get("checkpoint_format") or section.get("version") or "")
    variant = "transformed" if section.get("transform_config") else variant
    bits = bits if bits in (2, 3, 4, 8) else 4
    return replace(found, bits=bits, variant=variant) if found else None


def _is_block(section: dict[str, Any]) -> bool:
    plain = all((section.get(key) or only) == only for key, (only, _) in PLAIN.items())
    return bool(section.get("weight_block_size")) and plain


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
