"""Keys of config.json by which layers differ, per model type, and their values for fewer layers.

A rule computes the new value of its key when layers are removed. Types without an entry in
``LAYER_RULES`` are refused: their layers may differ by number in ways that no key can express.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from surgery.errors import FamilyError

WRITE_OUT = "save config.json with transformers 5, which writes it out, or keep all layers"


class LayerRule(Protocol):
    """A key of config.json by which layers differ."""

    @property
    def key(self) -> str:
        """Its name in config.json."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Return the entries to change in ``config`` when only the layers ``firsts`` are kept.

        Raises:
            FamilyError: the key cannot express it.
        """


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(key: str, expected: str, found: object, where: object) -> FamilyError:
    return FamilyError(
        f"{where}: {key}",
        "does not say which layers it means",
        expected=expected,
        found=repr(found),
        fix="check config.json, or keep all layers",
    )


@dataclass(frozen=True)
class Period:
    """Kinds of layers that take turns: what a config class fills in for a missing list."""

    default: int
    """Every layer whose number + 1 is a multiple of the period is of the kind ``last``."""
    keys: tuple[str, ...] = ()
    """Keys of config.json that may hold another period."""
    last: object = "full_attention"
    others: object = "sliding_attention"
    counted_by: tuple[str, ...] = ()
    """Engines that count like this even where config.json has a list."""
    begins: bool = False
    """Whether the first layer of every period is of the kind ``last``, not the last one."""

    def length(self, config: Mapping[str, Any]) -> int:
        """The period of a config."""
        found = (config.get(key) for key in self.keys)
        return next((n for n in found if type(n) is int and n > 0), self.default)

    def kinds(self, config: Mapping[str, Any], depth: int) -> list[object]:
        """The kinds of ``depth`` layers."""
        period, shift = self.length(config), 0 if self.begins else 1
        return [self.others if (n + shift) % period else self.last for n in range(depth)]


@dataclass(frozen=True)
class PerLayer:
    """A list with an entry per layer; any other value applies to all layers."""

    key: str
    needed: bool = True
    """Whether the config class derives a missing list from the layers' numbers."""
    unless: tuple[str, object] = ("", True)
    """(key, its default): while that key is false or null, all layers are alike."""
    keeps: tuple[str, ...] = ()
    """Entries of which a kept layer must have one: transformers runs no model without."""
    period: Period | None = None
    """How the config class fills in a missing list, where it does."""

    def kinds(self, config: Mapping[str, Any]) -> list[object] | None:
        """The list of a config, filled in where it is missing; None where there is none."""
        value, depth = config.get(self.key), config.get("num_hidden_layers")
        if isinstance(value, list) and value:
            return value
        counts = value in (None, []) and self.period and isinstance(depth, int)
        return self.period.kinds(config, depth) if counts and self.period and depth else None

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """The entries of the kept layers."""
        value, (key, default) = self.kinds(config), self.unless
        if value is None:
            if self.needed and config.get(key, default):
                raise FamilyError(
                    f"{where}: {self.key}",
                    "is missing, and a layer's kind would follow from its new number",
                    fix=WRITE_OUT,
                )
            return {}
        if firsts[-1] >= len(value):
            raise FamilyError(
                f"{where}: {self.key}",
                "does not have an entry for every layer",
                expected=f"more than {firsts[-1]}",
                found=len(value),
                fix="check config.json",
            )
        kept = [value[first] for first in firsts]
        if self.keeps and not {*self.keeps}.intersection(map(str, kept)):
            raise FamilyError(
                f"{where}: {self.key}", f"no {self.keeps[0]} would be left", fix="keep such a layer"
            )
        return {self.key: kept}


@dataclass(frozen=True)
class LayerNumbers:
    """A list of layers' numbers, those of the period's ``last`` kind where it has one."""

    key: str
    period: Period | None = None
    """How the config class fills in a missing list, where it does."""
    keeps: str = ""
    """What the listed layers have, without which transformers runs no model."""

    def kinds(self, config: Mapping[str, Any]) -> list[object] | None:
        """The kind of each layer, filled in where the list is missing; None without a period."""
        value, depth = config.get(self.key), config.get("num_hidden_layers")
        if self.period is None or not isinstance(depth, int):
            return None
        if isinstance(value, list):
            return [self.period.last if n in value else self.period.others for n in range(depth)]
        return self.period.kinds(config, depth) if value is None else None

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """The new numbers of the kept layers in the list."""
        value, kinds = config.get(self.key), self.kinds(config)
        if value is None and kinds is not None and self.period is not None:
            value = [n for n, kind in enumerate(kinds) if kind == self.period.last]
        if value is None:
            return {}
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise _wrong(self.key, "numbers of layers in a list", value, where)
        kept = [new for new, first in enumerate(firsts) if first in value]
        if self.keeps and value and not kept:
            raise FamilyError(
                f"{where}: {self.key}", f"no {self.keeps} would be left", fix="keep such a layer"
            )
        return {self.key: kept}


@dataclass(frozen=True)
class DenseLayers:
    """A list of the layers without experts, beside a step at which layers have them.

    A layer has experts where the list lacks it and its number + 1 is a multiple of the step.
    """

    key: str = "mlp_only_layers"
    step: str = "decoder_sparse_step"
    default: tuple[int, ...] = ()
    """The config class's list where config.json has none."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """The new numbers of the kept layers without experts; the step becomes 1."""
        value, step = config.get(self.key), config.get(self.step, 1)
        if value is not None and not (isinstance(value, list) and all(map(_is_number, value))):
            raise _wrong(self.key, "numbers of layers in a list", value, where)
        if not _is_number(step) or step < 1:
            raise _wrong(self.step, "a number of layers", step, where)
        if value is None and not self.default and step == 1:
            return {}
        dense = self.default if value is None else value
        kept = [
            new for new, first in enumerate(firsts) if first in dense or (first + 1) % step != 0
        ]
        return {self.key: kept, **({self.step: 1} if step != 1 else {})}


@dataclass(frozen=True)
class LeadingCount:
    """The number of layers, from the first on, that are of one kind."""

    key: str
    default: int
    """The config class's default."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """The number of them that are kept."""
        count = config.get(self.key, self.default)
        count = 0 if count is None else count
        if not _is_number(count):
            raise _wrong(self.key, "a number of layers", count, where)
        return {self.key: sum(first < count for first in firsts)}


@dataclass(frozen=True)
class LastNumber:
    """The number of the last layer of one kind; -1 or a missing key is the last of all."""

    key: str

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Its new number."""
        value = config.get(self.key)
        if value is None or value == -1:
            return {}
        if not _is_number(value):
            raise _wrong(self.key, "the number of a layer", value, where)
        kept = sum(first <= value for first in firsts)
        if not kept:
            raise FamilyError(
                f"{where}: {self.key}", "no layer up to it would be left", fix="keep one of them"
            )
        return {self.key: kept - 1}


@dataclass(frozen=True)
class RequiredValue:
    """A period or a switch; a layer's number matters unless it has the given value."""

    key: str
    value: object
    """The required value; also the config class's default."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Return no entries; raise for any other value."""
        found = config.get(self.key, self.value)
        if found != self.value:
            raise FamilyError(
                f"{where}: {self.key}",
                "makes layers differ by number, so that none can be removed",
                expected=self.value,
                found=found,
                fix="keep all layers",
            )
        return {}


@dataclass(frozen=True)
class FirstStays:
    """The first layer lacks what all others have, so that no other can take its place."""

    lacks: str
    """What it lacks."""
    key: str = ""
    """No key of config.json says so."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Return no entries; raise where the first layer is removed."""
        if firsts[0] != 0:
            raise FamilyError(
                "layers", f"0 cannot be removed: the first layer has no {self.lacks}", fix="keep it"
            )
        return {}


@dataclass(frozen=True)
class Depth:
    """The number of layers, which files may have beside a list with an entry for each."""

    key: str

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """The number of the kept layers, where the key is there."""
        return {self.key: len(firsts)} if self.key in config else {}


CONVERTER, LLAMA_CPP, MLX, VLLM = "llama.cpp's converter", "llama.cpp", "mlx-lm", "vLLM"
TRANSFORMERS_4 = "transformers 4"
"""Of engines that count. ``export`` tells llama.cpp what its converter does not."""

_TYPES = (PerLayer("layer_types"),)
_WINDOWS_BY = {
    "gemma2": Period(2, counted_by=(CONVERTER,)),
    "gemma3_text": Period(6, ("sliding_window_pattern",), counted_by=(CONVERTER, MLX)),
    "vaultgemma": Period(2),
    "olmo3": Period(4),
    "cohere2": Period(4, ("sliding_window_pattern",), counted_by=(LLAMA_CPP, MLX)),
    "gpt_oss": Period(2, counted_by=(CONVERTER, VLLM)),
    "modernbert": Period(
        3, ("global_attn_every_n_layers",), counted_by=(LLAMA_CPP, TRANSFORMERS_4), begins=True
    ),
}
"""Model type → how its layers with windows take turns."""
_AFMOE = Period(4, ("global_attn_every_n_layers",), counted_by=(LLAMA_CPP,))
_NO_ROPE = Period(4, ("no_rope_layer_interval",), last=0, others=1, counted_by=(LLAMA_CPP,))
_LLAMA4_NO_ROPE = replace(_NO_ROPE, counted_by=(LLAMA_CPP, MLX))
_LLAMA4_EXPERTS = Period(
    1,
    ("interleave_moe_layer_step",),
    last="mixture",
    others="dense",
    counted_by=(LLAMA_CPP, MLX, VLLM),
)
_LINEAR = Period(4, ("full_attention_interval",), others="linear_attention", counted_by=(MLX,))
_WINDOWS = (PerLayer("layer_types", unless=("use_sliding_window", False)),)
_MLP_ONLY = (DenseLayers(),)

_NO_NORM = FirstStays("norm before its attention, unlike all others")
_MLPS = PerLayer("mlp_layer_types")
_BOTH_TYPES = (*_TYPES, _MLPS)
_HYBRID = PerLayer("layer_types", keeps=("full_attention",))
_LINEAR_TYPES = (PerLayer("layer_types", keeps=("full_attention",), period=_LINEAR),)
_THETAS = PerLayer("layer_rope_theta", needed=False)

_ALIKE = """
    llama mistral ministral3 gemma phi3 granite olmo olmo2 stablelm cohere glm glm4 gpt_neox opt
    falcon bloom phi ernie4_5 hunyuan_v1_dense seed_oss arcee nemotron starcoder2 helium
    persimmon gptj codegen gpt_bigcode internlm3 apertus mpt biogpt jais2 youtu nanochat mixtral
    olmoe granitemoe granitemoeshared phimoe minimax_m2 flex_olmo solar_open
    bert ernie megatron-bert rembert roformer distilbert roberta xlm-roberta camembert
    data2vec-text roberta-prelayernorm xlm-roberta-xl mpnet electra eurobert
    doge emu3 glm46v glm4v glm_ocr glmga hunyuan_vl hyperclovax iquestcoder paddleocr_vl
    phi4_multimodal xglm falcon_h1 falcon_mamba mamba mamba2 cosmos3_edge ctrl openai-gpt aria_text
""".split()  # noqa: SIM905
"""Types whose layers differ in nothing but their weights."""

LAYER_RULES: dict[str, tuple[LayerRule, ...]] = {
    **dict.fromkeys(_ALIKE, ()),
    **dict.fromkeys(
        ("gpt2", "gpt-sw3"), (RequiredValue("scale_attn_by_inverse_layer_idx", False),)
    ),
    **{key: (PerLayer("layer_types", period=by),) for key, by in _WINDOWS_BY.items()},
    "ministral": (PerLayer("layer_types", needed=False),),
    "qwen2": _WINDOWS,
    "qwen3": _WINDOWS,
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "muse_glimmer"), (*_TYPES, _THETAS)),
    "smollm3": (PerLayer("no_rope_layers", period=_NO_ROPE), PerLayer("layer_types", needed=False)),
    "modernbert": (PerLayer("layer_types", period=_WINDOWS_BY["modernbert"]), _NO_NORM),
    "modernbert-decoder": (*_TYPES, _NO_NORM),
    "deberta-v2": (RequiredValue("conv_kernel_size", 0),),
    **dict.fromkeys(("exaone4", "cwm", "kolibri1", "cohere_compass_text"), _TYPES),
    "granitemoehybrid": (PerLayer("layer_types", keeps=("attention", "full_attention")),),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qianfan_ocr"), _WINDOWS),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), (PerLayer("layer_types"),)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _LINEAR_TYPES),
    **dict.fromkeys(("olmo_hybrid", "lfm3"), (_HYBRID,)),
    "lfm2": (_HYBRID, LayerNumbers("full_attn_idxs")),
    "lfm2_moe": (_HYBRID, LeadingCount("num_dense_layers", 2)),
    "kimi_linear": (_HYBRID, _MLPS),
    "bailing_hybrid": (_HYBRID, _MLPS, LeadingCount("first_k_dense_replace", 2)),
    "nemotron_h": (PerLayer("layers_block_type"), Depth("num_hidden_layers")),
    "bamba": (LayerNumbers("attn_layer_indices", keeps="attention"),),
    **dict.fromkeys(("axk1", "deepseek_ocr2", "glm4_moe_lite", "hy_v3"), (_MLPS,)),
    **dict.fromkeys(
        (
            *("axk2", "deepseek_v4", "mellum", "mimo_v2_flash", "minimax_m3_vl"),
            *("minimax_m3_vl_text", "unlimited_ocr"),
        ),
        _BOTH_TYPES,
    ),
    "deepseek_v32": (*_BOTH_TYPES, LeadingCount("first_k_dense_replace", 3)),
    "laguna": (*_BOTH_TYPES, PerLayer("num_attention_heads_per_layer")),
    "muse_spark": (*_BOTH_TYPES, _THETAS),
    "flint": (*_TYPES, DenseLayers(default=(0, 1))),
    **dict.fromkeys(("glm4v_moe", "glm4_moe"), (LeadingCount("first_k_dense_replace", 1),)),
    "mistral4": (LeadingCount("first_k_dense_replace", 0),),
    "kimi_k25": (LeadingCount("first_k_dense_replace", 3),),
    "qwen2_moe": (*_WINDOWS, *_MLP_ONLY),
    "qwen3_moe": _MLP_ONLY,
    "qwen3_next": (PerLayer("layer_types", keeps=("full_attention",), period=_LINEAR), *_MLP_ONLY),
    "deepseek_v2": (LeadingCount("first_k_dense_replace", 0),),
    "deepseek_v3": (LeadingCount("first_k_dense_replace", 3),),
    "dots1": (
        PerLayer("layer_types", unless=("sliding_window", True)),
        LeadingCount("first_k_dense_replace", 0),
    ),
    "exaone_moe": (
        *_TYPES,
        PerLayer("mlp_layer_types", needed=False),
        LeadingCount("first_k_dense_replace", 1),
    ),
    "afmoe": (PerLayer("layer_types", period=_AFMOE), LeadingCount("num_dense_layers", 1)),
    "ernie4_5_moe": (
        LeadingCount("moe_layer_start_index", 1),
        LastNumber("moe_layer_end_index"),
        RequiredValue("moe_layer_interval", 1),
    ),
    "hunyuan_v1_moe": (PerLayer("num_experts", needed=False), PerLayer("moe_topk", needed=False)),
    "cohere2_moe": (*_TYPES, PerLayer("mlp_layer_types")),
    "llama4_text": (
        LayerNumbers("moe_layers", period=_LLAMA4_EXPERTS),
        PerLayer("no_rope_layers", period=_LLAMA4_NO_ROPE),
        PerLayer("layer_types", needed=False),
    ),
}
"""Model type → the keys by which its layers differ.

The others are refused, for their layers depend on their numbers in other ways:

- by code: diffllama, minimax, beam; gpt_neox_japanese, whose last layer has a bias; zaya, whose
  first layer routes otherwise; minicpm3, which scales by the number of all layers;
- by patterns: gpt_neo, jamba, recurrent_gemma; dots3_note_text and Gemma 4 by `per_layer_config`;
- because layers use what others computed: Gemma 4, glm5_next, glm_moe_dsa, hy_v4, mistral_large4;
- because images feed into them by number: Qwen 3 VL and Omni, cosmos3_omni, granite4_vision,
  granite_docling, cohere_compass; qwen4_exp_text, whose n-grams are added to chosen ones."""
