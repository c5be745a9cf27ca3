"""tokenizer.json: opened, rewritten for the kept tokens, and loaded by the tokenizers library."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from surgery.errors import TokenizerError, is_panic
from surgery.files.model_files import TOKENIZER_NAME
from surgery.files.strict_json import check_depth, dump_table, read_file, read_json
from surgery.process import release_freed_memory
from surgery.tokenizer.checks import check_numbers, check_tokenizer, walk_processor
from surgery.tokenizer.id_map import IdMap, KeptTokens
from surgery.tokenizer.kinds import (
    BYTE_CHARACTERS,
    BYTE_LEVEL,
    Kind,
    alphabet,
    kind_of,
    pre_tokenizer_name,
)
from surgery.tokenizer.legacy import build_tokenizer, is_legacy, with_named_tokens
from surgery.tokenizer.mapped import MappedModels
from surgery.tokenizer.marian import mapped_data, mapped_files
from surgery.tokenizer.merges import MergeRules, merge_entries, rule_ids
from surgery.tokenizer.sentencepiece_alone import alone_data, is_alone, reserved_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizerFile:
    """A tokenizer.json that can be pruned."""

    path: Path
    data: dict[str, Any]
    models: MappedModels | None = None
    """What splits text in place of ``data``, where vocab.json gives the ids of its pieces."""
    reserved: frozenset[int] = frozenset()
    """Ids that a SentencePiece model without tokenizer.json needs, whatever the text."""

    @classmethod
    def open(cls, directory: Path) -> "TokenizerFile":
        """Load and validate ``directory/tokenizer.json``, or build what it would be.

        Tokens that only the files beside it name are added, as transformers does.

        Raises:
            TokenizerError: the file is absent, its kind cannot be pruned, or its parts contradict
                each other.
        """
        path = directory / TOKENIZER_NAME
        built = _built(directory)
        if built is not None:
            return built
        if not path.exists():
            return cls(path, build_tokenizer(directory))
        data = read_json(path)
        check_tokenizer(data, path)
        return cls(path, _as_loaded(data, path))

    @classmethod
    def reopen(cls, directory: Path) -> "TokenizerFile":
        """Load a file that ``open`` has checked before; a plan's fingerprint proves it is the same.

        This saves most of apply's memory. The bytes are decoded without white space (two thirds of
        Gemma 3's file) and without a search for repeated keys. The merges become ``MergeRules``.
        """
        path = directory / TOKENIZER_NAME
        if not path.exists():
            return cls.open(directory)
        with _reading(path):
            data = _decode(msgspec.json.format(read_file(path), indent=-1), path)
        check_tokenizer(data, path)
        return cls(path, _as_loaded(data, path))

    def library(self) -> "Tokenizer":
        """The tokenizers library's tokenizer of this file."""
        if self.models is not None:
            return self.models.library(self.data)
        return _library(self.data, self.path)

    @cached_property
    def pre_tokenizer(self) -> str | None:
        """``pre_tokenizer_name`` of byte-level BPE; other kinds need no name."""
        return pre_tokenizer_name(self.library()) if self.kind is BYTE_LEVEL else None

    @cached_property
    def kind(self) -> Kind:
        """How the tokens are spelled."""
        return kind_of(self.data, self.path)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token → id, as the model has it (added tokens outside of it are in ``added``)."""
        vocab: Any = self.data["model"]["vocab"]
        return vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}

    @cached_property
    def scores(self) -> np.ndarray | None:
        """float64 by id: the pieces' log probabilities; None where the model has none."""
        vocab = self.data["model"]["vocab"]
        return None if isinstance(vocab, dict) else np.array([entry[1] for entry in vocab])

    @cached_property
    def merges(self) -> np.ndarray:
        """Integers ``[merges, 3]``: ids of left part, right part and product, by rank.

        Raises:
            TokenizerError: a rule is not a pair, or a part or product is not in the vocabulary.
        """
        merges = self.data["model"].get("merges", [])
        if isinstance(merges, MergeRules):
            return merges.ids
        entries = merge_entries(merges)
        rules = (rule_ids(entry, self.vocab, self.path) for entry in entries)
        return np.fromiter(rules, dtype=(np.int64, 3), count=len(entries))

    @cached_property
    def added(self) -> dict[str, int]:
        """Added token, special ones included → id. Entries without text are left out."""
        entries = self.data.get("added_tokens") or []
        return {entry["content"]: entry["id"] for entry in entries if entry["content"]}

    @property
    def ignore_merges(self) -> bool:
        """Whether a whole pre-token that is in the vocabulary needs no merges (Llama 3)."""
        return bool(self.data["model"].get("ignore_merges"))

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Every token → id, added ones included."""
        return {**self.vocab, **self.added}

    @cached_property
    def unknown(self) -> set[int]:
        """Id of the token for what the vocabulary cannot spell, if it has one."""
        model = self.data["model"]
        found = {model["unk_id"]} if type(model.get("unk_id")) is int else set[int]()
        if model.get("unk_token") in self.token_ids:
            found.add(self.token_ids[model["unk_token"]])
        return found

    @cached_property
    def alphabet(self) -> set[int]:
        """Ids without which some text could not be written, or only with unknown tokens."""
        if self.models is not None:
            return self.unknown | self.models.alphabet(self.vocab)
        byte_fallback = bool(self.data["model"].get("byte_fallback"))
        found = (
            self.unknown
            | self.reserved
            | alphabet(self.kind, self.vocab, byte_fallback=byte_fallback)
        )
        if self.scores is not None:  # the library scores unknown text by the least likely piece
            found.add(int(self.scores.argmin()))
        return found

    @property
    def missing_bytes(self) -> list[int]:
        """Bytes that a byte-level vocabulary without unknown token cannot write (SmolLM2: 21)."""
        if self.kind is not BYTE_LEVEL or self.data["model"].get("unk_token"):
            return []
        missing = BYTE_CHARACTERS.keys() - self.vocab.keys()
        return sorted(BYTE_CHARACTERS[character] for character in missing)

    def rewrite(self, ids: IdMap) -> dict[str, Any]:
        """Return tokenizer.json for the kept tokens: same keys, same order, new ids.

        A merge is kept, in order, where its parents and its product are kept. If ``reopen`` loaded
        the file, the result is for ``table_pieces``, which makes tokens and merges as it writes.

        Raises:
            TokenizerError: the post-processor or the padding refers to a removed token.
        """
        data = {**self.data, "model": self._pruned_model(ids)}
        if data.get("added_tokens"):
            data["added_tokens"] = [
                {**token, "id": new}
                for token in data["added_tokens"]
                if token["content"] and (new := ids.new(token["id"])) is not None
            ]
        if isinstance(data.get("padding"), dict):
            pad_id = self._map(ids, data["padding"]["pad_id"], "padding.pad_id")
            data["padding"] = {**data["padding"], "pad_id": pad_id}
        data["post_processor"] = self._map_processor(ids, data.get("post_processor"))
        return data

    def pruned(self, ids: IdMap) -> "TokenizerFile":
        """Return the tokenizer of the kept tokens, in memory.

        Raises:
            TokenizerError: as ``rewrite``.
        """
        models = self.models and self.models.pruned(self.token_ids, ids)
        return replace(self, data=self.rewrite(ids), models=models, reserved=frozenset())

    def _pruned_model(self, ids: IdMap) -> dict[str, Any]:
        model = dict(self.data["model"])
        if isinstance(model["vocab"], list):
            model["vocab"] = list(compress(model["vocab"], ids.keep_mask()))
            if type(model.get("unk_id")) is int:
                model["unk_id"] = ids.new(model["unk_id"])
            return model
        kept = KeptTokens(self.vocab, ids)
        if "merges" not in model:
            return {**model, "vocab": dict(kept)}
        merges, keep_row = model["merges"], ids.keep_mask()
        keep = np.logical_and.reduce([keep_row[column] for column in self.merges.T])
        if isinstance(merges, MergeRules):
            return {**model, "vocab": kept, "merges": merges.named(keep, self.vocab)}
        rules = list(compress(merge_entries(merges), keep))
        return {**model, "vocab": dict(kept), "merges": rules}

    def referenced_ids(self) -> set[int]:
        """Ids that padding and the post-processor put into every text."""
        found: set[int] = set()
        if isinstance(self.data.get("padding"), dict):
            found.add(self.data["padding"]["pad_id"])

        def note(id_: int) -> int:
            found.add(id_)
            return id_

        walk_processor(self.data.get("post_processor"), note)
        return found

    def _map_processor(self, ids: IdMap, processor: Any) -> Any:
        return walk_processor(processor, lambda id_: self._map(ids, id_, "post_processor"))

    def _map(self, ids: IdMap, old: int, key: str) -> int:
        new = ids.new(old)
        if new is None:
            raise TokenizerError(
                f"{self.path}: {key}",
                "refers to a token that is removed",
                found=f"id {old}",
                fix="correct the reference in the source",
            )
        return new


def _as_loaded(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checked tokenizer.json with the tokens that only the files beside it name."""
    loaded = with_named_tokens(data, path.parent)
    if loaded is not data:
        check_tokenizer(loaded, path)
    return loaded


def tokenizer_data(directory: Path) -> dict[str, Any]:
    """Read tokenizer.json of any kind, or build it from the older files; {} without either."""
    if (built := _built(directory)) is not None:
        return built.data
    path = directory / TOKENIZER_NAME
    return read_json(path) if path.exists() else {}


def _built(directory: Path) -> TokenizerFile | None:
    """Return the tokenizer that loaders make of older files; None where there is tokenizer.json."""
    path = directory / TOKENIZER_NAME
    if is_legacy(directory):
        return TokenizerFile(path, build_tokenizer(directory))
    if is_alone(directory):
        data = alone_data(directory)
        return TokenizerFile(path, data, reserved=reserved_ids(directory, data))
    if paths := mapped_files(directory):
        return TokenizerFile(path, mapped_data(directory), MappedModels.open(paths))
    return None


def load_tokenizer(directory: Path) -> "Tokenizer":
    """Load ``directory/tokenizer.json``, or build it, without its truncation and padding.

    Raises:
        TokenizerError: it is absent and cannot be built, or the library refuses it.
    """
    path = directory / TOKENIZER_NAME
    if mapped_files(directory):
        return TokenizerFile.open(directory).library()
    data = tokenizer_data(directory)
    if not data and not path.exists():
        raise TokenizerError(
            path, "is missing", fix="save the tokenizer with transformers' AutoTokenizer"
        )
    tokenizer = _library(data, path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_tokenizers(directory: Path) -> "list[Tokenizer]":
    """Load the tokenizer, or Marian's two: that of each of its models.

    Raises:
        TokenizerError: as ``load_tokenizer``.
    """
    if not (paths := mapped_files(directory)):
        return [load_tokenizer(directory)]
    data = mapped_data(directory)
    return [model.library(data) for model in MappedModels.open(paths).alone()]


def read_pre_tokenizer(directory: Path) -> str | None:
    """Return ``pre_tokenizer_name`` of a directory's tokenizer; None for kinds that need no name.

    The tables of tokenizer.json are decoded by the library alone, which takes a third of the memory
    of a ``TokenizerFile`` and is freed before this returns.

    Raises:
        TokenizerError: it cannot be read, or its kind cannot be pruned.
    """
    path = directory / TOKENIZER_NAME
    if not path.exists():
        return TokenizerFile.open(directory).pre_tokenizer
    with _reading(path):
        raw = read_file(path)
        data = _without_tables(raw)
    byte_level = kind_of(data, path) is BYTE_LEVEL
    found = pre_tokenizer_name(_loaded(raw, path)) if byte_level else None
    release_freed_memory()
    return found


def _library(data: dict[str, Any], path: Path) -> "Tokenizer":
    return _loaded(dump_table(data), path)


def _loaded(raw: bytes, path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(raw)
        tokenizer.encode("a")  # some contradictions show only here
    except BaseException as error:  # the library raises bare Exception
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise TokenizerError(
            path,
            "cannot be loaded",
            found=error,
            fix="save the tokenizer with transformers' AutoTokenizer",
        ) from error
    return tokenizer


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise TokenizerError(
            path, "cannot be read", found=error, fix="download the file again"
        ) from error


def _without_tables(raw: bytes) -> dict[str, Any]:
    """Decode what tells the kind of a tokenizer.json, and not its tokens and merges."""
    parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    model = parts.pop("model", msgspec.Raw(b"null"))
    data = {key: msgspec.json.decode(part) for key, part in parts.items() if key != "added_tokens"}
    if _opens(model, b"{"):
        inner = msgspec.json.decode(model, type=dict[str, msgspec.Raw])
        short = inner.keys() - {"vocab", "merges"}
        data["model"] = {key: msgspec.json.decode(inner[key]) for key in short}
    return data


def _decode(raw: bytes, path: Path) -> dict[str, Any]:
    """Decode a tokenizer.json part by part, its merges into ``MergeRules``."""
    parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    data = {
        key: _decode_model(part, path) if key == "model" else msgspec.json.decode(part)
        for key, part in parts.items()
    }
    check_depth(data)
    return data


def _decode_model(raw: msgspec.Raw, path: Path) -> Any:
    if not _opens(raw, b"{"):
        return msgspec.json.decode(raw)
    parts = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    merges = parts.get("merges")
    model = {k: None if k == "merges" else msgspec.json.decode(v) for k, v in parts.items()}
    if merges is None:
        return model
    vocab: Any = model.get("vocab")
    if isinstance(vocab, dict) and _opens(merges, b"["):
        check_numbers(vocab, path)
        model["merges"] = MergeRules.read(merges, vocab, path)
    else:
        model["merges"] = msgspec.json.decode(merges)
    return model


def _opens(raw: msgspec.Raw, bracket: bytes) -> bool:
    return memoryview(raw)[:1] == bracket


def prune_tokenizer(tokenizer: TokenizerFile, ids: IdMap) -> tuple["Tokenizer", np.ndarray]:
    """Return the pruned tokenizer, without truncation and padding, and the old id of each token.

    The old ids make it possible to show the dense model text that the pruned tokenizer tokenized.

    Returns:
        The library's tokenizer, which gives new ids, and int64 ``[V' + rowless]``: the old id of
        each new one. Tokens without a row come after the last row, in their order.

    Raises:
        TokenizerError: the post-processor or the padding refers to a removed token.
    """
    pruned = tokenizer.pruned(ids).library()
    pruned.no_truncation()
    pruned.no_padding()
    rowless = np.arange(ids.old_size, ids.old_size + ids.rowless)
    return pruned, np.concatenate([ids.kept, rowless])
