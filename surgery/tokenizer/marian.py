"""Marian's tokenizer: two SentencePiece models, one a language, and vocab.json, which gives ids."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.errors import AMEND, TokenizerError
from surgery.files.model_files import MARIAN_NAMES, tokenizer_files
from surgery.files.strict_json import read_file, read_json
from surgery.tokenizer.checks import check_numbers, check_tokenizer, walk_processor
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import UNIGRAM, alphabet, sentencepiece_text
from surgery.tokenizer.legacy import (
    ROLE,
    SAVE,
    VOCAB_NAME,
    NamedToken,
    all_named,
    with_named_tokens,
)
from surgery.tokenizer.sentencepiece_model import MappedModel, prune_mapped

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
"""Roles of special tokens, and the tokens that have them where no file says otherwise."""

LANGUAGE = re.compile(">>.*?<<", re.DOTALL)
"""A token that names the language to translate into; it may stand before a text."""


def is_marian(directory: Path) -> bool:
    """Whether the tokenizer is Marian's: two models and vocab.json, no tokenizer.json."""
    return directory / MARIAN_NAMES[0] in tokenizer_files(directory)


def marian_data(directory: Path) -> dict[str, Any]:
    """Return what tokenizer.json would say of the tokens: their ids, their scores, special ones.

    A token's score is that of the model in which it is likelier. No loader could tokenize with it:
    the two models split text.

    Raises:
        TokenizerError: a file is damaged, vocab.json has no token for unknown text, or its ids are
            not 0, 1, 2 and so on.
    """
    where = directory / VOCAB_NAME
    vocab = read_json(where)
    check_numbers(vocab, where)
    tokens = sorted(vocab, key=vocab.__getitem__)
    gap = next((i for i, token in enumerate(tokens) if vocab[token] != i), None)
    if gap is not None:
        raise TokenizerError(
            where, "has ids that are not 0, 1, 2 and so on", expected=gap, found=vocab[tokens[gap]],
            fix=SAVE,
        )  # fmt: skip
    named = all_named(directory)
    roles = ROLES | {str(t.key): t.text for t in named if t.how == ROLE and t.text}
    for role in ("unk_token", "eos_token"):
        if roles[role] not in vocab:
            raise TokenizerError(where, f"lacks the {role}", expected=roles[role], fix=AMEND)
    scores: dict[str, float] = {}
    for model in MarianModels.open(directory).models:
        for piece in model.pieces:
            scores[piece.piece] = max(piece.score, scores.get(piece.piece, piece.score))
    least = min(scores.values(), default=0.0) - 1.0  # of tokens that no text has
    special = {t.text for t in named} | set(roles.values()) | set(filter(LANGUAGE.fullmatch, vocab))
    eos = roles["eos_token"]
    data = {
        "added_tokens": [
            NamedToken(ROLE, "", token).added(vocab[token], special=True)
            for token in tokens
            if token in special
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "special_tokens": {eos: {"id": eos, "ids": [vocab[eos]], "tokens": [eos]}},
        },
        "model": {
            "type": "Unigram",
            "unk_id": vocab[roles["unk_token"]],
            "vocab": [[token, scores.get(token, least)] for token in tokens],
        },
    }
    check_tokenizer(data, where)
    return with_named_tokens(data, directory)


@dataclass(frozen=True, eq=False)
class MarianModels:
    """The SentencePiece models of the language that is read and of the one that is written."""

    models: tuple[MappedModel, ...]

    @classmethod
    def open(cls, directory: Path) -> "MarianModels":
        """Read both files.

        Raises:
            TokenizerError: one is damaged, or is no Unigram model.
        """
        paths = [directory / name for name in MARIAN_NAMES]
        return cls(tuple(MappedModel.of(read_file(path), path) for path in paths))

    def alphabet(self, vocab: Mapping[str, int]) -> set[int]:
        """Ids without which some text of either language would have more unknown tokens."""
        found = set[int]()
        for model in self.models:
            own = {p.piece: vocab[p.piece] for p in model.pieces if p.piece in vocab}
            found |= alphabet(UNIGRAM, own, byte_fallback=False)
            found |= {own[p.piece] for p in model.pieces if p.type != p.NORMAL and p.piece in own}
            scored = [(p.score, own[p.piece]) for p in model.pieces if p.piece in own]
            found |= {min(scored)[1]} if scored else set()  # unknown text is scored by it
        return found

    def pruned(self, vocab: Mapping[str, int], ids: IdMap) -> "MarianModels":
        """Return the models for the kept tokens."""
        pruned = ((prune_mapped(m.data, m.path, vocab, ids), m.path) for m in self.models)
        return MarianModels(tuple(MappedModel.of(*each) for each in pruned))

    def library(self, data: Mapping[str, Any]) -> "Tokenizer":
        """Return a tokenizer with those methods of the tokenizers library's that are used here."""
        return cast("Tokenizer", MarianTokenizer.of(self, data))

    def alone(self) -> "list[MarianModels]":
        """Return each model by itself."""
        return [MarianModels((model,)) for model in self.models]


@dataclass
class MarianEncoding:
    """The tokens of a text."""

    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    """As the models spell them; some may be unknown to vocab.json."""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """Where each token begins and ends in the text, in characters."""

    def add(self, id_: int, token: str, span: tuple[int, int]) -> None:
        """Append a token."""
        self.ids.append(id_)
        self.tokens.append(token)
        self.offsets.append(span)


@dataclass(frozen=True, eq=False)
class MarianTokenizer:
    """Splits text as transformers' MarianTokenizer does, by the model of the text's language.

    This is the model that knows more of its characters, or else the one by which it is likelier.
    A smaller vocabulary never makes a text likelier. So text whose tokens are all kept keeps its
    model.
    """

    models: tuple[MappedModel, ...]
    ids: dict[str, int]
    unknown: int
    last: list[int]
    """Ids that stand after every text."""
    special: re.Pattern[str]
    """Special tokens in a text."""

    @classmethod
    def of(cls, models: MarianModels, data: Mapping[str, Any]) -> "MarianTokenizer":
        """Return the tokenizer of ``marian_data``, or of what is left of it."""
        ids = {piece: id_ for id_, (piece, _) in enumerate(data["model"]["vocab"])}
        added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
        last: list[int] = []
        walk_processor(data["post_processor"], last.append)
        special = [token for token in added if not LANGUAGE.fullmatch(token)]
        longest = sorted(special, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest))})")
        return cls(models.models, {**ids, **added}, data["model"]["unk_id"], last, pattern)

    def no_truncation(self) -> None:
        """There is none."""

    def no_padding(self) -> None:
        """There is none."""

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id → token."""
        return {id_: token for token, id_ in self.ids.items()}

    def get_vocab(self) -> dict[str, int]:
        """Token → id."""
        return dict(self.ids)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self.ids.get(token)

    def id_to_token(self, id_: int) -> str | None:
        """The token of an id, or None."""
        return self.tokens.get(id_)

    def encode(self, text: str, add_special_tokens: bool = True) -> MarianEncoding:
        """Split a text."""
        found = [self._encode(text, model) for model in self.models]
        _, encoding = max(found, key=lambda pair: pair[0])
        if add_special_tokens:
            for id_ in self.last:
                encoding.add(id_, self.tokens[id_], (len(text), len(text)))
        return encoding

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[MarianEncoding]:
        """Split each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    encode_batch_fast = encode_batch

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        tokens = [self.tokens[id_] for id_ in ids]
        if skip_special_tokens:
            tokens = [token for token in tokens if not self.special.fullmatch(token)]
        return "".join(sentencepiece_text(token) or token for token in tokens).strip()

    def _encode(self, text: str, model: MappedModel) -> tuple[tuple[int, float], MarianEncoding]:
        """Return the tokens of a text by one model, and how well it knows the text."""
        encoding, lost, likelihood, start = MarianEncoding(), 0, 0.0, 0
        for number, part in enumerate(self.special.split(text)):
            begin, start = start, start + len(part)
            if number % 2:
                encoding.add(self.ids[part], part, (begin, start))
                continue
            if code := LANGUAGE.match(part):
                stop = begin + code.end()
                encoding.add(self._id(code[0]), code[0], (begin, stop))
                part, begin = part[code.end() :], stop
            for piece, score, (first, last) in model.split(part):
                encoding.add(self._id(piece), piece, (begin + first, begin + last))
                likelihood += score or 0.0
                lost += (last - first) if score is None else 0
        return (-lost, likelihood), encoding

    def _id(self, token: str) -> int:
        return self.ids.get(token, self.unknown)
