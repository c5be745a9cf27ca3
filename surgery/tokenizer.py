"""tokenizer.json as the pruner sees it: loaded and validated, rewritten through the id map."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.checkpoint import TOKENIZER_NAME
from surgery.errors import TokenizerError
from surgery.idmap import IdMap
from surgery.jsonfile import read_json

FILE_NAME = TOKENIZER_NAME
AGAIN = "download the file again"


@dataclass(frozen=True, eq=False)
class TokenizerFile:
    """A byte-level BPE tokenizer.json that can be cut."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "TokenizerFile":
        """Load and validate ``directory/tokenizer.json``.

        Raises:
            TokenizerError: absent, not byte-level BPE, or its parts contradict each other.
        """
        path = directory / FILE_NAME
        if not path.exists():
            raise TokenizerError(
                path,
                "is missing",
                fix="save the tokenizer with transformers' AutoTokenizer, or keep the vocabulary "
                "whole",
            )
        tokenizer = cls(path, read_json(path))
        tokenizer._check_type()
        tokenizer._check_ids()
        return tokenizer

    @classmethod
    def reopen(cls, directory: Path) -> "TokenizerFile":
        """Load a file that ``open`` has seen: a plan's fingerprint says that it is the same.

        Without the search for keys given twice it takes a third less memory, which makes it the
        smaller part of apply's.
        """
        path = directory / FILE_NAME
        try:
            tokenizer = cls(path, msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            raise TokenizerError(path, "cannot be read", found=error, fix=AGAIN) from error
        tokenizer._check_type()
        tokenizer._check_ids()
        return tokenizer

    @property
    def vocab(self) -> dict[str, int]:
        """Token → id, as the model has it (added tokens outside of it are in ``added``)."""
        vocab: dict[str, int] = self.data["model"]["vocab"]
        return vocab

    @cached_property
    def merge_entries(self) -> list[Any]:
        """Merge rules as the file has them, "a b" or [a, b], without a ``#version`` line."""
        merges = self.data["model"]["merges"]
        return [m for m in merges if not (isinstance(m, str) and m.startswith("#version"))]

    @cached_property
    def merges(self) -> np.ndarray:
        """int64 ``[merges, 3]``: ids of left part, right part and product, by rank.

        Raises:
            TokenizerError: a rule is no pair, or a part or product is not in the vocabulary.
        """
        return np.fromiter(self._merge_ids(), dtype=(np.int64, 3), count=len(self.merge_entries))

    def _merge_ids(self) -> Iterator[tuple[int, int, int]]:
        """One rule at a time: a list of all of them would double apply's memory."""
        vocab = self.vocab
        for entry in self.merge_entries:
            left, right = _pair(entry, self.path)
            try:
                yield vocab[left], vocab[right], vocab[left + right]
            except KeyError as error:
                raise TokenizerError(
                    f"{self.path}: merge {left!r} {right!r}",
                    "needs a token that the vocabulary lacks",
                    expected=repr(error.args[0]),
                    fix=AGAIN,
                ) from error

    @cached_property
    def added(self) -> dict[str, int]:
        """Added tokens (special ones among them) → id."""
        return {token["content"]: token["id"] for token in self.data.get("added_tokens") or []}

    @property
    def ignore_merges(self) -> bool:
        """Whether a whole pre-token that is in the vocabulary needs no merges (Llama 3)."""
        return bool(self.data["model"].get("ignore_merges"))

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Every token → id, added ones included."""
        return {**self.vocab, **self.added}

    def rewrite(self, ids: IdMap) -> dict[str, Any]:
        """Return tokenizer.json for the kept tokens: same keys, same order, new ids.

        Every merge whose parents and product stay is kept, in order.

        Raises:
            TokenizerError: the post-processor or the padding refers to a token that goes.
        """
        model = dict(self.data["model"])
        model["vocab"] = {
            token: new for token, old in self.vocab.items() if (new := ids.new(old)) is not None
        }
        stays = ids.keep_mask()[self.merges].all(axis=1)
        model["merges"] = list(compress(self.merge_entries, stays))
        data = {**self.data, "model": model}
        if data.get("added_tokens"):
            data["added_tokens"] = [
                {**token, "id": self._map(ids, token["id"], "added_tokens")}
                for token in data["added_tokens"]
            ]
        if isinstance(data.get("padding"), dict):
            pad_id = self._map(ids, data["padding"]["pad_id"], "padding.pad_id")
            data["padding"] = {**data["padding"], "pad_id": pad_id}
        data["post_processor"] = self._map_processor(ids, data.get("post_processor"))
        return data

    def referenced_ids(self) -> set[int]:
        """Ids that padding and the post-processor put into every text."""
        found: set[int] = set()
        if isinstance(self.data.get("padding"), dict):
            found.add(self.data["padding"]["pad_id"])

        def note(id_: int) -> int:
            found.add(id_)
            return id_

        _walk_processor(self.data.get("post_processor"), note)
        return found

    def _map_processor(self, ids: IdMap, processor: Any) -> Any:
        return _walk_processor(processor, lambda id_: self._map(ids, id_, "post_processor"))

    def _map(self, ids: IdMap, old: int, key: str) -> int:
        new = ids.new(old)
        if new is None:
            raise TokenizerError(
                f"{self.path}: {key}",
                "refers to a token that does not stay",
                found=f"id {old}",
                fix="correct the reference in the source",
            )
        return new

    def _check_type(self) -> None:
        model = self.data.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind != "BPE" or not isinstance(model, dict):
            raise _refusal(self.path, f"{kind} model")
        if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
            raise TokenizerError(
                self.path, "has no model.vocab or model.merges", fix="download the file again"
            )
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise _refusal(self.path, f"BPE with {key} {model[key]!r}")
        if model.get("byte_fallback") or not _has_byte_level(self.data):
            raise _refusal(self.path, "SentencePiece-style BPE")

    def _check_ids(self) -> None:
        """Ids are numbers, given once, and added tokens have the id the loader will give them."""
        if not all(type(id_) is int and id_ >= 0 for id_ in self.vocab.values()):
            raise TokenizerError(self.path, "model.vocab has an id that is no number", fix=AGAIN)
        owner: dict[int, str] = {}
        for token, id_ in self.vocab.items():
            if owner.setdefault(id_, token) != token:
                raise _clash(self.path, id_, owner[id_], token)
        next_id = len(self.vocab)
        for entry in self.data.get("added_tokens") or []:
            if not _is_added_token(entry):
                raise TokenizerError(
                    f"{self.path}: added token {entry!r}", "lacks content or id", fix=AGAIN
                )
            token, declared = entry["content"], entry["id"]
            assigned = self.vocab.get(token, next_id)
            next_id += token not in self.vocab
            if declared != assigned:
                raise TokenizerError(
                    f"{self.path}: added token {token!r}",
                    "has another id than the tokenizers library will give it",
                    expected=assigned,
                    found=declared,
                    fix="save the tokenizer again with the library that made it",
                )
            if owner.setdefault(assigned, token) != token:
                raise _clash(self.path, assigned, owner[assigned], token)
        self._check_references(owner)

    def _check_references(self, owner: Mapping[int, str]) -> None:
        """Padding and post-processor put only tokens into a text."""
        padding = self.data.get("padding")
        pads = [padding.get("pad_id")] if isinstance(padding, dict) else []
        templates: list[Any] = []
        _walk_processor(self.data.get("post_processor"), templates.append)
        for key, ids in (("padding.pad_id", pads), ("post_processor", templates)):
            for id_ in ids:
                if type(id_) is not int or id_ not in owner:
                    raise TokenizerError(
                        f"{self.path}: {key}",
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


def _pair(entry: Any, path: Path) -> tuple[str, str]:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not (isinstance(parts, list) and [type(part) for part in parts] == [str, str]):
        raise TokenizerError(f"{path}: merge {entry!r}", "is not a pair of tokens", fix=AGAIN)
    return parts[0], parts[1]


def _has_byte_level(data: dict[str, Any]) -> bool:
    def types(part: Any) -> set[str]:
        if not isinstance(part, dict):
            return set()
        inner = [*part.get("pretokenizers", []), *part.get("decoders", [])]
        return {str(part.get("type"))}.union(*(types(child) for child in inner))

    return "ByteLevel" in types(data.get("pre_tokenizer")) | types(data.get("decoder"))


def _walk_processor(part: Any, change: Any) -> Any:
    """Copy a post-processor, every token id replaced by ``change(id)``."""
    if isinstance(part, list):
        return [_walk_processor(child, change) for child in part]
    if not isinstance(part, dict):
        return part
    result = {}
    for key, value in part.items():
        if key == "ids" and isinstance(value, list):
            result[key] = [change(id_) for id_ in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            result[key] = [value[0], change(value[1])]
        else:
            result[key] = _walk_processor(value, change)
    return result
