"""How config.json says which layers are of which kind, by model type, and how that is kept in step.

A rule gives the new values of its key where layers go. Types that have no entry in ``LAYER_RULES``
are refused: their layers may differ by number in ways that no key can say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from surgery.errors import FamilyError

WRITE_OUT = "save config.json with transformers 5, which writes it out, or keep all layers"


class LayerRule(Protocol):
    """A key of config.json by which layers differ."""

    @property
    def key(self) -> str:
        """Its name."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Return what to write into ``config`` where of all layers ``firsts`` stay.

        Raises:
            FamilyError: the key cannot say it.
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
class Each:
    """A list with an entry for each layer; anything else holds for all of them."""

    key: str
    needed: bool = True
    """Whether the class makes up a list that depends on the layers' numbers where there is none."""
    unless: tuple[str, object] = ("", True)
    """(key, what it is where it is missing): while it is false or null, all layers are alike."""
    keeps: str = ""
    """An entry that must not go altogether: the library runs no model without one."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Entries of the layers that stay."""
        value, (key, default) = config.get(self.key), self.unless
        if not isinstance(value, list) or not value:
            if self.needed and config.get(key, default):
                raise FamilyError(
                    f"{where}: {self.key}",
                    "is missing, and which kind a layer is would follow from its new number",
                    fix=WRITE_OUT,
                )
            return {}
        if firsts[-1] >= len(value):
            raise FamilyError(
                f"{where}: {self.key}",
                "has not an entry for every layer",
                expected=f"more than {firsts[-1]}",
                found=len(value),
                fix="check config.json",
            )
        stay = [value[first] for first in firsts]
        if self.keeps and self.keeps not in stay:
            raise FamilyError(
                f"{where}: {self.key}", f"no {self.keeps} would be left", fix="keep such a layer"
            )
        return {self.key: stay}


@dataclass(frozen=True)
class Numbers:
    """A list of layers' numbers; missing, it means what ``Constant`` keys beside it say."""

    key: str
    otherwise: tuple["Constant", ...] = ()

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """New numbers of those that stay."""
        value = config.get(self.key)
        if value is None:
            for constant in self.otherwise:
                constant.renumbered(config, firsts, where)
            return {}
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise _wrong(self.key, "numbers of layers in a list", value, where)
        return {self.key: [new for new, first in enumerate(firsts) if first in value]}


@dataclass(frozen=True)
class Leading:
    """How many layers, from the first on, are of a kind."""

    key: str
    default: int
    """Of the config class."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """How many of them stay."""
        count = config.get(self.key, self.default)
        count = 0 if count is None else count
        if not _is_number(count):
            raise _wrong(self.key, "a number of layers", count, where)
        return {self.key: sum(first < count for first in firsts)}


@dataclass(frozen=True)
class Last:
    """The number of the last layer of a kind; -1, or missing, is the last of all."""

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
        stay = sum(first <= value for first in firsts)
        if not stay:
            raise FamilyError(
                f"{where}: {self.key}", "no layer up to it would be left", fix="keep one of them"
            )
        return {self.key: stay - 1}


@dataclass(frozen=True)
class Constant:
    """A period, or a switch, by which a layer's number matters unless it has one value."""

    key: str
    value: object
    """Also that of the config class."""

    def renumbered(
        self, config: Mapping[str, Any], firsts: Sequence[int], where: object
    ) -> dict[str, Any]:
        """Nothing."""
        found = config.get(self.key, self.value)
        if found != self.value:
            raise FamilyError(
                f"{where}: {self.key}",
                "makes layers differ by number, so that none can go",
                expected=self.value,
                found=found,
                fix="keep all layers",
            )
        return {}


_TYPES = (Each("layer_types"),)
_WINDOWS = (Each("layer_types", unless=("use_sliding_window", False)),)
_MLP_ONLY = (Numbers("mlp_only_layers"), Constant("decoder_sparse_step", 1))

_ALIKE = """
    llama mistral ministral3 gemma phi3 granite olmo olmo2 stablelm cohere glm glm4 gpt_neox opt
    falcon bloom phi ernie4_5 hunyuan_v1_dense seed_oss arcee nemotron starcoder2 helium
    persimmon gptj codegen gpt_bigcode internlm3 apertus mpt biogpt jais2 youtu nanochat mixtral
    olmoe granitemoe granitemoeshared phimoe minimax_m2 flex_olmo solar_open
""".split()  # noqa: SIM905
"""Types whose layers differ in nothing but their weights."""

LAYER_RULES: dict[str, tuple[LayerRule, ...]] = {
    **dict.fromkeys(_ALIKE, ()),
    "gpt2": (Constant("scale_attn_by_inverse_layer_idx", False),),
    "ministral": (Each("layer_types", needed=False),),
    "qwen2": _WINDOWS,
    "qwen3": _WINDOWS,
    "gemma2": _TYPES,
    "gemma3_text": _TYPES,
    "vaultgemma": _TYPES,
    "granite_swa": (*_TYPES, Each("layer_rope_theta", needed=False)),
    "olmo3": _TYPES,
    "smollm3": (Each("no_rope_layers"), Each("layer_types", needed=False)),
    "cohere2": _TYPES,
    "exaone4": _TYPES,
    "qwen2_moe": (*_WINDOWS, *_MLP_ONLY),
    "qwen3_moe": _MLP_ONLY,
    "qwen3_next": (Each("layer_types", keeps="full_attention"), *_MLP_ONLY),
    "deepseek_v2": (Leading("first_k_dense_replace", 0),),
    "deepseek_v3": (Leading("first_k_dense_replace", 3),),
    "glm4_moe": (Leading("first_k_dense_replace", 1),),
    "dots1": (
        Each("layer_types", unless=("sliding_window", True)),
        Leading("first_k_dense_replace", 0),
    ),
    "exaone_moe": (
        *_TYPES,
        Each("mlp_layer_types", needed=False),
        Leading("first_k_dense_replace", 1),
    ),
    "afmoe": (*_TYPES, Leading("num_dense_layers", 1)),
    "ernie4_5_moe": (
        Leading("moe_layer_start_index", 1),
        Last("moe_layer_end_index"),
        Constant("moe_layer_interval", 1),
    ),
    "hunyuan_v1_moe": (Each("num_experts", needed=False), Each("moe_topk", needed=False)),
    "cohere2_moe": (*_TYPES, Each("mlp_layer_types")),
    "gpt_oss": _TYPES,
    "llama4_text": (
        Numbers("moe_layers", (Constant("interleave_moe_layer_step", 1),)),
        Each("no_rope_layers"),
        Each("layer_types", needed=False),
    ),
}
"""Model type → the keys by which its layers differ. Not in it, and so refused: diffllama, whose
attention depends on the layer's number; gpt_neo, whose kinds of attention are nested patterns."""
