"""SentencePiece models whose pieces get their ids from vocab.json: text split, tokens removed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery.errors import TokenizerError
from surgery.files.strict_json import read_file
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import SENTENCEPIECE, UNIGRAM, alphabet, sentencepiece_text
from surgery.tokenizer.sentencepiece_model import opened_model, without_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CODE = re.compile(">>.*?<<", re.DOTALL)
"""Marian's token that names the language to translate into; it may stand before a text."""


def last_merge(text: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """Return the two parts that SentencePiece's BPE joins last on ``text``.

    It always joins the pair whose product has the highest score, the first of several. None for a
    single character, and where no merges lead to ``text``.
    """
    parts, pair = list(text), None
    while len(parts) > 1:
        found = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not found:
            return None
        at = -max(found)[1]
        pair = parts[at], parts[at + 1]
        parts[at : at + 2] = [pair[0] + pair[1]]
    return pair


@dataclass(frozen=True, eq=False)
class MappedModel:
    """A Unigram or BPE model whose pieces have the ids that vocab.json gives them, in any order."""

    data: bytes
    path: Path
    is_bpe: bool

    @classmethod
    def of(cls, data: bytes, path: Path) -> "MappedModel":
        """Check that ``data``, the content of ``path``, is such a model.

        Raises:
            TokenizerError: it is damaged, or of another type.
        """
        trainer_spec = opened_model(data, path, "download it again").trainer_spec
        if trainer_spec.model_type not in (trainer_spec.UNIGRAM, trainer_spec.BPE):
            found = trainer_spec.ModelType.Name(trainer_spec.model_type)
            raise _refusal(path, "Unigram or BPE", found)
        return cls(data, path, trainer_spec.model_type == trainer_spec.BPE)

    @cached_property
    def pieces(self) -> list[Any]:
        """Every piece, in order."""
        return list(opened_model(self.data, self.path, "download it again").pieces)

    @cached_property
    def parents(self) -> dict[str, tuple[str, str]]:
        """Piece of a BPE → the two from which it is always made; shorter pieces first."""
        scores = {p.piece: p.score for p in self.pieces if p.type in (p.NORMAL, p.USER_DEFINED)}
        made = ((piece, last_merge(piece, scores)) for piece in sorted(scores, key=len))
        return {piece: pair for piece, pair in made if pair is not None}

    def without_id(self, vocab: Mapping[str, int]) -> set[str]:
        """Pieces of a BPE that need one which ``vocab`` lacks, or that it lacks themselves.

        Such pieces, and what they are made of, have to stay as they are: with less, text could be
        made of a piece without an id, and its token would be unknown.
        """
        found = {p.piece for p in self.pieces if p.type == p.NORMAL and p.piece not in vocab}
        for piece, pair in self.parents.items():
            if not found.isdisjoint(pair) or any(len(x) == 1 and x not in vocab for x in pair):
                found.add(piece)
        return found

    def alphabet(self, vocab: Mapping[str, int]) -> set[int]:
        """Ids without which some text would have more unknown tokens."""
        own = {p.piece: vocab[p.piece] for p in self.pieces if p.piece in vocab}
        kind = SENTENCEPIECE if self.is_bpe else UNIGRAM
        found = alphabet(kind, own, byte_fallback=False)
        found |= {own[p.piece] for p in self.pieces if p.type != p.NORMAL and p.piece in own}
        if self.is_bpe:
            waiting = list(self.without_id(vocab) & own.keys())
            needed = set[str]()
            while waiting:
                piece = waiting.pop()
                if piece not in needed:
                    needed.add(piece)
                    waiting += self.parents.get(piece, ())
            return found | {own[piece] for piece in needed if piece in own}
        scored = [(p.score, own[p.piece]) for p in self.pieces if p.piece in own]
        return found | ({min(scored)[1]} if scored else set())  # unknown text is scored by it

    def pruned(self, vocab: Mapping[str, int], ids: IdMap) -> bytes:
        """Return the file for the kept tokens: same pieces, same order, same scores.

        A piece that is no token makes an unknown token of its text. It goes as well if other pieces
        spell it, so that no text whose own tokens are removed becomes unknown.

        Args:
            vocab: Token → old id.
            ids: Which ids are kept.
        """
        normal = [p.piece for p in self.pieces if p.type == p.NORMAL]
        known = {piece for piece in normal if piece in vocab}
        needed = set[str]()
        if self.is_bpe:  # those that tokens are made of, and those made of others without an id
            lost = self.without_id(vocab)
            needed = {x for piece in lost for x in self.parents.get(piece, ())} | {
                piece for piece in lost if not lost.isdisjoint(self.parents.get(piece, ()))
            }

        def is_kept(piece: Any) -> bool:
            if piece.type != piece.NORMAL:
                return True
            if piece.piece in vocab:
                return ids.new(vocab[piece.piece]) is not None
            return piece.piece in needed or not known.issuperset(piece.piece)

        keep = list(map(is_kept, self.pieces))
        of_tokens = (kept for kept, p in zip(keep, self.pieces, strict=True) if p.piece in vocab)
        if all(of_tokens):
            return self.data
        return without_pieces(self.data, opened_model(self.data, self.path, ""), keep)

    def split(self, text: str) -> Iterator[tuple[str, float | None, tuple[int, int]]]:
        """Yield the pieces of a text, their scores, and where they begin and end.

        A piece that the model does not know has None.
        """
        from sentencepiece import sentencepiece_pb2

        messages: Any = sentencepiece_pb2  # a generated module without types
        raw, place, unknown = text.encode("utf-8", "replace"), [0, 0], self._processor.unk_id()

        def characters(end: int) -> int:
            place[:] = end, place[1] + len(raw[place[0] : end].decode("utf-8", "replace"))
            return place[1]

        found = self._processor.encode(raw.decode(), out_type="serialized_proto")
        for piece in messages.SentencePieceText.FromString(found).pieces:
            score = None if piece.id == unknown else self._processor.get_score(piece.id)
            yield piece.piece, score, (characters(piece.begin), characters(piece.end))

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=self.data)
        except (RuntimeError, ValueError) as error:  # such as a piece that occurs twice
            raise TokenizerError(
                self.path,
                "is refused by SentencePiece",
                found=str(error)[:200],
                fix="download it again",
            ) from error


@dataclass(frozen=True, eq=False)
class MappedModels:
    """The models that split a tokenizer's text: one, or Marian's two, one a language."""

    models: tuple[MappedModel, ...]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "MappedModels":
        """Read the files.

        Raises:
            TokenizerError: one is damaged, or of a type that cannot be pruned. Of two, both must be
                Unigram: the scores of BPE do not tell by which of them a text is likelier.
        """
        models = tuple(MappedModel.of(read_file(path), path) for path in paths)
        for model in models:
            if model.is_bpe and len(models) > 1:
                raise _refusal(model.path, "Unigram", "BPE")
        return cls(models)

    def alphabet(self, vocab: Mapping[str, int]) -> set[int]:
        """Ids without which some text would have more unknown tokens."""
        return set[int]().union(*(model.alphabet(vocab) for model in self.models))

    def pruned(self, vocab: Mapping[str, int], ids: IdMap) -> "MappedModels":
        """Return the models for the kept tokens."""
        pruned = ((model.pruned(vocab, ids), model.path) for model in self.models)
        return MappedModels(tuple(MappedModel.of(*each) for each in pruned))

    def library(self, data: Mapping[str, Any]) -> "Tokenizer":
        """Return a tokenizer with those methods of the tokenizers library's that are used here."""
        return cast("Tokenizer", MappedTokenizer.of(self, data))

    def alone(self) -> "list[MappedModels]":
        """Return each model by itself."""
        return [MappedModels((model,)) for model in self.models]


def _refusal(path: Path, expected: str, found: str) -> TokenizerError:
    return TokenizerError(
        path,
        "this kind of vocabulary cannot be pruned",
        expected=f"a {expected} model",
        found=f"a model of type {found}",
        fix="keep the vocabulary whole with `vocab_size` and prune channels only",
    )


@dataclass
class MappedEncoding:
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
class MappedTokenizer:
    """Splits text as transformers' MarianTokenizer and M2M100Tokenizer do.

    Of Marian's two models it takes the one that knows more of the text's characters, or else the
    one by which the text is likelier. A smaller vocabulary never makes a text likelier. So text
    whose tokens are all kept keeps its model.
    """

    models: tuple[MappedModel, ...]
    ids: dict[str, int]
    unknown: int
    first: list[int]
    """Ids that stand before every text."""
    last: list[int]
    """Ids that stand after every text."""
    special: re.Pattern[str]
    """Special tokens in a text."""

    @classmethod
    def of(cls, models: MappedModels, data: Mapping[str, Any]) -> "MappedTokenizer":
        """Return the tokenizer of a file's ``data``, or of what is left of it."""
        model = data["model"]
        vocab = model["vocab"]
        if not isinstance(vocab, dict):
            vocab = {piece: id_ for id_, (piece, _) in enumerate(vocab)}
        ids = {**vocab, **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}
        around = data["post_processor"]["single"]
        text = next(i for i, part in enumerate(around) if "Sequence" in part)
        first, last = (
            [ids[part["SpecialToken"]["id"]] for part in parts]
            for parts in (around[:text], around[text + 1 :])
        )
        special = [entry["content"] for entry in data["added_tokens"] if entry["special"]]
        special = [token for token in special if not CODE.fullmatch(token)]
        longest = sorted(special, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest))})")
        unknown = ids[model["unk_token"]] if "unk_token" in model else model["unk_id"]
        return cls(models.models, ids, unknown, first, last, pattern)

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

    def encode(self, text: str, add_special_tokens: bool = True) -> MappedEncoding:
        """Split a text."""
        found = [self._encode(text, model) for model in self.models]
        _, encoding = max(found, key=lambda pair: pair[0])
        if not add_special_tokens:
            return encoding
        whole = MappedEncoding()
        for id_ in self.first:
            whole.add(id_, self.tokens[id_], (0, 0))
        for parts in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            whole.add(*parts)
        for id_ in self.last:
            whole.add(id_, self.tokens[id_], (len(text), len(text)))
        return whole

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[MappedEncoding]:
        """Split each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    encode_batch_fast = encode_batch

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        tokens = [self.tokens[id_] for id_ in ids]
        if skip_special_tokens:
            tokens = [token for token in tokens if not self.special.fullmatch(token)]
        return "".join(sentencepiece_text(token) or token for token in tokens).strip()

    def _encode(self, text: str, model: MappedModel) -> tuple[tuple[int, float], MappedEncoding]:
        """Return the tokens of a text by one model, and how well it knows the text."""
        encoding, lost, likelihood, start = MappedEncoding(), 0, 0.0, 0
        for number, part in enumerate(self.special.split(text)):
            begin, start = start, start + len(part)
            if number % 2:
                encoding.add(self.ids[part], part, (begin, start))
                continue
            if code := CODE.match(part):
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
