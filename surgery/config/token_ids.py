"""Token ids in parsed JSON: every place that holds one, found by its key, and mapped.

Keys of audio tokens count (Qwen2-Audio's audio_token_index is a text token); those of codecs,
which number another vocabulary, do not.
"""

import re
from collections.abc import Callable
from typing import Any

from surgery.errors import TokenizerError
from surgery.families.default_ids import SECTIONS, Change

ID_KEY = re.compile(
    r"(?!.*(codec|codebook))"
    r"(.*_token_ids?|.*_token_index|image_patch_id|im_(start|end|newline)_id"
    r"|(image|slice)_(start|end)_id|newline_id|(pad|unk|bos|eos|mask)_index"
    r"|(begin_)?suppress_tokens|(bad|force)_words_ids)"
)
"""Keys whose numbers, bare or in lists, are token ids."""

IMAGE_NAME = re.compile(r"IMGIMG.*|<.*>", re.DOTALL)
"""Tokens of a vocabulary_map that the model computes with; the rest is the whole vocabulary."""

LISTINGS = ("added_tokens_decoder", "vocabulary_map")
"""Objects that list tokens: they follow the vocabulary, and keep no token in it."""

JsonPath = tuple[object, ...]
"""File and keys that lead to a value; an index stands behind the last key."""

ChangeAt = Callable[[int, JsonPath], int | None]


def visit_ids(data: dict[str, Any], change: Change, where: object) -> dict[str, Any]:
    """Return a copy of ``data`` with every token id ``i`` replaced by ``change(i)``.

    Null and negative numbers mean "none" and stay. List entries whose id is gone are dropped.

    Raises:
        TokenizerError: a single value, or all entries of a list, point at an id that is gone.
    """
    return _visit_object(data, lambda old, place: change(old), (where,))


def id_places(data: dict[str, Any], where: object) -> dict[JsonPath, int]:
    """Place → id, for every token id in ``data``."""
    found: dict[JsonPath, int] = {}

    def note(old: int, place: JsonPath) -> int:
        found[place] = old
        return old

    _visit_object(data, note, (where,))
    return found


def referenced_ids(data: dict[str, Any], where: object) -> set[int]:
    """Every token id that ``data`` refers to; a mere listing is no reference."""
    return {i for place, i in id_places(data, where).items() if not _is_listing(place)}


def _is_listing(place: JsonPath) -> bool:
    image = place[-2] == "vocabulary_map" and IMAGE_NAME.fullmatch(str(place[-1]))
    return place[-2] in LISTINGS and not image


def _visit_object(data: dict[str, Any], change: ChangeAt, place: JsonPath) -> dict[str, Any]:
    return {key: _visit_key(key, value, change, (*place, key)) for key, value in data.items()}


def _visit_key(key: str, value: Any, change: ChangeAt, place: JsonPath) -> Any:
    if isinstance(value, dict):
        visit = _OBJECTS.get(key)
        return visit(value, change, place) if visit else value
    if key == "sequence_bias" and isinstance(value, list):
        new: Any = _visit_biases(value, change, place)
    elif key == "forced_decoder_ids" and isinstance(value, list):
        new = _visit_forced(value, change, place)
    elif ID_KEY.fullmatch(key):
        new = _visit(value, change, place)
    else:
        return value
    if (new is None and value is not None) or (new == [] and value != []):
        raise _no_token(place, value)
    return new


def _visit(value: Any, change: ChangeAt, place: JsonPath) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        return value
    if isinstance(value, int):
        return change(value, place)
    if not isinstance(value, list):
        return value
    if any(isinstance(entry, list) for entry in value):
        return [new for new in _visit_lists(value, change, place) if new]
    mapped = [_visit(entry, change, _at(place, i)) for i, entry in enumerate(value)]
    return [new for new, old in zip(mapped, value, strict=True) if new is not None or old is None]


def _visit_lists(lists: list[Any], change: ChangeAt, place: JsonPath) -> list[list[Any] | None]:
    """Map lists of ids; one that loses an id is None."""
    if not all(isinstance(entry, list) for entry in lists):
        raise _malformed(place, lists)
    mapped = [_visit(entry, change, _at(place, i)) for i, entry in enumerate(lists)]
    return [new if len(new) == len(old) else None for new, old in zip(mapped, lists, strict=True)]


def _visit_biases(value: list[Any], change: ChangeAt, place: JsonPath) -> list[Any]:
    pairs = [_pair(entry, place) for entry in value]
    new = _visit_lists([ids for ids, _ in pairs], change, place)
    return [[ids, bias] for ids, (_, bias) in zip(new, pairs, strict=True) if ids]


def _visit_forced(value: list[Any], change: ChangeAt, place: JsonPath) -> list[Any]:
    """Pairs of a position and the id that is forced there."""
    pairs = [_pair(entry, place) for entry in value]
    new = [_visit(old, change, _at(place, i)) for i, (_, old) in enumerate(pairs)]
    return [
        [at, id_]
        for id_, (at, old) in zip(new, pairs, strict=True)
        if id_ is not None or old is None
    ]


def _visit_bias_keys(value: dict[str, Any], change: ChangeAt, place: JsonPath) -> dict[str, Any]:
    """Biases as transformers prints a dict of them: "(4, 7)" → bias."""
    result = {}
    for key, bias in value.items():
        if not re.fullmatch(r"[(\[]?\d{1,15}(, ?\d{1,15})*,?[)\]]?", key):
            raise _malformed(place, key)
        old = [int(number) for number in re.findall(r"\d+", key)]
        new = [change(id_, _at((*place, key), i)) for i, id_ in enumerate(old)]
        if None not in new:
            result[re.sub(r"\d+", "{}", key).format(*new)] = bias
    if value and not result:
        raise _no_token(place, value)
    return result


def _visit_decoder(value: dict[str, Any], change: ChangeAt, place: JsonPath) -> dict[str, Any]:
    result = {}
    for key, token in value.items():
        new = change(int(key), (*place, key)) if re.fullmatch("[0-9]{1,15}", key) else None
        if new is None:
            raise TokenizerError(
                _name((*place, key)),
                "is the id of no token that stays",
                fix="correct the id in the source, or remove the entry",
            )
        result[str(new)] = token
    return result


def _visit_map(value: dict[str, Any], change: ChangeAt, place: JsonPath) -> dict[str, Any]:
    """Token → id, of the whole vocabulary (Chameleon, Emu3): the keys are texts, never ids."""
    result = {}
    for token, old in value.items():
        new = _visit(old, change, (*place, token))
        if new is not None:
            result[token] = new
        elif IMAGE_NAME.fullmatch(token):
            raise _no_token((*place, token), old)
    return result


_OBJECTS: dict[str, Callable[[dict[str, Any], ChangeAt, JsonPath], dict[str, Any]]] = {
    **dict.fromkeys(SECTIONS, _visit_object),
    "added_tokens_decoder": _visit_decoder,
    "sequence_bias": _visit_bias_keys,
    "vocabulary_map": _visit_map,
}
"""Key → how its object is visited; other objects are left alone."""


def _pair(entry: Any, place: JsonPath) -> tuple[Any, Any]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise _malformed(place, entry)
    return entry[0], entry[1]


def _at(place: JsonPath, index: int) -> JsonPath:
    return (*place[:-1], f"{place[-1]}[{index}]")


def _name(place: JsonPath) -> str:
    return ": ".join(map(str, place))


def _no_token(place: JsonPath, value: object) -> TokenizerError:
    return TokenizerError(
        _name(place),
        "points at no token that stays",
        found=value if isinstance(value, int) else str(value)[:80],
        fix="correct the id in the source, or remove the key",
    )


def _malformed(place: JsonPath, found: object) -> TokenizerError:
    return TokenizerError(
        _name(place),
        "is not of a form that is known",
        found=str(found)[:80],
        fix="correct it in the source",
    )
