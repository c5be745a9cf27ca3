"""Checkpoints that transformers 5 saved, rewritten as transformers 4 published them.

Most families were published before transformers 5, which has since renamed keys of their configs
and tensors of their vision towers. transformers 4.57 does not know the new names: it takes its
class's default, without a word.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

_ROPE = {
    "rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "full_attention": "rope_theta",
    "sliding_attention": "rope_local_base_freq",
}
"""Part of rope_parameters → the key that 4.x has for it, or for the theta in it."""

_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_ROPE_OF = {
    "gpt_neox": _NEOX,
    "gpt_neox_japanese": _NEOX,
    "modernbert-decoder": {
        "full_attention": "global_rope_theta",
        "sliding_attention": "local_rope_theta",
    },
}
"""Model types that have other keys."""

_EXPERTS = {"num_local_experts": "num_experts"}
_KEYS_OF = {
    "qwen3_moe": _EXPERTS,
    "qwen3_vl_moe_text": _EXPERTS,
    "qwen3_omni_moe_text": _EXPERTS,
}
"""Model type → key of its config → the key in 4.x."""

_NESTED_TOWERS = ("siglip_vision_model", "clip_vision_model")
"""Vision models whose tensors 4.x has in a module ``vision_model`` of the vision tower."""


def as_published_before_5(path: Path) -> Path:
    """Rewrite what transformers 5 saved at ``path``, and return ``path``."""
    config = _rewrite(path / "config.json", _config_in_4)
    if (path / "tokenizer_config.json").exists():
        _rewrite(path / "tokenizer_config.json", _tokenizer_in_4)
    if config.get("vision_config", {}).get("model_type") in _NESTED_TOWERS:
        rename_tensors(path, _nested)
    return path


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    data = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return data


def _config_in_4(config: dict[str, Any]) -> dict[str, Any]:
    model_type = str(config.get("model_type"))
    names = _KEYS_OF.get(model_type, {})
    old = {
        names.get(key, key): _config_in_4(value) if key.endswith("_config") and value else value
        for key, value in config.items()
    }
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if "transformers_version" in old:
        old["transformers_version"] = "4.57.6"
    if rope := old.pop("rope_parameters", None):
        old |= _rope_in_4(rope, _ROPE | _ROPE_OF.get(model_type, {}))
    return old


def _rope_in_4(rope: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    old = {}
    if "full_attention" in rope:
        old[names["sliding_attention"]] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        names = names | {"rope_theta": names["full_attention"]}
    old |= {names[key]: value for key, value in rope.items() if key in names}
    scaling = {key: value for key, value in rope.items() if key not in names}
    old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    return old


def _tokenizer_in_4(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key != "backend"}
    if old.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    return old


def rename_tensors(path: Path, new_name: Callable[[str], str]) -> None:
    """Rename the tensors of a checkpoint, in its shards and its index."""

    def renamed(by_name: dict[str, Any]) -> dict[str, Any]:
        return {new_name(name): value for name, value in by_name.items()}

    index = path / "model.safetensors.index.json"
    if index.exists():
        _rewrite(index, lambda data: data | {"weight_map": renamed(data["weight_map"])})
    for file in path.glob("*.safetensors"):
        save_file(renamed(load_file(file)), file, metadata={"format": "pt"})


def _nested(name: str) -> str:
    old, new = "vision_tower.", "vision_tower.vision_model."
    return name.replace(old, new) if name.startswith((old, f"model.{old}")) else name


def deepseek_v4_name(name: str) -> str:
    """Return the published name of a tensor that transformers 5.23 saved with ``model.``."""
    name = name.replace("model.hc_head.hc_", "hc_head_").replace("embed_tokens.", "embed.")
    return name.removeprefix("model.")
