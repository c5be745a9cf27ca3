"""What pruning the vocabulary costs, by script: tokens removed and tokens per byte of text."""

from collections import Counter
from collections.abc import Iterable
from itertools import compress
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.order import encoded
from surgery.vocabulary.scripts import script_of, scripts_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TEXT_CHARACTERS = 1 << 23
"""Both tokenizers tokenize at most this many characters of the given text."""

GROWTH_WARNED = 0.25
"""A warning names each script whose text grows by more than this share of its tokens."""

LEAST_BYTES = 200
"""With less text of a script, its growth means nothing."""


class ScriptCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost for one Unicode script."""

    script: str
    """Script of most letters; "Common" without letters, "Bytes" for parts of characters."""
    tokens_before: int
    """Entries of the source's vocabulary in this script."""
    tokens_after: int
    text_bytes: int
    """UTF-8 bytes of the given text in this script."""
    text_tokens_before: int
    """Tokens of that text by the source's tokenizer."""
    text_tokens_after: int

    @property
    def growth(self) -> float:
        """Share by which the tokens of this script's text increase."""
        return self.text_tokens_after / self.text_tokens_before - 1


class VocabularyCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What pruning a vocabulary costs."""

    order: str
    """Order of rarity: ``merge-order`` or ``frequency``."""
    text_bytes: int
    """UTF-8 bytes of the given text that were tokenized; 0 where no text was given."""
    tokens_per_byte_before: float | None
    tokens_per_byte_after: float | None
    scripts: list[ScriptCost]
    """The script with most tokens first."""
    missing_bytes: int = 0
    """Bytes that the source's byte-level vocabulary lacks."""

    def warnings(self) -> list[str]:
        """One line for each script whose text grows a lot, and one for bytes that are missing."""
        grown = [
            cost
            for cost in self.scripts
            if cost.text_bytes >= LEAST_BYTES and cost.growth > GROWTH_WARNED
        ]
        lines = [
            f"{cost.script} text grows by {cost.growth:.0%} in tokens "
            f"({cost.tokens_before:,} tokens of that script become {cost.tokens_after:,}); "
            f"`keep_scripts` {cost.script} or `vocab_by` frequency on such text keeps it short"
            for cost in grown
        ]
        if self.missing_bytes:
            lines.append(
                f"the source's vocabulary lacks {self.missing_bytes} of the 256 bytes: it silently "
                "loses text with these bytes, and so will the result"
            )
        return lines


def vocabulary_cost(
    tokenizer: TokenizerFile, ids: IdMap, order: str, documents: Iterable[str]
) -> VocabularyCost:
    """Compare the source's tokenizer with the pruned one, on ``documents`` if there are any.

    A line of text belongs to the script of most of its letters.
    """
    scripts = scripts_of(map(tokenizer.kind.text, tokenizer.vocab))
    before = Counter(scripts)
    kept = ids.keep_mask()[np.fromiter(tokenizer.vocab.values(), dtype=np.int64)].tolist()
    after = Counter(compress(scripts, kept))
    lines: dict[str, list[str]] = {}
    for text in _first(documents):
        for line in text.splitlines(keepends=True):
            lines.setdefault(script_of(line), []).append(line)
    nbytes = {name: sum(len(line.encode("utf-8")) for line in lines[name]) for name in lines}
    old, new = dict.fromkeys(lines, 0), dict.fromkeys(lines, 0)
    if lines:
        old = _counts(tokenizer.library(), lines)
        new = _counts(prune_tokenizer(tokenizer, ids)[0], lines)
    costs = [
        ScriptCost(
            name, before[name], after[name], nbytes.get(name, 0), old.get(name, 0), new.get(name, 0)
        )
        for name in sorted({*before, *lines}, key=lambda name: (-before[name], name))
    ]
    total = sum(nbytes.values())
    return VocabularyCost(
        order,
        total,
        sum(old.values()) / total if total else None,
        sum(new.values()) / total if total else None,
        costs,
        tokenizer.missing_bytes,
    )


def _first(documents: Iterable[str]) -> Iterable[str]:
    """The first ``TEXT_CHARACTERS`` of ``documents``."""
    left = TEXT_CHARACTERS
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def _counts(tokenizer: "Tokenizer", lines: dict[str, list[str]]) -> dict[str, int]:
    """Script → tokens of its lines."""
    return {name: sum(map(len, encoded(tokenizer, texts))) for name, texts in lines.items()}
