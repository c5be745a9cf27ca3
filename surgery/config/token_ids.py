"""Token ids in parsed JSON: find every value that is one, by its key, and map it.

Keys of audio tokens count: Qwen2-Audio's audio_token_index is a text token. Keys of codecs do not:
their ids belong to another vocabulary.
"""

import re
from collections.abc import Callable
from typing import Any

from surgery.errors import TokenizerError
from surgery.families.default_ids import ID_SECTIONS, MEDIA_IDS, OFFSET_SECTIONS, Change

ID_KEY = re.compile(
    r"(?!.*(codec|codebook))"
    r"(.*_token_ids?|.*_token_index|image_patch_id|im_(start|end|newline)_id"
    r"|(image|slice)_(start|end)_id|newline_id|(pad|unk|bos|eos|mask)_index"
    r"|(begin_)?suppress_tokens|(bad|force)_words_ids)"
)
"""Keys whose numbers, bare or in lists, are token ids."""

IMAGE_NAME = re.compile(r"IMGIMG.*|<.*>", re.DOTALL)
"""Tokens of a vocabulary_map that the model itself uses; the map lists all others, too."""

LISTINGS = ("added_tokens_decoder", "vocabulary_map")
"""Objects that list tokens: they follow the vocabulary, and are no reason to keep a token."""

JsonPath = tuple[object, ...]
"""File and keys that lead to a value; the last key may carry an index, as in ``ids[0]``."""

ChangeAt = Callable[[int, JsonPath], int | None]


def visit_ids(data: dict[str, Any], change: Change, where: object) -> dict[str, Any]:
    """Return a copy of ``data`` with every token id ``i`` replaced by ``change(i)``.

    Null and negative numbers mean "none" and do not change. List entries whose id is removed are
    removed.

    Raises:
        TokenizerError: a single value, or all entries of a list, point at a removed id; or an id
            is written as a text or with a point.
    """
    return _visit_object(data, lambda old, path: change(old), (where,))


def id_paths(data: dict[str, Any], where: object) -> dict[JsonPath, int]:
    """Path → id, for every token id in ``data``."""
    found: dict[JsonPath, int] = {}

    def note(old: int, path: JsonPath) -> int:
        found[path] = old
        return old

    _visit_object(data, note, (where,))
    return found


def reference_paths(data: dict[str, Any], where: object) -> dict[JsonPath, int]:
    """Path → id, for every token id that ``data`` refers to; a mere listing is not a reference."""
    return {path: i for path, i in id_paths(data, where).items() if not _is_listing(path)}


def _is_listing(path: JsonPath) -> bool:
    image = path[-2] == "vocabulary_map" and IMAGE_NAME.fullmatch(str(path[-1]))
    return path[-2] in LISTINGS and not image


def _visit_object(data: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    return {key: _visit_key(key, value, change, (*path, key)) for key, value in data.items()}


def _visit_key(key: str, value: Any, change: ChangeAt, path: JsonPath) -> Any:
    if isinstance(value, dict):
        visit = _OBJECTS.get(key)
        return visit(value, change, path) if visit else value
    if key == "sequence_bias" and isinstance(value, list):
        new: Any = _visit_biases(value, change, path)
    elif key == "forced_decoder_ids" and isinstance(value, list):
        new = _visit_forced(value, change, path)
    elif ID_KEY.fullmatch(key):
        new = _visit(value, change, path)
    else:
        return value
    if (new is None and value is not None) or (new == [] and value != []):
        raise _no_token(path, value)
    return new


def _visit(value: Any, change: ChangeAt, path: JsonPath) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        return value
    if isinstance(value, int):
        return change(value, path)
    if isinstance(value, float) or (isinstance(value, str) and value.isdecimal()):
        raise _malformed(path, value)
    if not isinstance(value, list):
        return value
    if any(isinstance(entry, list) for entry in value):
        return [new for new in _visit_lists(value, change, path) if new]
    mapped = [_visit(entry, change, _at(path, i)) for i, entry in enumerate(value)]
    return [new for new, old in zip(mapped, value, strict=True) if new is not None or old is None]


def _visit_lists(lists: list[Any], change: ChangeAt, path: JsonPath) -> list[list[Any] | None]:
    """Map lists of ids; a list that loses an id becomes None."""
    if not all(isinstance(entry, list) for entry in lists):
        raise _malformed(path, lists)
    mapped = [_visit(entry, change, _at(path, i)) for i, entry in enumerate(lists)]
    return [new if len(new) == len(old) else None for new, old in zip(mapped, lists, strict=True)]


def _visit_biases(value: list[Any], change: ChangeAt, path: JsonPath) -> list[Any]:
    pairs = [_pair(entry, path) for entry in value]
    new = _visit_lists([ids for ids, _ in pairs], change, path)
    return [[ids, bias] for ids, (_, bias) in zip(new, pairs, strict=True) if ids]


def _visit_forced(value: list[Any], change: ChangeAt, path: JsonPath) -> list[Any]:
    """Map the ids of pairs (position, id that is forced there)."""
    pairs = [_pair(entry, path) for entry in value]
    new = [_visit(old, change, _at(path, i)) for i, (_, old) in enumerate(pairs)]
    return [
        [at, id_]
        for id_, (at, old) in zip(new, pairs, strict=True)
        if id_ is not None or old is None
    ]


def _visit_bias_keys(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    """Biases as transformers prints a dict of them: "(4, 7)" → bias."""
    result = {}
    for key, bias in value.items():
        if not re.fullmatch(r"[(\[]?\d{1,15}(, ?\d{1,15})*,?[)\]]?", key):
            raise _malformed(path, key)
        old = [int(number) for number in re.findall(r"\d+", key)]
        new = [change(id_, _at((*path, key), i)) for i, id_ in enumerate(old)]
        if None not in new:
            result[re.sub(r"\d+", "{}", key).format(*new)] = bias
    if value and not result:
        raise _no_token(path, value)
    return result


def _visit_media(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    """Map the ids of the text that a section of images or sounds has; all others are its own."""
    return value | {
        key: _visit_key(key, value[key], change, (*path, key)) for key in MEDIA_IDS if key in value
    }


def _visit_decoder(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    result = {}
    for key, token in value.items():
        new = change(int(key), (*path, key)) if re.fullmatch("[0-9]{1,15}", key) else None
        if new is None:
            raise TokenizerError(
                _name((*path, key)),
                "is the id of no token that is kept",
                fix="correct the id in the source, or remove the entry",
            )
        result[str(new)] = token
    return result


def _visit_tasks(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    """Map the ids of settings that hold for a task: task → settings."""
    return {
        task: _visit_object(settings, change, (*path, task))
        if isinstance(settings, dict)
        else settings
        for task, settings in value.items()
    }


def _visit_named(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    """Map token → id of the tokens that name a language or a task (Whisper)."""
    new = {token: _visit(old, change, (*path, token)) for token, old in value.items()}
    if None in new.values():
        raise _no_token(path, value)
    return new


def _visit_map(value: dict[str, Any], change: ChangeAt, path: JsonPath) -> dict[str, Any]:
    """Map token → id of the whole vocabulary (Chameleon, Emu3): the keys are texts, never ids."""
    result = {}
    for token, old in value.items():
        new = _visit(old, change, (*path, token))
        if new is not None:
            result[token] = new
        elif IMAGE_NAME.fullmatch(token):
            raise _no_token((*path, token), old)
    return result


_OBJECTS: dict[str, Callable[[dict[str, Any], ChangeAt, JsonPath], dict[str, Any]]] = {
    **dict.fromkeys(ID_SECTIONS, _visit_object),
    **dict.fromkeys(OFFSET_SECTIONS, _visit_media),
    "added_tokens_decoder": _visit_decoder,
    "sequence_bias": _visit_bias_keys,
    **dict.fromkeys(("lang_to_id", "task_to_id"), _visit_named),
    "task_specific_params": _visit_tasks,
    "vocabulary_map": _visit_map,
}
"""Key → how its object is visited; other objects do not change."""


def _pair(entry: Any, path: JsonPath) -> tuple[Any, Any]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise _malformed(path, entry)
    return entry[0], entry[1]


def _at(path: JsonPath, index: int) -> JsonPath:
    return (*path[:-1], f"{path[-1]}[{index}]")


def _name(path: JsonPath) -> str:
    return ": ".join(map(str, path))


def _no_token(path: JsonPath, value: object) -> TokenizerError:
    return TokenizerError(
        _name(path),
        "points at no token that is kept",
        found=value if isinstance(value, int) else str(value)[:80],
        fix="correct the id in the source, or remove the key",
    )


def _malformed(path: JsonPath, found: object) -> TokenizerError:
    return TokenizerError(
        _name(path),
        "has an unknown form",
        found=str(found)[:80],
        fix="correct it in the source",
    )
