"""Published tokens by rank, made into the tokenizer.json that belongs to them."""

import base64
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from surgery.tokenizer.kinds import BYTE_CHARACTERS

CHARACTERS = {byte: character for character, byte in BYTE_CHARACTERS.items()}
NEVER = 1 << 60

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def whisper_tokens() -> list[str]:
    """The special tokens of Whisper before large-v3, by id."""
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]
    tasks = [f"<|{task}|>" for task in TASK_IDS]
    others = ("startoflm", "startofprev", "nospeech", "notimestamps")
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    named = [f"<|{name}|>" for name in others]
    return ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks, *named, *times]


def from_ranks(path: Path, special: list[str], split: str | None = None) -> Tokenizer:
    """Make a byte-level BPE whose merges are those that the ranks make, one a token."""
    lines = path.read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, NEVER) for a, b in pairwise(parts)]
            if min(found) >= rank:
                break  # no merges lead to it
            at = found.index(min(found))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((spelled(parts[0]), spelled(parts[1])))
    made = Tokenizer(models.BPE(vocab, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = byte_level
    if split is not None:
        made.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(split), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return made


def spelled(token: bytes) -> str:
    """A token as a byte-level vocabulary spells it."""
    return "".join(CHARACTERS[byte] for byte in token)
