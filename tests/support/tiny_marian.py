"""A tiny Marian model with the files that Marian's are published with: two .spm and vocab.json."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import MarianConfig, MarianMTModel

from tests.support import tiny

LETTERS = str.maketrans("aeioudtsnkrlwC", "eäoöadtnsürlvT")
"""English letters → those of the language that the model writes."""

LANGUAGES = (">>fra<<", ">>deu<<")
WITHOUT_ID = 12
"""Pieces of each model that vocab.json lacks."""


def lines(number: int, size: int = 40_000) -> list[str]:
    """Sentences of the language that is read (0) or written (1)."""
    text = tiny.prose(size).translate(LETTERS) if number else tiny.prose(size)
    return [" ".join(line.split()) for line in text.split(". ")]


@cache
def trained(number: int, model_type: str = "unigram") -> bytes:
    """The SentencePiece model of a language."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(number)),
        model_writer=made,
        vocab_size=360,
        model_type=model_type,
        minloglevel=2,
    )
    return made.getvalue()


def pieces(model: bytes) -> list[str]:
    """The pieces of a model, without its special ones."""
    made = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [made.id_to_piece(i) for i in range(3, made.get_piece_size())]


def vocabulary() -> dict[str, int]:
    """Token → id: the ids say nothing of a piece's place in its model."""
    tokens = dict.fromkeys(["</s>", "<unk>"])
    for number in (1, 0):
        longer = [piece for piece in pieces(trained(number)) if len(piece) > 1]
        without = longer[5 : 5 * WITHOUT_ID : 5]
        tokens |= dict.fromkeys(p for p in pieces(trained(number)) if p not in without)
    tokens |= dict.fromkeys([*LANGUAGES, "<pad>"])
    return {token: id_ for id_, token in enumerate(tokens)}


def save(path: Path, **changes: Any) -> Path:
    """Save a seeded random model."""
    vocab = vocabulary()
    config = MarianConfig(
        vocab_size=len(vocab),
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=vocab["<pad>"],
        decoder_start_token_id=vocab["<pad>"],
        eos_token_id=0,
        forced_eos_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = [[vocab["<pad>"]]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.final_logits_bias.normal_()
    model.save_pretrained(path)
    for number, name in enumerate(("source.spm", "target.spm")):
        (path / name).write_bytes(trained(number))
    (path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    settings = {"source_lang": "eng", "target_lang": "mul", "tokenizer_class": "MarianTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return path
