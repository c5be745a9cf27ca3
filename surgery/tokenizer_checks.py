"""What a tokenizer.json must be to be cut: byte-level BPE, without contradictions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import TokenizerError

AGAIN = "download the file again"


def check_tokenizer(data: dict[str, Any], path: Path) -> None:
    """Check the parsed tokenizer.json ``data``; ``path`` names it in errors.

    Raises:
        TokenizerError: not byte-level BPE, or its parts contradict each other.
    """
    _check_type(data, path)
    _check_ids(data, path)


def walk_processor(part: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a post-processor, every token id replaced by ``change(id)``."""
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


def _check_type(data: dict[str, Any], path: Path) -> None:
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(model, dict):
        raise _refusal(path, f"{kind} model")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(
            path, "has no model.vocab or model.merges", fix="download the file again"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _refusal(path, f"BPE with {key} {model[key]!r}")
    if model.get("byte_fallback") or not _has_byte_level(data):
        raise _refusal(path, "SentencePiece-style BPE")


def _check_ids(data: dict[str, Any], path: Path) -> None:
    """Ids are numbers, given once, and added tokens have the id the loader will give them."""
    vocab = data["model"]["vocab"]
    if not all(type(id_) is int and id_ >= 0 for id_ in vocab.values()):
        raise TokenizerError(path, "model.vocab has an id that is no number", fix=AGAIN)
    owner: dict[int, str] = {}
    for token, id_ in vocab.items():
        if owner.setdefault(id_, token) != token:
            raise _clash(path, id_, owner[id_], token)
    next_id = len(vocab)
    for entry in data.get("added_tokens") or []:
        if not _is_added_token(entry):
            raise TokenizerError(f"{path}: added token {entry!r}", "lacks content or id", fix=AGAIN)
        token, declared = entry["content"], entry["id"]
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
        if owner.setdefault(assigned, token) != token:
            raise _clash(path, assigned, owner[assigned], token)
    _check_references(data, path, owner)


def _check_references(data: dict[str, Any], path: Path, owner: Mapping[int, str]) -> None:
    """Padding and post-processor put only tokens into a text."""
    padding = data.get("padding")
    pads = [padding.get("pad_id")] if isinstance(padding, dict) else []
    templates: list[Any] = []
    walk_processor(data.get("post_processor"), templates.append)
    for key, ids in (("padding.pad_id", pads), ("post_processor", templates)):
        for id_ in ids:
            if type(id_) is not int or id_ not in owner:
                raise TokenizerError(
                    f"{path}: {key}",
                    "refers to no token",
                    found=f"id {id_}",
                    fix="correct the reference, or download the file again",
                )


def _is_added_token(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and type(entry.get("id")) is int
    )


def _refusal(path: Path, found: str) -> TokenizerError:
    return TokenizerError(
        path,
        "this kind of vocabulary cannot be cut yet",
        expected="byte-level BPE",
        found=found,
        fix="keep the vocabulary whole with --vocab-size and cut channels only",
    )


def _clash(path: Path, id_: int, first: str, second: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: id {id_}", "belongs to two tokens", found=f"{first!r} and {second!r}", fix=AGAIN
    )


def _has_byte_level(data: dict[str, Any]) -> bool:
    def types(part: Any) -> set[str]:
        if not isinstance(part, dict):
            return set()
        inner = [*part.get("pretokenizers", []), *part.get("decoders", [])]
        return {str(part.get("type"))}.union(*(types(child) for child in inner))

    return "ByteLevel" in types(data.get("pre_tokenizer")) | types(data.get("decoder"))
