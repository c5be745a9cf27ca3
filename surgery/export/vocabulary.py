"""The tokenizer as GGUF stores it: texts, kinds and scores by id, merges, special tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import AMEND, TokenizerError
from surgery.export.embedders import (
    phantom_spaces,
    unigram_scores,
    unigram_settings,
    wordpiece_settings,
)
from surgery.files.model_files import TEMPLATE_FOLDER, named_templates
from surgery.files.strict_json import read_file
from surgery.tokenizer.kinds import BYTE_LEVEL, SENTENCEPIECE, UNIGRAM, WORDPIECE
from surgery.tokenizer.sentencepiece_model import pieces_of
from surgery.tokenizer.tokenizer_file import TokenizerFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of token, as numbered in GGUF and, but for USER_DEFINED, in tokenizer.model."""

PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0
"""Scores of rows without a token, and of added tokens, as llama.cpp's converter sets them."""

SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
"""What tokenizer_config.json calls a token → its key in GGUF, which spells one word like this."""

CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
CONTROL_FORMS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
"""Added tokens of these texts, beginnings and ends are control tokens, whatever the file says."""


@dataclass(frozen=True, eq=False)
class Merges(Sequence[str]):
    """The merges by rank, "left right"; each text is made when it is read."""

    ids: np.ndarray
    """int ``[merges, 3]``: ids of left part, right part and product."""
    texts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Merges": ...
    def __getitem__(self, index: int | slice) -> "str | Merges":
        """Return the merge of a rank, or those of several."""
        if isinstance(index, slice):
            return Merges(self.ids[index], self.texts)
        return f"{self.texts[self.ids[index, 0]]} {self.texts[self.ids[index, 1]]}"

    def __iter__(self) -> Iterator[str]:
        for left, right, _ in map(np.ndarray.tolist, self.ids):
            yield f"{self.texts[left]} {self.texts[right]}"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer as GGUF stores it."""

    model: str
    """"gpt2" for byte-level BPE, "llama" for SentencePiece's, "t5" for Unigram, "bert" for
    WordPiece."""
    pre: str
    """How text is split before BPE."""
    texts: np.ndarray
    """Objects by id: str."""
    kinds: np.ndarray
    """int32 by id: NORMAL to BYTE."""
    scores: np.ndarray | None = None
    """float32 by id: pieces of higher scores are joined first; None where merges say so."""
    merges: Merges | None = None
    settings: Mapping[str, bool | int] = field(default_factory=dict)
    """Further keys below ``tokenizer.ggml.``: ids of special tokens, and where they are added."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates by name; "default" is the one without a name."""
    characters: bytes = b""
    """Unigram's table that rewrites characters, as SentencePiece has it."""


def read_vocabulary(checkpoint: Checkpoint, rows: int, pre: str | None) -> Vocabulary:
    """Read the tokenizer of a checkpoint whose embedding has ``rows`` rows.

    Tokens without a row are left out; rows without a token get one that is never used.

    Raises:
        TokenizerError: its kind cannot be exported, or its pre-tokenizer is not known.
    """
    path = checkpoint.path
    tokenizer = TokenizerFile.reopen(path)
    settings = _settings(tokenizer, checkpoint, rows)
    texts, kinds = _tokens(tokenizer, rows)
    common: dict[str, Any] = {"templates": _templates(checkpoint)}
    if tokenizer.kind is BYTE_LEVEL:
        merges = Merges(tokenizer.merges, texts)
        if pre is None:
            raise _unknown_pre(tokenizer.path)
        return Vocabulary("gpt2", pre, texts, kinds, None, merges, settings, **common)
    if tokenizer.kind is WORDPIECE:
        phantom_spaces(texts, np.flatnonzero(kinds == NORMAL), tokenizer.path)
        settings |= wordpiece_settings(tokenizer.data, settings, tokenizer.path)
        return Vocabulary("bert", "default", texts, kinds, None, None, settings, **common)
    settings["add_space_prefix"] = _adds_space(tokenizer.data)
    if tokenizer.kind is UNIGRAM:
        spaces, characters = unigram_settings(_text_parts(tokenizer.data), tokenizer.path)
        scores = unigram_scores(tokenizer, rows, PADDING_SCORE)
        common |= {"settings": settings | spaces, "characters": characters}
        return Vocabulary("t5", "default", texts, kinds, scores, None, **common)
    scores = _scores(tokenizer, texts, kinds)
    return Vocabulary("llama", "default", texts, kinds, scores, None, settings, **common)


def _unknown_pre(path: Path) -> TokenizerError:
    return TokenizerError(
        path,
        "nobody knows what llama.cpp calls the way that this tokenizer splits text",
        fix="name it with `pre`, as the source's converter does: llama-bpe, qwen2, smollm, …; "
        "or plan again, so that the plan keeps it",
    )


def _tokens(tokenizer: TokenizerFile, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts and kinds by id."""
    texts, kinds = np.full(rows, None, dtype=object), np.full(rows, UNUSED, np.int32)
    bytes_ = tokenizer.kind is SENTENCEPIECE
    for token, id_ in tokenizer.vocab.items():
        if id_ < rows:
            texts[id_] = token
            is_byte = bytes_ and len(token) == 6 and token.startswith("<0x") and token[5] == ">"
            kinds[id_] = BYTE if is_byte else NORMAL
    for id_ in tokenizer.unknown:
        if id_ < rows:
            kinds[id_] = UNKNOWN
    for entry in tokenizer.data.get("added_tokens") or []:
        text, id_ = entry["content"], entry["id"]
        if not text or id_ >= rows:
            continue
        control = entry.get("special") or _looks_special(text)
        texts[id_] = text if control else text.replace("\u2581", " ")
        if kinds[id_] != UNKNOWN or tokenizer.kind in (BYTE_LEVEL, WORDPIECE):
            kinds[id_] = CONTROL if control else USER_DEFINED
    for id_ in np.flatnonzero(kinds == UNUSED).tolist():
        texts[id_] = f"[PAD{id_}]"
    return texts, kinds


def _looks_special(text: str) -> bool:
    forms = any(text.startswith(start) and text.endswith(end) for start, end in CONTROL_FORMS)
    return forms or text in CONTROL_TEXTS


def _scores(tokenizer: TokenizerFile, texts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return the scores of tokenizer.model by id; without that file, by the ranks of the merges.

    A piece's own kind is taken over, too.
    """
    scores = np.where(kinds == UNUSED, PADDING_SCORE, 0).astype(np.float32)
    model = tokenizer.path.with_name("tokenizer.model")
    pieces = pieces_of(read_file(model)) if model.is_file() else None
    if pieces is None:
        products = tokenizer.merges[:, 2]
        ranks = np.flatnonzero(products < len(texts))[::-1]  # the last one assigned is the first
        scores[products[ranks]] = -ranks
    else:
        for piece in pieces:
            id_ = tokenizer.vocab.get(piece.piece)
            if id_ is None and piece.piece == "<0x09>":  # a tab in Gemma 1's and 2's tokenizer.json
                id_ = tokenizer.vocab.get("\t")
            if id_ is not None and id_ < len(texts):
                scores[id_] = piece.score
                if kinds[id_] == NORMAL and piece.type in (UNKNOWN, CONTROL, UNUSED, BYTE):
                    kinds[id_] = piece.type
    scores[(kinds == CONTROL) | (kinds == USER_DEFINED)] = ADDED_SCORE
    return scores


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    for part in _text_parts(data):
        if part.get("type") == "Prepend":
            return True
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme")
            return bool(part.get("add_prefix_space", True)) if scheme is None else scheme != "never"
    return False


def _text_parts(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changes and splits text before the model sees it."""
    return [*_parts(data.get("normalizer")), *_parts(data.get("pre_tokenizer"))]


def _parts(part: Any) -> list[dict[str, Any]]:
    """A component of tokenizer.json, or those that it is made of."""
    if not isinstance(part, dict):
        return []
    for key in ("normalizers", "pretokenizers", "processors"):
        if isinstance(part.get(key), list):
            return [inner for child in part[key] for inner in _parts(child)]
    return [part]


def _settings(tokenizer: TokenizerFile, checkpoint: Checkpoint, rows: int) -> dict[str, bool | int]:
    """Return ids of special tokens, and whether bos and eos are added to every text."""
    named = checkpoint.json("tokenizer_config.json")
    config = checkpoint.config
    found: dict[str, bool | int] = {}
    for role, key in SPECIAL.items():
        entry = named.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        id_ = tokenizer.token_ids.get(text) if isinstance(text, str) else None
        if id_ is None:
            id_ = config.get(f"{role}_token_id", _text_config(config).get(f"{role}_token_id"))
            id_ = id_[0] if isinstance(id_, list) and id_ else id_
        if type(id_) is int and 0 <= id_ < rows:
            found[key] = id_
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):  # encoders have these alone
        if SPECIAL[role] not in found and SPECIAL[stand_in] in found:
            found[SPECIAL[role]] = found[SPECIAL[stand_in]]
    where = f"{tokenizer.path}: post_processor"
    try:
        around = _added_around(tokenizer.data.get("post_processor"))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise TokenizerError(where, "is damaged", found=repr(error), fix=AMEND) from error
    for role, added in zip(("bos", "eos"), around, strict=True):
        asked, token = named.get(f"add_{role}_token"), found.get(SPECIAL[role])
        if not isinstance(asked, bool) and added not in ([], [token]):
            raise TokenizerError(
                where,
                f"llama.cpp adds no token to a text but one {role} token",
                expected=token,
                found=added,
                fix="use llama.cpp's convert_hf_to_gguf.py",
            )
        found[f"add_{role}_token"] = asked if isinstance(asked, bool) else bool(added)
    return found


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("text_config")
    return section if isinstance(section, dict) else {}


def _added_around(processor: Any) -> tuple[list[Any], list[Any]]:
    """Return the ids that the post-processor puts before, and after, a single text."""
    for part in _parts(processor):
        if part.get("type") in ("RobertaProcessing", "BertProcessing"):
            return [part["cls"][1]], [part["sep"][1]]
        if part.get("type") == "TemplateProcessing":
            before, after, found = list[Any](), list[Any](), False
            for piece in part["single"]:
                if "Sequence" in piece:
                    found = True
                else:
                    ids = part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
                    (after if found else before).extend(ids)
            return before, after
    return [], []


def _templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the chat templates by name, as transformers reads them.

    Raises:
        TokenizerError: a template is no text, or two have names that are one in GGUF.
    """
    path, found = checkpoint.path, dict[str, str]()
    where, given = path / "tokenizer_config.json", None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if given is None:
            where, given = path / name, checkpoint.json(name).get("chat_template")
    if isinstance(given, str):
        found = {"default": given}
    elif given is not None:
        found = _listed(given, where)
    own = path / "chat_template.jinja"
    if own.is_file():
        found["default"] = _text(own)
    for name in named_templates(path):
        found[name.removeprefix(f"{TEMPLATE_FOLDER}/").removesuffix(".jinja")] = _text(path / name)
    spelled: dict[str, str] = {}
    for name in found:
        other = spelled.setdefault(re.sub("[^A-Za-z0-9]", "_", name), name)
        if other != name:
            raise TokenizerError(
                path,
                "two chat templates have names that GGUF spells alike",
                found=f"{other!r} and {name!r}",
                fix="rename one",
            )
    return found


def _listed(given: Any, where: Path) -> dict[str, str]:
    """Return the templates of a list of names and templates."""
    found: dict[str, str] = {}
    for entry in given if isinstance(given, list) else [given]:
        name, text = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not (isinstance(name, str) and name and isinstance(text, str)):
            raise TokenizerError(
                f"{where}: chat_template",
                "is no template",
                expected="a text, or a list of names and templates",
                found=repr(entry),
                fix=AMEND,
            )
        found[name] = text
    return found


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(path, "is not UTF-8", found=str(error), fix=AMEND) from error
