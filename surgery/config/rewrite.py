"""JSON files beside the weights: find and rewrite their ids, sizes and names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.config.token_ids import reference_paths, visit_ids
from surgery.errors import CheckpointError, TokenizerError
from surgery.families.default_ids import COUNTS, ID_SECTIONS, OFFSET_SECTIONS, fill_defaults
from surgery.families.schema import TIE_KEY, Family
from surgery.files.model_files import DOCUMENTS, named_templates
from surgery.files.strict_json import read_file, read_json
from surgery.tokenizer.id_map import IdMap

SIZE_KEY = re.compile(
    r"((src|tgt|decoder)_)?vocab_size|n_words|n_token|vocab_size_per_layer_input|vocab_offset"
)
"""Keys for the number of the text vocabulary's rows; type_vocab_size counts something else."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys for the dtype of the weights, the older one last."""

TOKEN_KEY = re.compile(r"\w+_tokens?")
"""Keys that name tokens by their text, in tokenizer_config.json and similar files."""

CODE = ("auto_map", "custom_pipelines")
"""Keys that point at Python files of a checkpoint, which are never run and are left out."""

NAMING = (
    *("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"),
    *("targets", "quantized_layers"),
)
"""Keys of a quantization_config that hold names of modules, in a list or as an object's keys: those
that are not quantized, or that are, or how each is."""

MODULE = re.compile(r"[\w.*-]+")
"""The name of a module, written out or with wildcards."""

ANY_NUMBER = re.compile(r"(\[0-9\]|\\d)[+*]?")
NUMBERED = re.compile(r"(layers|experts|h|blocks)\W+[0-9]")
"""In a pattern: any number, and a number of a layer or an expert."""


def token_references(checkpoint: Checkpoint, tokens: dict[str, int]) -> dict[int, list[str]]:
    """Id of each of ``tokens`` that a JSON file beside the weights needs → the files and keys.

    A file names a token by its number or by its text.
    """
    found: dict[int, list[str]] = {}
    for path in _documents(checkpoint.path):
        data = read_json(path)
        named = {token: tokens[token] for token in referenced_tokens(data) if token in tokens}
        if path == checkpoint.config_path:
            data = fill_defaults(data, lambda old: old, checkpoint.family)
        for keys, id_ in reference_paths(data, path).items():
            where = ".".join(map(str, keys[1:]))
            found.setdefault(id_, []).append(f"{path.name}: {where}")
        for id_ in named.values():
            found.setdefault(id_, []).append(path.name)
    return {id_: found[id_] for id_ in sorted(found.keys() & set(tokens.values()))}


def referenced_tokens(data: Mapping[str, Any]) -> set[str]:
    """Every token that ``data`` names by its text for a role, such as bos_token.

    Lists such as additional_special_tokens give no role: the tokens they name may be removed.
    """
    found: set[str] = set()
    for key, value in data.items():
        if TOKEN_KEY.fullmatch(key):
            roles = isinstance(value, dict) and "content" not in value
            found |= {_text(entry) for entry in (value.values() if roles else [value])}
    return found - {""}


def remove_tokens(
    data: dict[str, Any], is_removed: Callable[[str], bool], where: object
) -> dict[str, Any]:
    """Return a copy of ``data`` whose lists and added_tokens_decoder name no removed token.

    Otherwise transformers would add each removed token again, at id V'.

    Raises:
        TokenizerError: a removed token has a role.
    """
    result = {}
    for key, value in data.items():
        if key == "added_tokens_decoder" and isinstance(value, dict):
            value = {old: token for old, token in value.items() if not is_removed(_text(token))}
        elif TOKEN_KEY.fullmatch(key) and isinstance(value, list):
            value = [entry for entry in value if not is_removed(_text(entry))]
        result[key] = value
    lost = sorted(filter(is_removed, referenced_tokens(data)))
    if lost:
        raise TokenizerError(
            f"{where}: token {lost[0]!r}", "has a role but is removed", fix="plan again"
        )
    return result


def template_tokens(directory: Path, tokens: Mapping[str, int]) -> set[int]:
    """Ids of those ``tokens`` whose text occurs in a chat template of ``directory``."""
    files = [
        *sorted(directory.glob("*.jinja")),
        *map(directory.joinpath, named_templates(directory)),
    ]
    texts = [read_file(path).decode("utf-8", "replace") for path in files]
    for path in _documents(directory):
        template = read_json(path).get("chat_template")
        named = template if isinstance(template, list) else [{"template": template}]
        found = [entry.get("template") for entry in named if isinstance(entry, dict)]
        texts += [text for text in found if isinstance(text, str)]
    text = "\n".join(texts)
    return {id_ for token, id_ in tokens.items() if token in text}


def rewrite_config(
    config: dict[str, Any], family: Family, ids: IdMap, changes: Mapping[str, int], where: Path
) -> dict[str, Any]:
    """Return config.json of the pruned model, key order kept.

    Default ids are written out: the config class would fill in the *old* ones. The pointer to
    code (``CODE``) is removed: the output has no code, and transformers knows the model type.

    Raises:
        TokenizerError: an id that is needed is removed, or a size of the text vocabulary is not
            the embedding's.
    """
    result = dict(config)
    if not ids.identity:
        result = visit_ids(fill_defaults(config, ids.new, family.model_type), ids.new, where)
        result = visit_sizes(result, ids, where)
    text = dict(family.text_config(result))
    if "vocab_size" in text or not ids.identity:
        text["vocab_size"] = ids.new_size
    for key, size in changes.items():
        text[key] = [size] * len(text[key]) if isinstance(text.get(key), list) else size
    result = {**result, family.section: text} if family.section else text
    return {key: value for key, value in result.items() if key not in CODE}


def dequantized_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return config.json of a model whose FP8 weights have become bf16, key order kept."""
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if family.section and isinstance(result.get(family.section), dict):
        section = dequantized_config(result[family.section], replace(family, section=""))
        result[family.section] = section
    named = [key for key in DTYPE_KEYS if key in result]
    return result | dict.fromkeys(named, "bfloat16")


def untied_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return config.json of a model whose lm_head is its own, key order kept."""
    result = {**config, TIE_KEY: False}
    section = config.get(family.section) if family.section else None
    return result | ({family.section: {**section, TIE_KEY: False}} if section else {})


def check_patterns(value: Any, where: Path) -> None:
    """Refuse patterns of modules that name a layer or an expert by its number.

    Raises:
        CheckpointError: a string in ``value``, part of a quantization_config, is such a pattern.
    """
    if isinstance(value, dict | list):
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            check_patterns(child, where)
    elif isinstance(value, str) and _names_by_number(value):
        raise CheckpointError(
            f"{where}: quantization_config",
            "has a pattern that names a layer or an expert by its number, which changes",
            found=repr(value),
            fix="write out the modules that it means, or keep all layers and experts",
        )


def _names_by_number(text: str) -> bool:
    """Whether ``text`` is a pattern of modules with the number of a layer or an expert in it."""
    return not MODULE.fullmatch(text) and bool(NUMBERED.search(ANY_NUMBER.sub("*", text)))


def rename_modules(data: dict[str, Any], renamed: Callable[[str], str | None]) -> dict[str, Any]:
    """Return a copy with ``renamed`` names of modules; those that it gives no name are left out."""
    result = dict(data)
    for key, value in data.items():
        if key in NAMING and isinstance(value, dict):
            named = ((renamed(name), entry) for name, entry in value.items())
            result[key] = {name: entry for name, entry in named if name is not None}
        elif isinstance(value, dict):
            result[key] = rename_modules(value, renamed)
        elif key in NAMING and isinstance(value, list):
            found = (renamed(str(name)) for name in value)
            result[key] = [name for name in found if name is not None]
    return result


def visit_sizes(data: dict[str, Any], ids: IdMap, where: object) -> dict[str, Any]:
    """Return a copy of a config with the sizes of the text vocabulary replaced by new ones.

    A vocab_offset is such a size: the ids of images or sounds begin there, after the text. A
    text_config without vocab_size gets one: its class would fill in the old size.

    Raises:
        TokenizerError: a size is neither the number of embedding rows nor that of all tokens,
            those after the last row included. Those of text alone may be fewer, where all rows
            after them are kept.
    """
    result = {}
    for key, value in data.items():
        key_path = f"{where}: {key}"
        if key in ID_SECTIONS and isinstance(value, dict):
            value = visit_sizes(value, ids, key_path)
            if key == "text_config":
                value.setdefault("vocab_size", ids.new_size)
        elif key in OFFSET_SECTIONS and isinstance(value, dict) and "vocab_offset" in value:
            offset = _new_size(value["vocab_offset"], ids, f"{key_path}: vocab_offset")
            value = {**value, "vocab_offset": offset}
        elif SIZE_KEY.fullmatch(key):
            value = _new_size(value, ids, key_path)
        result[key] = value
    return result


def _new_size(value: Any, ids: IdMap, where: str) -> Any:
    beyond = value - ids.old_size if type(value) is int else -1
    of_text = where.endswith(COUNTS) and -len(ids.kept) <= beyond < 0
    kept_after = of_text and int(ids.kept[beyond]) == value  # and so are all of its end
    if value is not None and beyond not in (0, ids.rowless) and not kept_after:
        raise TokenizerError(
            where,
            "is not the size of the vocabulary to prune",
            expected=ids.old_size,
            found=value,
            fix="correct it in the source, or keep the vocabulary whole with `vocab_size`",
        )
    return None if value is None else ids.new_size + beyond


def _documents(directory: Path) -> list[Path]:
    """JSON files that may refer to tokens."""
    return [directory / name for name in sorted(DOCUMENTS) if (directory / name).exists()]


def _text(entry: Any) -> str:
    """The text of a token that is named by a string or described by an object; else ""."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""
