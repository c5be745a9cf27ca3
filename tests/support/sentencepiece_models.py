"""Trained SentencePiece models, and the tokenizer.json that belongs to each."""

import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.sentencepiece_model import prune_sentencepiece
from tests.support import ROOT

TEXT = ROOT / "tools" / "text" / "calibration.txt"
SPACE = "▁"
MODEL = Path("tokenizer.model")
messages: Any = sentencepiece_model_pb2


@dataclass(frozen=True)
class Source:
    """A trained SentencePiece model and its counterpart as tokenizer.json."""

    data: bytes
    tokenizer: Tokenizer

    @property
    def pieces(self) -> list[Any]:
        return list(parse(self.data).pieces)

    @property
    def tokens(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    def cut(self, ids: IdMap) -> bytes:
        return prune_sentencepiece(self.data, MODEL, self.tokens, ids)

    def without(self, *gone: str, rows: int | None = None) -> IdMap:
        return keep(set(self.tokens) - set(gone), self.tokens, rows)


def parse(data: bytes) -> Any:
    return messages.ModelProto.FromString(data)


def load(data: bytes) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=data)


def keep(stays: Iterable[str], tokens: dict[str, int], rows: int | None = None) -> IdMap:
    kept = np.array(sorted(tokens[token] for token in stays), dtype=np.int64)
    return IdMap(kept, rows or max(tokens.values()) + 1)


@cache
def lines() -> list[str]:
    """Prose in short lines, with some characters that no piece covers."""
    sentences = TEXT.read_text(encoding="utf-8")[:120_000].replace("\n", " ").split(". ")
    return [s.strip() for s in sentences if s.strip()] + ["Ψ ≠ 漢字 🎉 café", "a  b   c"]


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines()[:-2]), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


@cache
def source(kind: str) -> Source:
    """Train one kind; both files are checked to cut the text alike."""
    data = train(
        vocab_size=900,
        model_type=kind.removesuffix("-unk"),
        byte_fallback=kind != "unigram-unk",
        pad_id=3,
        **(
            {}
            if kind == "unigram-unk"
            else {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        ),
    )
    made = Source(data, bpe(parse(data)) if kind == "bpe" else unigram(parse(data)))
    processor = load(data)
    assert all(processor.encode(line) == made.tokenizer.encode(line).ids for line in lines())
    return made


def bpe(model: Any) -> Tokenizer:
    """Tokenizer.json of a BPE model: a merge per way to split a piece, best piece first."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = [
        (piece.piece[:i], piece.piece[i:])
        for piece in sorted(model.pieces, key=lambda piece: -piece.score)
        if piece.type == piece.NORMAL
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in vocab and piece.piece[i:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback()])
    return tokenizer


def unigram(model: Any) -> Tokenizer:
    """Tokenizer.json of a Unigram model."""
    tokenizer = Tokenizer(
        models.Unigram(
            [(piece.piece, piece.score) for piece in model.pieces],
            unk_id=model.trainer_spec.unk_id,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
                normalizers.Strip(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def parents(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """Run BPE on one piece and return its last merge; None if merging gets stuck before it."""
    parts = list(piece)
    pair = None
    while len(parts) > 1:
        pairs = [left + right for left, right in pairwise(parts)]
        best = max(pairs, key=lambda product: scores.get(product, -np.inf))
        if best not in scores:
            return None
        i = pairs.index(best)
        pair = parts[i], parts[i + 1]
        parts[i : i + 2] = [best]
    return pair


@cache
def selection(kind: str) -> frozenset[str]:
    """Specials, bytes, characters, and half of the other pieces, with what BPE makes them of."""
    pieces = source(kind).pieces
    scores = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    longer = [token for token in scores if len(token) > 1]
    kept = {piece.piece for piece in pieces} - set(longer)
    waiting = random.Random(0).sample(longer, len(longer) // 2)
    while waiting:
        token = waiting.pop()
        made_of = parents(token, scores) if kind == "bpe" else (token, token)
        if token not in kept and made_of:
            kept.add(token)
            waiting.extend(made_of)
    return frozenset(kept)


def half(kind: str) -> IdMap:
    return keep(selection(kind), source(kind).tokens)


@cache
def cut_half(kind: str) -> bytes:
    return source(kind).cut(half(kind))
