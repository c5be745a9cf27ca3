"""Token ids and sizes in the JSON files beside the weights: found, and rewritten in place."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.checkpoint import INDEX_NAME, TOKENIZER_NAME, Checkpoint
from surgery.errors import TokenizerError
from surgery.families import FFN, VOCAB, Family, family_of
from surgery.idmap import IdMap
from surgery.jsonfile import read_json

ID_KEY = re.compile(
    r".*_token_ids?|.*_token_index|image_patch_id|im_(start|end|newline)_id"
    r"|(image|slice)_(start|end)_id|newline_id|(pad|unk|bos|eos|mask)_index"
    r"|(begin_)?suppress_tokens|(bad|force)_words_ids"
)
"""Keys whose numbers, bare or in lists, are token ids."""

SECTIONS = ("text_config", "llm_config", "thinker_config", "encoder", "decoder")
"""Parts of a config whose ids belong to the same vocabulary."""

TOKEN_KEY = re.compile(r"(bos|eos|unk|pad|sep|cls|mask|\w+_special)_tokens?")
"""Keys of tokenizer_config.json and special_tokens_map.json that name tokens by their text."""

VOCABULARY_FILES = (TOKENIZER_NAME, "vocab.json", "added_tokens.json", INDEX_NAME)
"""JSON files that list tokens or tensors instead of referring to tokens."""

Change = Callable[[int], int | None]


def visit_ids(data: dict[str, Any], change: Change, where: object) -> dict[str, Any]:
    """Return a copy of ``data`` with every token id ``i`` replaced by ``change(i)``.

    Null and negative numbers mean "none" and stay. List entries whose id is gone are dropped.

    Raises:
        TokenizerError: a single value, or all entries of a list, point at an id that is gone.
    """
    result = {}
    for key, value in data.items():
        if key in SECTIONS and isinstance(value, dict):
            value = visit_ids(value, change, f"{where}: {key}")
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            value = {
                str(_change_key(old, change, f"{where}: {key}")): token
                for old, token in value.items()
            }
        elif key == "sequence_bias" and isinstance(value, list):
            pairs = [_pair(entry, f"{where}: {key}") for entry in value]
            new = _visit_lists([ids for ids, _ in pairs], change, f"{where}: {key}")
            value = [[ids, bias] for ids, (_, bias) in zip(new, pairs, strict=True) if ids]
        elif key == "forced_decoder_ids" and isinstance(value, list):
            pairs = [_pair(entry, f"{where}: {key}") for entry in value]
            mapped = [(at, old, _visit(old, change, where)) for at, old in pairs]
            value = [[at, new] for at, old, new in mapped if new is not None or old is None]
        elif ID_KEY.fullmatch(key):
            value = _visit_key(key, value, change, where)
        result[key] = value
    return result


def referenced_ids(data: dict[str, Any], where: object) -> set[int]:
    """Every token id that the config ``data`` names."""
    found: set[int] = set()

    def note(old: int) -> int:
        found.add(old)
        return old

    visit_ids(data, note, where)
    return found


def referenced_tokens(data: dict[str, Any]) -> set[str]:
    """Every token that tokenizer_config.json or special_tokens_map.json names by its text."""
    found: set[str] = set()
    for key, value in data.items():
        if TOKEN_KEY.fullmatch(key):
            entries = (
                value.values()
                if isinstance(value, dict) and "content" not in value
                else (value if isinstance(value, list) else [value])
            )
            found |= {e["content"] if isinstance(e, dict) else e for e in entries if e}
    return {token for token in found if isinstance(token, str)}


def token_references(checkpoint: Checkpoint, tokens: dict[str, int]) -> set[int]:
    """Ids of ``tokens`` that a JSON file beside the weights names, by number or by text."""
    family = family_of(checkpoint.config, checkpoint.path / "config.json")
    found = {i for key, i in family.default_ids.items() if key not in checkpoint.config}
    for path in sorted(checkpoint.path.glob("*.json")):
        if path.name in VOCABULARY_FILES:
            continue
        data = read_json(path)
        found |= referenced_ids(data, path)
        found |= {tokens[token] for token in referenced_tokens(data) if token in tokens}
    return found & set(tokens.values())


def rewrite_config(
    config: dict[str, Any], family: Family, ids: IdMap, intermediate_size: int, where: Path
) -> dict[str, Any]:
    """Return config.json of the pruned model, key order kept.

    Ids that the config class would fill in with the *old* defaults are written out.
    """
    result = dict(config)
    if not ids.identity:
        result = visit_ids(result, ids.new, where)
        result.update(
            (key, ids.new(old)) for key, old in family.default_ids.items() if key not in config
        )
    result[family.sizes[VOCAB]] = ids.new_size
    result[family.sizes[FFN]] = intermediate_size
    return result


def _visit_key(key: str, value: Any, change: Change, where: object) -> Any:
    new = _visit(value, change, f"{where}: {key}")
    if (new is None and value is not None) or (new == [] and value != []):
        raise TokenizerError(
            f"{where}: {key}",
            "points at no token that stays",
            found=value,
            fix="correct the id in the source, or remove the key",
        )
    return new


def _visit(value: Any, change: Change, where: object) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        return value
    if isinstance(value, int):
        return change(value)
    if not isinstance(value, list):
        return value
    if any(isinstance(entry, list) for entry in value):
        return [new for new in _visit_lists(value, change, where) if new]
    mapped = [_visit(entry, change, where) for entry in value]
    return [new for new, old in zip(mapped, value, strict=True) if new is not None or old is None]


def _visit_lists(lists: list[Any], change: Change, where: object) -> list[list[Any] | None]:
    """Map lists of ids; one that loses an id is None."""
    if not all(isinstance(entry, list) for entry in lists):
        raise _malformed(where, lists)
    mapped = [_visit(entry, change, where) for entry in lists]
    return [new if len(new) == len(old) else None for new, old in zip(mapped, lists, strict=True)]


def _pair(entry: Any, where: object) -> tuple[Any, Any]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise _malformed(where, entry)
    return entry[0], entry[1]


def _change_key(old: str, change: Change, where: object) -> int:
    new = change(int(old)) if re.fullmatch("[0-9]{1,15}", old) else None
    if new is None:
        raise TokenizerError(
            f"{where}: {old}",
            "is the id of no token that stays",
            fix="correct the id in the source, or remove the entry",
        )
    return new


def _malformed(where: object, found: object) -> TokenizerError:
    return TokenizerError(
        where, "is not a list of this form", found=str(found)[:80], fix="correct it in the source"
    )
