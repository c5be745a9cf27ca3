"""Checks of a tokenizer.json before it is pruned: a known kind, without contradictions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import AMEND, TokenizerError
from surgery.files.index_sets import MAX_SIZE
from surgery.tokenizer.kinds import kind_of
from surgery.tokenizer.merges import MergeRules, check_form

MOST_STEPS = 1 << 28
"""Limit for the sum of the squares of all tokens' lengths: what running BPE on them costs.

Gemma 3's 262,144 tokens come to 11 million.
"""


def check_tokenizer(data: dict[str, Any], path: Path) -> None:
    """Check the parsed tokenizer.json ``data``; ``path`` names it in errors.

    Raises:
        TokenizerError: its kind cannot be pruned, or its parts contradict each other.
    """
    kind_of(data, path)
    model = data["model"]
    if isinstance(model.get("vocab"), list):
        model_ids = _piece_ids(model["vocab"], path)
    elif isinstance(model.get("vocab"), dict):
        model_ids = model["vocab"]
    else:
        raise TokenizerError(path, "has no model.vocab", fix=AMEND)
    if model["type"] == "BPE" or "merges" in model:
        _check_merges(model.get("merges"), path)
    if (model["type"] == "Unigram") != isinstance(model["vocab"], list):
        raise TokenizerError(path, f"model.vocab is not that of a {model['type']} model", fix=AMEND)
    if sum(len(token) ** 2 for token in model_ids) > MOST_STEPS:
        longest = max(map(len, model_ids))
        raise TokenizerError(
            path,
            "has tokens that are too long",
            found=f"one of {longest:,} characters",
            fix=AMEND,
        )
    _check_unknown(model, model_ids, path)
    _check_ids(data, model_ids, path)


def walk_processor(part: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a post-processor and replace every token id by ``change(id)``."""
    if isinstance(part, list):
        return [walk_processor(child, change) for child in part]
    if not isinstance(part, dict):
        return part
    result = {}
    for key, value in part.items():
        if key == "ids" and isinstance(value, list):
            result[key] = [change(id_) for id_ in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            result[key] = [value[0], change(value[1])]
        else:
            result[key] = walk_processor(value, change)
    return result


def _check_merges(merges: Any, path: Path) -> None:
    """Check that merges are a list, all "a b" or all [a, b]; ``rule_ids`` checks the pairs."""
    if isinstance(merges, MergeRules):
        return  # checked as they were read
    if not isinstance(merges, list):
        raise TokenizerError(path, "has no model.merges", fix=AMEND)
    rules = merges[1:] if merges and str(merges[0]).startswith("#version") else merges
    for rule in rules:
        check_form(rule, rules[0], path)


def check_numbers(vocab: Mapping[str, Any], path: Path) -> None:
    """Check that every id is a number, and not too large for the row of a table."""
    if not all(type(id_) is int and 0 <= id_ < MAX_SIZE for id_ in vocab.values()):
        raise TokenizerError(path, "model.vocab has an id that is not a number", fix=AMEND)


def _check_unknown(model: Mapping[str, Any], vocab: Mapping[str, int], path: Path) -> None:
    """Check that unk_token or unk_id, for text without other tokens, names a token."""
    token, id_ = model.get("unk_token"), model.get("unk_id")
    if not isinstance(token, str | None) or (type(id_) is int and not 0 <= id_ < len(vocab)):
        raise TokenizerError(
            f"{path}: model.unk_{'token' if id_ is None else 'id'}",
            "is not a token",
            found=token if id_ is None else id_,
            fix=AMEND,
        )


def _piece_ids(pieces: list[Any], path: Path) -> dict[str, int]:
    """Piece → id of a Unigram vocabulary, whose entries are [piece, score]."""
    ids: dict[str, int] = {}
    for id_, entry in enumerate(pieces):
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], int | float)
        ):
            raise TokenizerError(
                f"{path}: piece {id_}",
                "is not a piece with a score",
                expected='["piece", -1.5]',
                found=str(entry)[:80],
                fix=AMEND,
            )
        if ids.setdefault(entry[0], id_) != id_:
            raise TokenizerError(
                f"{path}: piece {entry[0]!r}",
                "occurs twice",
                found=f"ids {ids[entry[0]]} and {id_}",
                fix=AMEND,
            )
    return ids


def _check_ids(data: dict[str, Any], vocab: dict[str, int], path: Path) -> None:
    """Check that ids are numbers, each given once, and that added tokens have the loader's ids."""
    check_numbers(vocab, path)
    known = np.zeros(max(vocab.values(), default=0) + 1, dtype=bool)
    known[np.fromiter(vocab.values(), dtype=np.int64, count=len(vocab))] = True
    if np.count_nonzero(known) < len(vocab):
        _raise_clash(vocab, path)
    next_id = len(vocab)
    owner = {id_: token for token, id_ in vocab.items() if id_ >= next_id}
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError(path, "added_tokens is not a list", fix=AMEND)
    for entry in added:
        if not _is_added_token(entry):
            raise TokenizerError(f"{path}: added token {entry!r}", "lacks content or id", fix=AMEND)
        token, declared = entry["content"], entry["id"]
        if not token:
            continue  # the library ignores it, and the pruned file leaves it out
        assigned = vocab.get(token, next_id)
        next_id += token not in vocab
        if declared != assigned:
            raise TokenizerError(
                f"{path}: added token {token!r}",
                "has another id than the tokenizers library will give it",
                expected=assigned,
                found=declared,
                fix="save the tokenizer again with the library that made it",
            )
        if token not in vocab and owner.setdefault(assigned, token) != token:
            raise _clash(path, assigned, owner[assigned], token)
    _check_references(
        data, path, lambda id_: id_ in owner or (0 <= id_ < len(known) and bool(known[id_]))
    )


def _raise_clash(vocab: Mapping[str, int], path: Path) -> None:
    owner: dict[int, str] = {}
    for token, id_ in vocab.items():
        if owner.setdefault(id_, token) != token:
            raise _clash(path, id_, owner[id_], token)


def _check_references(data: dict[str, Any], path: Path, is_token: Callable[[int], bool]) -> None:
    """Check that padding and post-processor refer only to tokens."""
    padding = data.get("padding")
    pads = [padding.get("pad_id")] if isinstance(padding, dict) else []
    templates: list[Any] = []
    walk_processor(data.get("post_processor"), templates.append)
    for key, ids in (("padding.pad_id", pads), ("post_processor", templates)):
        for id_ in ids:
            if type(id_) is not int or not is_token(id_):
                raise TokenizerError(
                    f"{path}: {key}",
                    "refers to no token",
                    found=f"id {id_}",
                    fix=AMEND,
                )


def _is_added_token(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and type(entry.get("id")) is int
    )


def _clash(path: Path, id_: int, first: str, second: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: id {id_}",
        "belongs to two tokens",
        found=f"{first!r} and {second!r}",
        fix=AMEND,
    )
