"""Quantized checkpoints: FP8 with block scales, weights stored as codes and parts, and refusals."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from surgery.errors import AMEND, CheckpointError
from surgery.files.model_files import MODELOPT_NAME
from surgery.files.strict_json import read_json

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


_MODELOPT = f"export it again with a newer ModelOpt, or {ORIGINAL}"

DEQUANTIZE_FP8 = _dequantize("dir, quantization_config=FineGrainedFP8Config(dequantize=True))")
_UNPACK = _dequantize("dir, quantization_config=CompressedTensorsConfig(dequantize=True))")

ADVICE = {
    "mxfp4": _dequantize("dir, quantization_config=Mxfp4Config(dequantize=True))"),
    "compressed-tensors": f"{ORIGINAL}, or {_UNPACK}",
    "bitsandbytes": f"{ORIGINAL}, or {_dequantize('dir).dequantize()')}",
}
"""quant_method → the fix, for methods that have more than ``ORIGINAL``."""


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
    """Weights in a format whose bytes are moved as they are.

    Such a weight is stored as codes and, beside them, scales, zero points and the like. They have
    the weight's name with other endings. Whole experts and layers can be removed; rows and columns
    where ``surgery.checkpoint.opaque.steps_of`` says so.
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
    strategy: str = ""
    """What shares a scale, if it is said: ``tensor``, ``channel``, ``group``, ``block``."""
    group: int = 0
    """Neighbours in a row that share a scale, if groups do; -1 in GPTQ and AWQ: the whole row."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, if blocks do."""
    symmetric: bool = True
    """Whether codes need no zero points."""
    targets: tuple[str, ...] = ()
    """The modules that this holds for, as config.json names them."""
    groups: tuple["Opaque", ...] = ()
    """What holds for the modules of each group, where groups differ."""

    @property
    def by_rows(self) -> bool:
        """Whether codes are stored row by row, as the unquantized weight is."""
        return self.method not in ("mxfp4", "gptq", "awq")

    def of(self, module: str) -> "Opaque | None":
        """Return what holds for a module, by the rule of compressed-tensors: its exact name comes
        before patterns (``re:``), and these before its class. None where no group has it."""
        if not self.groups:
            return self
        named = self._by_target
        patterns = (each for each in named if each.startswith("re:") and _matches(each, module))
        target = module if module in named else next(patterns, "Linear")
        return named.get(target)

    @cached_property
    def _by_target(self) -> dict[str, "Opaque"]:
        """Target → what holds for its modules, in the order in which patterns are tried."""
        pairs = [(target, group) for group in reversed(self.groups) for target in group.targets]
        return dict(sorted(pairs, key=lambda pair: pair[0]))

    def weight_of(self, name: str) -> tuple[str, bool] | None:
        """Return the weight that the tensor ``name`` belongs to, and whether it is beside codes."""
        for ending in (self.codes, *self.beside) if self.codes else self.beside:
            if name.endswith(ending):
                base = name.removesuffix(ending)
                if ending in CACHE_SCALES and not base.endswith("_proj"):
                    base += f".{ending[1]}_proj"
                return base + self.weight, ending != self.codes
        return None

    def is_of_cache(self, name: str) -> bool:
        """Whether the tensor ``name`` holds a scale of the cache, not of a weight."""
        return name.endswith(CACHE_SCALES) and name.endswith(self.beside)

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
        if dtype == "U8":  # two codes of FP4
            return 2
        return 32 // self.bits if dtype in ("I32", "U32") else 1


CACHE_SCALES = (".k_scale", ".v_scale")
"""Endings of the scales of an FP8 cache: beside k_proj and v_proj, or in the module around them."""

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
            *CACHE_SCALES,
        ),
    ),
    Opaque("modelopt", "", (".weight_scale", ".weight_scale_2", ".input_scale", *CACHE_SCALES)),
    Opaque("fbgemm_fp8", "", (".weight_scale", ".input_scale_ub")),
    Opaque("fp8", "", (".weight_scale", ".weight_scale_inv", ".input_scale", *CACHE_SCALES)),
)
"""Formats whose bytes are moved as they are. ``fp8`` is that without block scales."""


def opaque_of(config: dict[str, Any]) -> Opaque | None:
    """Return the format of weights that are stored as codes and parts.

    None where they are plain, or in FP8 with block scales, or where ``quantization_of`` refuses
    them by name.
    """
    section = _section(config)
    if not section or not isinstance(section, dict):
        return None
    method = _method(section)
    if method == "fp8" and (_is_block(section) or _expert_dtype(config, section) != "fp8"):
        return None
    weights = _weights_of_groups(section)
    bits, known = _bits(section, weights), {each.method: each for each in OPAQUE}
    if method not in known or bits is None:
        return None
    variant = str(section.get("checkpoint_format") or section.get("version") or "")
    found = replace(
        known[method],
        bits=bits,
        variant="transformed" if section.get("transform_config") else variant,
    )
    if method in ("gptq", "awq"):
        size = section.get("group_size", section.get("q_group_size"))
        return replace(found, group=size if type(size) is int else 0)
    if not weights:
        said = {"block_structure": section.get("weight_block_size")}
        return replace(found, **_sharing(said)) if method == "fp8" else found
    groups = tuple(
        replace(found, **_sharing(group["weights"]), targets=_targets(group))
        for group in section["config_groups"].values()
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    )
    alike = {replace(group, targets=()) for group in groups}
    return alike.pop() if len(alike) == 1 else replace(found, groups=groups)


def _matches(pattern: str, module: str) -> bool:
    """Whether a target ``re:…`` has the module; one that is no pattern has none."""
    try:
        return bool(re.match(pattern.removeprefix("re:"), module))
    except re.error:
        return False


def _targets(group: dict[str, Any]) -> tuple[str, ...]:
    listed = group.get("targets")
    return tuple(map(str, listed)) if isinstance(listed, list) else ()


def _sharing(args: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Opaque`` that say which positions share a scale."""
    size, block, strategy = args.get("group_size"), args.get("block_structure"), ""
    if is_block(block):
        strategy = "block"
    elif type(size) is int and size:
        strategy = "group" if size > 0 else "channel"
    given = args.get("strategy")
    strategy = {"tensor_group": "group"}.get(given, given) if isinstance(given, str) else strategy
    return {
        "strategy": strategy,
        "group": size if strategy == "group" and type(size) is int else 0,
        "block": tuple(block or ()) if strategy == "block" and is_block(block) else None,
        "symmetric": args.get("symmetric") is not False,
    }


def _section(config: dict[str, Any]) -> Any:
    """Return quantization_config; as in transformers, that at the top has precedence."""
    text_config = config.get("text_config")
    inner = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    return config.get("quantization_config") or inner


def _expert_dtype(config: dict[str, Any], section: dict[str, Any]) -> Any:
    """Return the format of experts in an FP8 model; DeepSeek-V4 has it at the top of its config."""
    return section.get("expert_dtype") or config.get("expert_dtype") or "fp8"


def _weights_of_groups(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what compressed-tensors and ModelOpt say of the weights, for each group of layers."""
    groups = section.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    found = (group.get("weights") for group in each if isinstance(group, dict))
    return [args for args in found if isinstance(args, dict)]


def _bits(section: dict[str, Any], weights: list[dict[str, Any]]) -> int | None:
    """Return the bits of an integer code: 4 where nothing is said, None where groups differ."""
    said = {args.get("num_bits") for args in weights if args.get("type", "int") == "int"}
    if len(said) > 1:
        return None
    bits = said.pop() if said else section.get("bits", section.get("w_bit"))
    return bits if bits in (2, 3, 4, 8) else 4


def is_block(sizes: Any) -> bool:
    """Whether ``sizes`` are the rows and columns of a block."""
    shape = isinstance(sizes, list) and len(sizes) == 2
    return shape and all(type(size) is int and 0 < size <= MOST_BLOCK for size in sizes)


def _is_block(section: dict[str, Any]) -> bool:
    """Whether FP8 weights have block scales and nothing else."""
    dynamic = (section.get("activation_scheme") or "dynamic") == "dynamic"
    alone = dynamic and not section.get("modules_to_convert")
    return bool(section.get("weight_block_size") and alone)


def quantization_of(config: dict[str, Any], where: Path) -> Fp8 | None:
    """Return how a checkpoint's weights are quantized: None, or FP8 with block scales.

    Args:
        config: Content of config.json, of which ``opaque_of`` is None.
        where: Path of config.json, for errors.

    Raises:
        CheckpointError: quantized by another method, which the error names.
    """
    section = _section(config)
    if not section:
        _check_modelopt(where.parent / MODELOPT_NAME)
        return None
    if not isinstance(section, dict):
        _refuse(where, f"quantization_config {section!r}", ORIGINAL)
    method = _method(section)
    if method != "fp8":
        _refuse(where, f"quant_method {method}", ADVICE.get(method, ORIGINAL))
    if (dtype := _expert_dtype(config, section)) != "fp8":
        _refuse(where, f"quant_method fp8 with expert_dtype {dtype}", DEQUANTIZE_FP8)
    fmt = str(section.get("fmt") or "e4m3")
    if fmt not in FORMATS:
        _refuse(where, f"quant_method fp8 with fmt {fmt}", ORIGINAL)
    return Fp8(_block_shape(section.get("weight_block_size"), where), FORMATS[fmt])


def _check_modelopt(path: Path) -> None:
    """Refuse older files of ModelOpt, which say how weights are quantized beside config.json only.

    Raises:
        CheckpointError: the weights are quantized; not the cache alone.
    """
    said = read_json(path).get("quantization") if path.exists() else None
    algorithm = said.get("quant_algo") if isinstance(said, dict) else None
    if algorithm:
        unsaid = "which config.json does not say"
        _refuse(path, f"quant_algo {algorithm} of ModelOpt, {unsaid}", _MODELOPT)


def _method(section: dict[str, Any]) -> str:
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    if "quant_method" not in section and "bits" in section:
        return "mlx"
    return str(section.get("quant_method", "unknown"))


def _block_shape(sizes: Any, where: Path) -> tuple[int, int]:
    if not is_block(sizes):
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
        expected="bf16, fp16 or fp32 weights, FP8, compressed-tensors, NVFP4, MXFP4, GPTQ or AWQ",
        found=found,
        fix=fix,
    )
