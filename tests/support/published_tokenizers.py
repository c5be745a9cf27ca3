"""Published tokenizers: what they have to fit, texts to cut, and a pair before and after."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.cli.main import main
from tests.support import ROOT, tiny
from tests.support.languages import ARTICLE_1

RESERVED = re.compile(r"<unused\d+>|<\|reserved_special_token_\d+\|>|<｜place▁holder▁no▁\d+｜>")
"""What --drop-reserved may drop of these tokenizers."""


@dataclass(frozen=True)
class Publication:
    """What of a published model its tokenizer has to fit."""

    model_type: str
    rows: int
    bos: int | None
    eos: int
    pad: int | None
    rowless: int = 0
    """Tokens behind the last row."""


PUBLISHED = {
    "llama2": Publication("llama", 32_000, 1, 2, None),
    "llama3_1": Publication("llama", 128_256, 128_000, 128_009, None),
    "qwen3": Publication("qwen3", 151_936, None, 151_645, 151_643),
    "gemma3": Publication("gemma3_text", 262_144, 2, 1, 0, rowless=1),
    "deepseek_v3": Publication("llama", 129_280, 0, 1, None),
}


@dataclass(frozen=True, eq=False)
class Cut:
    """A tokenizer before and after."""

    source: Tokenizer
    cut: Tokenizer
    new_ids: np.ndarray
    """int64 by old id: the new one, by the token's text; -1 where it is gone."""
    rows: int
    """V': what was asked for."""
    rowless: int
    drops_reserved: bool

    @classmethod
    def of(cls, source: Tokenizer, cut: Tokenizer, **facts: Any) -> "Cut":
        """Pair up two tokenizers' tokens."""
        before, after = (t.get_vocab(with_added_tokens=True) for t in (source, cut))
        new_ids = np.full(max(before.values()) + 1, -1)
        for token, old in before.items():
            new_ids[old] = after.get(token, -1)
        assert after.keys() <= before.keys()
        return cls(source, cut, new_ids, **facts)

    def assert_same(self, texts: list[str], *, bos: bool = True) -> int:
        """Assert that ``texts`` are cut as before; return how many have only tokens that stay."""
        old, new = (
            [part.ids for part in tokenizer.encode_batch(texts, add_special_tokens=bos)]
            for tokenizer in (self.source, self.cut)
        )
        stayed = 0
        for text, before, after in zip(texts, old, new, strict=True):
            mapped = self.new_ids[before]
            if (mapped >= 0).all():
                stayed += 1
                assert after == mapped.tolist(), text
        for skip in (False, True):
            decoded = [
                tokenizer.decode_batch(ids, skip_special_tokens=skip)
                for tokenizer, ids in ((self.source, old), (self.cut, new))
            ]
            for text, before, after in zip(texts, *decoded, strict=True):
                # A special token that goes becomes ordinary text, which is not skipped.
                if not (skip and RESERVED.search(text)):
                    assert after == before, text
        return stayed


def save_tiny(published: Publication, path: Path) -> None:
    """Save seeded random weights, too few to matter but with all rows."""
    sizes: dict[str, Any] = {
        "vocab_size": published.rows,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "bos_token_id": published.bos,
        "eos_token_id": published.eos,
        "pad_token_id": published.pad,
    }
    if published.model_type == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(published.model_type, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)


def run_prune(
    source: Path, output: Path, data: Path, vocab_size: int, order: str, *more: str
) -> None:
    """Run the command as a user would, on little text."""
    options: dict[str, object] = {
        "--data": data,
        "--samples": 2,
        "--seq-len": 64,
        "--vocab-size": vocab_size,
        "--intermediate-size": 24,
        "--vocab-by": order,
        "-o": output,
    }
    arguments = [str(part) for option in options.items() for part in option]
    result = CliRunner().invoke(main, ["prune", str(source), *arguments, *more])
    assert result.exit_code == 0, result.output


@cache
def code() -> str:
    paths = sorted((ROOT / "surgery").rglob("*.py"))[:12]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@cache
def real_texts() -> list[str]:
    """Lines of code, sentences of prose, sixteen languages; whole and in pieces."""
    sentences = tiny.prose(60_000).replace("\n", "").split(". ")
    articles = list(ARTICLE_1.values())
    lines = code().split("\n")
    words = [
        " ".join(group)
        for text in [*articles, *sentences[:100]]
        for group in zip(*[iter(text.split())] * 2, strict=False)
    ]
    blocks = ["\n".join(lines[start : start + 30]) for start in range(0, len(lines), 30)]
    return [*articles, *sentences, *lines, *words, *blocks]


EMOJI = [
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇩", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️‍🔥", "🐈‍⬛", "\u200d", "\ufe0f", "🏿"),
]
PLANES = [
    st.characters(min_codepoint=plane << 16, max_codepoint=(plane << 16) | 0xFFFF, codec="utf-8")
    for plane in range(17)
]
PIECES = st.one_of(
    st.characters(codec="utf-8"),
    st.characters(categories=["Cc", "Cf", "Zs", "Zl", "Zp"]),
    st.characters(categories=["Co"]),
    st.characters(categories=["Mn", "Mc", "Me"]),
    st.characters(categories=["Nd", "Nl", "No"]),
    st.sampled_from(EMOJI),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "▁", "Ġ", "e", "x²", "'s", "<0x41>", "<s>"]),
    *PLANES,
)
