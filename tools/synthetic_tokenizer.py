"""Byte-level BPE tokenizers: a tokenizer.json of any size, made up; or one that is trained."""

import random
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = 256
"""Added tokens of the synthetic tokenizer; the first two are bos and eos."""
MERGEABLE = "Ġetaoinshrdlcumwfgypbvk" + "ABCDEFGHIJKLMNOPRSTW" + "ÃÂâĢĻĪĹģıĲ"
"""Symbols that the synthetic merges start from: letters, the space, some bytes beyond ASCII."""
LONGEST_PART = 14
"""Characters; with it tokenizer.json is about as large as that of Llama 3.1 (9 MB)."""
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
"""Of every added token."""


def synthetic_tokenizer(
    tokens: int, *, special: int = SPECIAL_TOKENS, seed: int = 0
) -> dict[str, Any]:
    """Return a tokenizer.json, as an object: byte-level BPE, bos in front of every text.

    Merges are made at random, not trained; each joins two earlier tokens into a new one.

    Args:
        tokens: Of the model: 256 bytes, the rest merged. Special tokens follow behind.
        special: Number of special tokens; at least 2.
        seed: Chooses the merges.
    """
    vocab, merges = _merge(tokens, random.Random(seed))
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_special_token_{n}|>" for n in range(special - len(names))]
    bos = {"SpecialToken": {"id": names[0], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id_, "content": name, **FLAGS} for id_, name in enumerate(names, len(vocab))
        ],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, text],
            "special_tokens": {
                names[0]: {"id": names[0], "ids": [len(vocab)], "tokens": names[:1]}
            },
        },
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def _merge(tokens: int, choose: random.Random) -> tuple[dict[str, int], list[str]]:
    vocab = {symbol: id_ for id_, symbol in enumerate(_byte_alphabet())}
    merges, parts = [], list(MERGEABLE)
    while len(vocab) < tokens:
        left, right = choose.choice(parts), choose.choice(parts)
        token = left + right
        if token in vocab:
            continue
        vocab[token] = len(vocab)
        merges.append(f"{left} {right}")
        if len(token) <= LONGEST_PART:
            parts.append(token)
    return vocab, merges


def _byte_alphabet() -> list[str]:
    """The symbols of the 256 bytes in byte-level BPE, in the order of GPT-2."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(0x100 + n) for n in range(256 - len(plain))]


def trained_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()
) -> Tokenizer:
    """Return a byte-level BPE of ``vocab_size`` tokens, trained on ``texts``.

    ``special_tokens`` are its first ones.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
