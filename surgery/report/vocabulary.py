"""The vocabulary in a report: kept and removed by script and by length, and why tokens stayed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from surgery.config.rewrite import template_tokens, token_references
from surgery.layout.layout import Layout
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import readable
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.census import KINDS, merge_tree, token_groups
from surgery.vocabulary.cost import VocabularyCost
from surgery.vocabulary.order import merge_ranks, reserved_tokens
from surgery.vocabulary.scripts import BYTES, COMMON

MOST_REMOVED = 200
"""Removed tokens that a page lists."""

MOST_SPECIAL = 200
"""Special tokens that a page lists one by one."""

LONGEST = 16
"""Tokens of at least so many characters are counted together."""

NO_GROUP = 255
"""More than there are scripts and kinds of tokens."""

LANGUAGES = {
    "Arabic": "Arabic, Persian, Urdu",
    "Armenian": "Armenian",
    "Bengali": "Bengali, Assamese",
    "Canadian_Aboriginal": "Inuktitut, Cree",
    "Cherokee": "Cherokee",
    BYTES: "parts of characters",
    COMMON: "digits, punctuation, emoji, code",
    "Cyrillic": "Russian, Ukrainian, Bulgarian, Kazakh",
    "Devanagari": "Hindi, Marathi, Nepali",
    "Ethiopic": "Amharic, Tigrinya",
    "Georgian": "Georgian",
    "Greek": "Greek",
    "Gujarati": "Gujarati",
    "Gurmukhi": "Punjabi",
    "Han": "Chinese, Japanese",
    "Hangul": "Korean",
    "Hebrew": "Hebrew, Yiddish",
    "Hiragana": "Japanese",
    "Kannada": "Kannada",
    "Katakana": "Japanese",
    "Khmer": "Khmer",
    "Lao": "Lao",
    "Latin": "English, Spanish, German, Vietnamese and hundreds more",
    "Malayalam": "Malayalam",
    "Myanmar": "Burmese",
    "Ol_Chiki": "Santali",
    "Oriya": "Odia",
    "Sinhala": "Sinhala",
    "Syriac": "Assyrian",
    "Tamil": "Tamil",
    "Telugu": "Telugu",
    "Thaana": "Dhivehi",
    "Thai": "Thai",
    "Tibetan": "Tibetan, Dzongkha",
    "Tifinagh": "Tamazight",
}
"""Script → languages that are written in it, the most widely used ones."""

NO_SCRIPTS = (COMMON, BYTES)
"""Groups of tokens beside the scripts that no language is written in."""

VANISHES = 0.95
"""A script vanishes if it loses this share of its tokens, or more."""

WHY = {
    "alphabet": "kept, so that all text that the source can spell can still be spelled",
    "special": "added tokens, which the model's programs name",
    "reserved": "reserved for later use",
    "unreachable": "no merge makes them: they are in no text",
    "padding rows": "rows without a token",
}
"""Kind of token → what it is."""


@dataclass(frozen=True)
class GroupCount:
    """Tokens of one script, of one kind, or of one length."""

    name: str
    about: str
    """Languages of a script, or what a kind is."""
    before: int
    after: int
    asked: str = ""
    """As in ``ScriptCost``."""

    @property
    def removed(self) -> int:
        """How many tokens are removed."""
        return self.before - self.after

    @property
    def share(self) -> float:
        """Removed share of its tokens."""
        return self.removed / self.before if self.before else 0.0

    @property
    def vanishes(self) -> bool:
        """Whether nearly nothing is left of it."""
        return self.share >= VANISHES


@dataclass(frozen=True)
class TokenRow:
    """A token in a list of the page."""

    id: int
    text: str
    """As people read it."""
    group: str
    """Its script, or its kind."""
    count: int | None = None
    """How often it is in the text that the list is ordered by."""
    why: tuple[str, ...] = ()
    """Why it stayed."""


@dataclass(frozen=True)
class VocabularyFacts:
    """What a page says of a vocabulary."""

    rows_before: int
    rows_after: int
    scripts: list[GroupCount] = field(default_factory=list)
    """Ordinary tokens by script; the script that loses most comes first."""
    kinds: list[GroupCount] = field(default_factory=list)
    """All other rows by kind."""
    lengths: list[GroupCount] = field(default_factory=list)
    """Ordinary tokens by their number of characters."""
    removed: list[TokenRow] = field(default_factory=list)
    """The most common removed tokens."""
    ordered_by: str = ""
    """What makes a token of ``removed`` common."""
    special: list[TokenRow] = field(default_factory=list)
    """Kept special tokens, and why they stayed."""
    special_others: int = 0
    """Kept special tokens that are not listed."""
    order: str = "merge-order"
    """Order of rarity that the plan was made with."""

    @property
    def vanished(self) -> list[GroupCount]:
        """Scripts of which nearly nothing is left: first those whose languages are known."""
        found = [row for row in self.scripts if row.vanishes and row.name not in NO_SCRIPTS]
        return sorted(found, key=lambda row: not row.about)

    @property
    def removed_rows(self) -> int:
        """Rows that the cut removes."""
        return self.rows_before - self.rows_after


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A source's tokens with their groups and ranks, gathered once for a page."""

    tokenizer: TokenizerFile
    rows: int
    """Rows of the source's embedding."""
    ids: np.ndarray
    """int64: every token's id, in the tokenizer's order."""
    names: list[str]
    """Its spelling."""
    groups: list[str]
    """Its script where it is ordinary, else its kind."""
    ranks: np.ndarray
    """int64 by id, ``merge_ranks``."""

    @classmethod
    def of(cls, tokenizer: TokenizerFile, rows: int) -> "Vocabulary":
        """Gather the tokens of a tokenizer."""
        ranks = merge_ranks(tokenizer, merge_tree(tokenizer, rows))
        tokens = tokenizer.token_ids
        ids = np.fromiter(tokens.values(), dtype=np.int64, count=len(tokens))
        return cls(tokenizer, rows, ids, list(tokens), token_groups(tokenizer, ranks), ranks)

    @cached_property
    def group_names(self) -> list[str]:
        """Every group once."""
        return sorted(set(self.groups))

    def group_numbers(self) -> np.ndarray:
        """uint8 by id: the number of the token's group in ``group_names``; 255 for no token."""
        numbers = {name: number for number, name in enumerate(self.group_names)}
        found = np.full(len(self.ranks), NO_GROUP, dtype=np.uint8)
        found[self.ids] = [numbers[group] for group in self.groups]
        return found

    def kept(self, ids: IdMap) -> np.ndarray:
        """Bool for each token: whether ``ids`` keeps it."""
        mask = np.ones(max(len(self.ranks), ids.old_size + ids.rowless), dtype=bool)
        mask[: ids.old_size] = ids.keep_mask()
        return mask[self.ids]

    def counts(self, kept: np.ndarray) -> tuple[Counter[str], Counter[str]]:
        """Group → its tokens before, and after."""
        return Counter(self.groups), Counter(
            group for group, stays in zip(self.groups, kept.tolist(), strict=True) if stays
        )


def vocabulary_facts(
    vocabulary: Vocabulary,
    layout: Layout,
    ids: IdMap,
    cost: VocabularyCost | None,
    counted: tuple[str, np.ndarray] | None,
) -> VocabularyFacts:
    """Return what a page says of the vocabulary that ``ids`` leaves.

    Args:
        vocabulary: The source's.
        layout: The source.
        ids: The rows that are kept.
        cost: The plan's.
        counted: A text's name, and int64 by id how often each token is in it; None orders the
            removed tokens by merges.
    """
    kept = vocabulary.kept(ids)
    before, after = vocabulary.counts(kept)
    asked = {script.script: script.asked for script in cost.scripts} if cost else {}
    scripts = [
        GroupCount(name, LANGUAGES.get(name, ""), before[name], after[name], asked.get(name, ""))
        for name in before
        if name not in KINDS
    ]
    padding = ids.old_size + ids.rowless - len(vocabulary.ids)
    kinds = [GroupCount(k, WHY[k], before[k], after[k]) for k in KINDS if k in WHY and before[k]]
    if padding > 0:
        left = ids.new_size + ids.rowless - int(kept.sum())
        kinds.append(GroupCount("padding rows", WHY["padding rows"], padding, left))
    special = list(_special(vocabulary, layout, kept))
    order = "frequency" if cost is not None and cost.order == "frequency" else "merge-order"
    return VocabularyFacts(
        ids.old_size,
        ids.new_size,
        sorted(scripts, key=lambda row: (-row.removed, -row.before, row.name)),
        kinds,
        _lengths(vocabulary, kept),
        _most_common(vocabulary, kept, counted),
        counted[0] if counted else "the order of merges, for no text was counted",
        special[:MOST_SPECIAL],
        max(0, len(special) - MOST_SPECIAL),
        order,
    )


def _lengths(vocabulary: Vocabulary, kept: np.ndarray) -> list[GroupCount]:
    before, after = Counter[int](), Counter[int]()
    text_of = vocabulary.tokenizer.kind.text
    for name, group, stays in zip(vocabulary.names, vocabulary.groups, kept.tolist(), strict=True):
        text = text_of(name) if group not in KINDS else None
        if text is not None:
            length = min(len(text), LONGEST)
            before[length] += 1
            after[length] += stays
    return [
        GroupCount(f"{n}" if n < LONGEST else f"{n} or more", "", before[n], after[n])
        for n in sorted(before)
    ]


def _most_common(
    vocabulary: Vocabulary, kept: np.ndarray, counted: tuple[str, np.ndarray] | None
) -> list[TokenRow]:
    """Return the most common removed tokens; of equal ones, the first by merges."""
    removed = np.flatnonzero(~kept)
    ids = vocabulary.ids[removed]
    counts = np.zeros(1 + int(vocabulary.ids.max(initial=0)), dtype=np.int64)
    if counted is not None:
        counts[: len(counted[1])] = counted[1][: len(counts)]
    order = np.lexsort((ids, vocabulary.ranks[ids], -counts[ids]))[:MOST_REMOVED]
    return [
        TokenRow(
            int(vocabulary.ids[n]),
            readable(vocabulary.names[n], vocabulary.tokenizer.kind),
            vocabulary.groups[n],
            int(counts[vocabulary.ids[n]]) if counted is not None else None,
        )
        for n in removed[order].tolist()
    ]


def _special(vocabulary: Vocabulary, layout: Layout, kept: np.ndarray) -> Iterator[TokenRow]:
    """Yield the kept tokens that are special or that a file names, with the reasons."""
    tokenizer = vocabulary.tokenizer
    named: Mapping[int, Sequence[str]] = token_references(layout.checkpoint, tokenizer.token_ids)
    in_text, reserved = tokenizer.referenced_ids(), set(reserved_tokens(tokenizer).values())
    templated = template_tokens(layout.checkpoint.path, tokenizer.added)
    added, late = set(tokenizer.added.values()), list[TokenRow]()
    for n in np.flatnonzero(kept).tolist():
        id_ = int(vocabulary.ids[n])
        if id_ not in added and id_ not in named and id_ not in in_text:
            continue
        why = ["an added token"] * (id_ in added)
        why += sorted(set(named.get(id_, ())))
        why += ["tokenizer.json puts it into every text"] * (id_ in in_text)
        why += ["in the chat template"] * (id_ in templated)
        text = readable(vocabulary.names[n], tokenizer.kind)
        row = TokenRow(id_, text, vocabulary.groups[n], why=tuple(why))
        if id_ in reserved and len(why) == 1:
            late.append(row)
        else:
            yield row
    yield from late
