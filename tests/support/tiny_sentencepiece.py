"""Tiny models whose tokenizer is a SentencePiece model: alone, or with ids from vocab.json."""

import io
import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from surgery.tokenizer.mapped import MappedModel
from tests.support import tiny
from tests.support.tiny_marian import pieces

T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
FAIRSEQ_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_BOTH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **FAIRSEQ_IDS,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "XLMRobertaTokenizer": (
        "xlm-roberta",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            **FAIRSEQ_IDS,
        },
        {},
    ),
    "MBartTokenizer": ("mbart", _BOTH, {"src_lang": "en_XX"}),
    "MBart50Tokenizer": ("mbart", _BOTH, {"src_lang": "de_DE", "tgt_lang": "fr_XX"}),
    "T5Tokenizer": ("mt5", _T5 | {"pad_token_id": 0, "eos_token_id": 1}, {"extra_ids": 0}),
    "M2M100Tokenizer": ("m2m_100", _BOTH, {"src_lang": "fr", "language_codes": "m2m100"}),
}
"""tokenizer_class → model_type, sizes, tokenizer_config.json."""

WITHOUT_ID = 9
"""Pieces of the BPE that vocab.json lacks."""


@cache
def trained(model_type: str, of_t5: bool = False) -> bytes:
    """A SentencePiece model; T5's has symbols and bytes, too."""
    made = io.BytesIO()
    more: dict[str, Any] = {
        "byte_fallback": True,
        "user_defined_symbols": ["<extra_id_0>"],
        **T5_IDS,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.prose(60_000).split(". ")),
        model_writer=made,
        vocab_size=900 if of_t5 else 640,
        model_type=model_type,
        minloglevel=2,
        **(more if of_t5 else {}),
    )
    return made.getvalue()


@cache
def mapped_vocabulary(of_others: bool = False) -> dict[str, int]:
    """Token → id of vocab.json: the ids say nothing of a piece's place in its model.

    With ``of_others``, some tokens are made of pieces that it lacks.
    """
    tokens = pieces(trained("bpe"))
    parts = {
        part for pair in MappedModel.of(trained("bpe"), Path()).parents.values() for part in pair
    }
    longer = [token for token in tokens if len(token) > 1 and (token in parts) == of_others]
    left = set(longer[10 : 10 + 5 * WITHOUT_ID : 5])
    random.Random(0).shuffle(tokens)
    names = ["<s>", "<pad>", "</s>", "<unk>", *(token for token in tokens if token not in left)]
    return {token: id_ for id_, token in enumerate(names)}


def save(path: Path, class_: str, rows: int, extra: Mapping[str, Any] | None = None) -> Path:
    """Save a seeded random model of ``rows`` rows with the files of its tokenizer."""
    type_, sizes, settings = MODELS[class_]
    torch.manual_seed(0)
    config = AutoConfig.for_model(type_, **sizes, vocab_size=rows)
    made = AutoModel.from_config(config) if type_ == "xlm-roberta" else None
    model: Any = made or AutoModelForSeq2SeqLM.from_config(config)
    if made is None and extra:
        model.generation_config.update(**extra)
    model.save_pretrained(path)
    name = "spiece.model" if type_ == "mt5" else "sentencepiece.bpe.model"
    kind = "bpe" if type_ == "m2m_100" else "unigram"
    (path / name).write_bytes(trained(kind, of_t5=type_ == "mt5"))
    if type_ == "m2m_100":
        (path / "vocab.json").write_text(json.dumps(mapped_vocabulary()), "utf-8")
    settings = {**settings, "tokenizer_class": class_}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return path


def texts(number: int, seed: int = 0) -> list[str]:
    """Some words in any order; a few texts of characters, known and unknown."""
    made, words = random.Random(seed), tiny.prose(60_000).split()
    found = [" ".join(made.choices(words, k=made.randint(1, 4))) for _ in range(number)]
    characters = sorted({*"".join(words), *" \n\té中🙂"})
    return found + ["".join(made.choices(characters, k=made.randint(1, 9))) for _ in range(99)]
