"""Change a number of a config, build the model on the meta device, and see which tensors follow."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from tools.derive.configs import Kwargs

Where = tuple[str, int]
"""Name of a tensor on disk, and one of its dimensions."""

_SKIPPED = re.compile(
    r"_ids?$|_token|_index$|dropout|^(max|min)_pos|seed|beam|num_labels|chunk_size_feed|label"
)
_OTHER_PARTS = re.compile(
    r"vision|audio|vq_|image|visual|qformer|perceiver|adapter|patcher|protein|high_res|mtp"
    r"|rope|per_layer|quant"
)
WIDTH_KEY = re.compile(r"inter|inner|ffn|ff_|_ff|mlp")
"""Keys that speak of an FFN's width, even where their value is null or a list."""

_NO_WIDTH = re.compile(
    r"^n(um)?_|experts?$|head|rank|conv|state|ssm|lora|expand|hidden_size$|hidden_dim$|embed"
    r"|position|d_model|n_embd|d_kv|group|round_up|multiple_of|rope|hc_|index|proj_dim|_dim_per"
    r"|adapter"
)
_ROLES = re.compile("cross_attention|is_encoder|is_decoder")
"""Keys that make another kind of model."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def template(name: str) -> str:
    """Return a tensor's name with placeholders for its numbers."""
    places = iter(("{layer}", "{expert}", "{more}", "{more}"))
    return _NUMBER.sub(lambda _: next(places), name)


def value_at(config: Any, path: str) -> Any:
    """Return the value of a key inside sections, such as ``text_config.vocab_size``."""
    for part in path.split("."):
        config = config[part]
    return config


def with_value(config: Kwargs, path: str, value: Any) -> Kwargs:
    """Return a copy of ``config`` with another value at ``path``."""
    result: Kwargs = json.loads(json.dumps(config))
    *sections, key = path.split(".")
    (value_at(result, ".".join(sections)) if sections else result)[key] = value
    return result


@dataclass(frozen=True)
class Built:
    """A model on the meta device, as its files would hold it."""

    model: Any
    state: Mapping[str, Any] = field(repr=False)
    """Name in the model → tensor."""
    tensors: Mapping[str, Any] = field(repr=False)
    """Name on disk → tensor."""

    @classmethod
    def of(cls, model_type: str, config: Kwargs, auto_class: Any) -> "Built":
        """Build the model of ``config`` and take back transformers' renames."""
        keys = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
        made = CONFIG_MAPPING[model_type](**json.loads(json.dumps(keys)))
        with torch.device("meta"), no_init_weights():
            model = auto_class.from_config(made)
        model.tie_weights()
        state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        return cls(model, state, revert_weight_conversion(model, dict(state)))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, on disk; packed experts also by the name that the model has for them."""
        held = {id(value) for value in self.tensors.values()}
        apart = any(re.search(r"experts\.\d+\.", name) for name in self.tensors)
        packed = {
            name: value
            for name, value in self.state.items()
            if apart and value.ndim > 2 and "experts" in name and id(value) not in held
        }
        return {name: tuple(value.shape) for name, value in ({**packed, **self.tensors}).items()}

    @cached_property
    def buffers(self) -> set[str]:
        """Names on disk of what the model holds as buffers."""
        names = {name for name, _ in self.model.named_buffers()}
        held = {id(self.state[name]) for name in names & set(self.state)}
        return {name for name, value in self.tensors.items() if id(value) in held}

    @cached_property
    def input_name(self) -> str:
        """Name on disk of the embedding."""
        return self.name_of(self.model.get_input_embeddings())

    def name_of(self, module: Any) -> str:
        """Name on disk of a module's weight, "" where the files lack it."""
        path = next(name for name, other in self.model.named_modules() if other is module)
        held = self.state.get(f"{path}.weight")
        return next((name for name, value in self.tensors.items() if value is held), "")


@dataclass(frozen=True)
class Followed:
    """What follows a key of the config."""

    per_unit: Mapping[Where, float]
    """Dimension → positions per unit of the key."""
    renames: bool
    """Whether tensors come or go with it."""


class Dependence:
    """Which dimensions of which tensors follow which key of a config."""

    def __init__(self, model_type: str, config: Kwargs, auto_class: Any) -> None:
        """Build the model of ``config``, then one more for each number in it."""
        self._type, self._class, self.config = model_type, auto_class, config
        self.base = Built.of(model_type, config, auto_class)
        self.by_key: dict[str, Mapping[Where, float]] = {}
        self.counts: set[str] = set()
        for path in numbers(config):
            found = self._followed(path)
            if found is not None:
                self.by_key[path] = found.per_unit
                self.counts |= {path} if found.renames else set()

    @cached_property
    def keys_of(self) -> dict[Where, set[str]]:
        """Dimension → the keys that it follows."""
        found: dict[Where, set[str]] = defaultdict(set)
        for key, places in self.by_key.items():
            for place in places:
                found[place].add(key)
        return found

    def _followed(self, path: str) -> Followed | None:
        """Return what follows a key; None where no other value builds a model."""
        value, base = value_at(self.config, path), self.base.shapes
        if value is None:
            try:
                given = with_value(self.config, path, 64)
                base = Built.of(self._type, given, self._class).shapes
            except Exception:
                return None
        large = value if isinstance(value, int) else 256
        for step in (1, 2, 4, 8, 16, 64, 128, large):
            config = with_value(self.config, path, _stepped(value, step))
            try:
                other = Built.of(self._type, config, self._class).shapes
            except Exception:  # any error of a library that has not seen such a value
                continue
            found = {
                (name, dim): (after - before) / step
                for name, shape in base.items()
                if len(shape) == len(other.get(name, ()))
                for dim, (before, after) in enumerate(zip(shape, other[name], strict=True))
                if before != after
            }
            if found or set(base) != set(other) or step > 1:
                return Followed(found, set(base) != set(other))
        return None


def _stepped(value: Any, step: int) -> Any:
    if isinstance(value, list):
        return [entry + step for entry in value]
    return 64 + step if value is None else value + step


def numbers(config: Kwargs, at: str = "") -> Iterator[str]:
    """Yield the paths of what may be a size: numbers, lists of numbers, nulls that name a width."""
    for key, value in config.items():
        if not isinstance(key, str) or _SKIPPED.search(key):
            continue
        if isinstance(value, dict):
            if not _OTHER_PARTS.search(key):
                yield from numbers(value, f"{at}{key}.")
        elif type(value) is int and value > 0:
            yield at + key
        elif WIDTH_KEY.search(key):
            numbered = isinstance(value, list) and value and all(type(v) is int for v in value)
            if value is None or numbered:
                yield at + key


def switches(config: Kwargs, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths of all flags, and of ranks that may be missing, each with its other value."""
    for key, value in config.items():
        if not isinstance(key, str) or _ROLES.search(key):
            continue
        if isinstance(value, dict) and not _OTHER_PARTS.search(key):
            yield from switches(value, f"{at}{key}.")
        elif isinstance(value, bool):
            yield at + key, not value
        elif key.endswith("lora_rank"):
            yield at + key, 16 if value is None else None


def channel_keys(found: Dependence) -> dict[str, Mapping[Where, float]]:
    """Keys that are the number of channels between two maps → the dimensions that follow."""
    vocab = vocab_keys(found)
    sections = {key.rpartition(".")[0] for key in vocab}
    return {
        key: places
        for key, places in found.by_key.items()
        if places and key not in vocab and all(key.startswith(s) for s in sections)
        if _is_width(found, key, places)
    }


def vocab_keys(found: Dependence) -> list[str]:
    """Keys for the number of rows of the embedding."""
    rows = found.base.model.get_input_embeddings().weight.shape[0]
    shapes = found.base.shapes
    return [
        key
        for key, places in found.by_key.items()
        if "vocab" in key
        and any(unit == 1 and shapes[n][d] == rows for (n, d), unit in places.items())
    ]


def home(name: str) -> str:
    """Template of the module that holds a map."""
    path = template(name).rpartition(".")[0]
    return path.rpartition(".")[0] if name.endswith((".weight", ".bias")) else path


def _is_width(found: Dependence, key: str, places: Mapping[Where, float]) -> bool:
    shapes, last = found.base.shapes, key.rpartition(".")[2]
    if not WIDTH_KEY.search(key):
        others = {other for place in places for other in found.keys_of[place]} - {key}
        if any(WIDTH_KEY.search(other) for other in others):
            return False
    if "multiple_of" in last or (_NO_WIDTH.search(last) and not WIDTH_KEY.search(last)):
        return False
    names = [name for name, _ in places]
    if len(set(names)) < len(names) or any(unit % 1 for unit in places.values()):
        return False
    return all(_maps_in_and_out(found, key, group) for group in _by_module(places, shapes).values())


def _maps(group: list[Where], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {template(name) for name, _ in group if len(shapes[name]) > 1}


def _by_module(
    places: Mapping[Where, float], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Where]]:
    """Group ``places`` by module; a module with one map alone joins the one around it."""
    groups: dict[str, list[Where]] = defaultdict(list)
    for name, dim in places:
        groups[home(name)].append((name, dim))
    for _ in range(3):
        for module in [m for m, group in groups.items() if len(_maps(group, shapes)) < 2]:
            if "." in module and not module.endswith("{layer}"):
                groups[module.rpartition(".")[0]] += groups.pop(module)
    return groups


def _maps_in_and_out(found: Dependence, key: str, group: list[Where]) -> bool:
    """Whether the tensors of one module are maps into and out of the same channels."""
    shapes, width = found.base.shapes, _hidden_size(found)
    module = home(group[0][0]).rpartition(".")[2]
    if len(_maps(group, shapes)) < 2 or "att" in module.lower():
        return False
    stacked = any(len(shapes[n]) == 3 and d > 0 for n, d in group)
    across = [
        (name, other)
        for name, dim in group
        if len(shapes[name]) > 1 + stacked
        for other in range(max(0, len(shapes[name]) - 2), len(shapes[name]))
        if other != dim
    ]
    partners = {frozenset(found.keys_of.get(place, ())) for place in across}
    sizes = {shapes[name][dim] for name, dim in across}
    if (len(partners) != 1 or not next(iter(partners))) and sizes != {width}:
        return False
    modules = {n.rpartition(".")[0] for n, _ in group if len(shapes[n]) > 1}
    alone = {n for n, _ in group if len(shapes[n]) == 1 and n.rpartition(".")[0] not in modules}
    return all("norm" in name for name in alone)


def _hidden_size(found: Dependence) -> int:
    return int(found.base.model.get_input_embeddings().weight.shape[1])
