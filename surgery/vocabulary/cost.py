"""What pruning the vocabulary costs: the tokens that are removed, and tokens per byte of text."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import BYTE_LEVEL, Kind, readable
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.census import KINDS, merge_tree, token_groups
from surgery.vocabulary.order import (
    Rarity,
    VocabularyOptions,
    encoded,
    merge_ranks,
    tokens_of_scripts,
)
from surgery.vocabulary.scripts import BYTES, check_script, lost_text, script_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TEXT_CHARACTERS = 1 << 23
"""Both tokenizers tokenize at most this many characters of the given text."""

GROWTH_WARNED = 0.25
"""A warning names each script whose text grows by more than this share of its tokens."""

LEAST_BYTES = 200
"""With less text of a script, its growth means nothing."""

EXAMPLES = 10
"""Removed tokens that a plan shows of each script."""

LONGEST_EXAMPLE = 24
"""Characters that tables show of a token."""

LINE = 98
"""Columns of a line of tokens."""


class ScriptCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost for one Unicode script, or for one kind of tokens that are not ordinary."""

    script: str
    """Script of most letters of ordinary tokens; "Common" without letters, "Bytes" for parts of
    characters. Other tokens are counted by their kind: "alphabet", "special" and so on."""
    tokens_before: int
    """Tokens of the source's vocabulary in this script."""
    tokens_after: int
    text_bytes: int
    """UTF-8 bytes of the given text in this script."""
    text_tokens_before: int
    """Tokens of that text by the source's tokenizer."""
    text_tokens_after: int
    asked: str = ""
    """"kept" where ``keep_scripts`` asks for the script, "dropped" where ``drop_scripts`` does."""
    can_be_kept: bool = False
    """Whether as many rows have room for all of the script; known where its text grows a lot."""
    examples: list[str] = []
    """Some removed tokens, as people read them, the most common first."""

    @property
    def growth(self) -> float:
        """Share by which the tokens of this script's text increase."""
        return self.text_tokens_after / self.text_tokens_before - 1

    @property
    def grows(self) -> bool:
        """Whether there is enough text of the script to see that it grows a lot."""
        return self.text_bytes >= LEAST_BYTES and self.growth > GROWTH_WARNED


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
    by_rarity: bool = True
    """Whether tokens were removed because they are rare, not only padding rows and those that
    ``drop_scripts`` and ``drop_reserved`` name."""
    missing_bytes: list[int] = []
    """Bytes that the source's byte-level vocabulary lacks."""

    def warnings(self) -> list[str]:
        """One line for each script whose text grows a lot, and one on text that is lost."""
        lines = [
            f"{cost.script} text grows by {cost.growth:.0%} in tokens "
            f"({cost.tokens_before:,} tokens of that script become {cost.tokens_after:,})"
            f"{self._advice(cost)}"
            for cost in self.scripts
            if cost.grows
        ]
        return lines + lost_text(self.missing_bytes)

    def _advice(self, cost: ScriptCost) -> str:
        """What keeps the text of a script short, of what is possible with as many rows."""
        if cost.asked == "dropped":
            return ", as `drop_scripts` asks for"
        ways = [f"`keep_scripts` {cost.script}"] if cost.can_be_kept else []
        if self.order != "frequency":
            ways.append("`vocab_by` frequency on such text")
        others = f"{', '.join(ways)} or " if ways else ""
        return f"; {others}a larger `vocab_size` keeps it short"


def vocabulary_cost(
    tokenizer: TokenizerFile,
    rarity: Rarity,
    vocab_size: int,
    options: VocabularyOptions,
    documents: Iterable[str] = (),
) -> VocabularyCost:
    """Compare the source's tokenizer with the pruned one, on ``documents`` if there are any.

    A line of text belongs to the script of most of its letters.

    Args:
        tokenizer: The source's.
        rarity: The order in which its tokens are removed.
        vocab_size: V', how many rows are kept.
        options: What the order follows from.
        documents: Text that both tokenizers tokenize.
    """
    ids = rarity.id_map(vocab_size)
    lines = lines_by_script(documents)
    nbytes = {name: sum(len(line.encode("utf-8")) for line in lines[name]) for name in lines}
    old, new = dict.fromkeys(lines, 0), dict.fromkeys(lines, 0)
    counts = np.zeros(ids.old_size + ids.rowless, dtype=np.int64)
    if lines:
        old = tokens_by_script(tokenizer.library(), lines, counts)
        new = tokens_by_script(prune_tokenizer(tokenizer, ids)[0], lines)
    removed = list_removed(tokenizer, ids, rarity.ranks, counts)
    asked = dict.fromkeys(map(check_script, options.keep_scripts), "kept")
    asked |= dict.fromkeys(map(check_script, options.drop_scripts), "dropped")
    costs = [
        ScriptCost(
            name,
            removed.before.get(name, 0),
            removed.before.get(name, 0) - removed.count(name),
            nbytes.get(name, 0),
            old.get(name, 0),
            new.get(name, 0),
            asked=asked.get(name, ""),
            examples=[token.text for token in removed.of(name, EXAMPLES)],
        )
        for name in {*removed.before, *lines}
    ]
    total = sum(nbytes.values())
    return VocabularyCost(
        options.vocab_by,
        total,
        sum(old.values()) / total if total else None,
        sum(new.values()) / total if total else None,
        _with_advice(costs, tokenizer, rarity, vocab_size),
        vocab_size < rarity.tokens - rarity.dropped,
        tokenizer.missing_bytes,
    )


def _with_advice(
    costs: Iterable[ScriptCost], tokenizer: TokenizerFile, rarity: Rarity, vocab_size: int
) -> list[ScriptCost]:
    """Find which of the scripts whose text grows a lot could be kept; largest scripts first."""
    room = vocab_size - rarity.must_keep

    def fits(script: str) -> bool:
        return _rows_to_keep(tokenizer, len(rarity.order), script) <= room

    return [
        msgspec.structs.replace(cost, can_be_kept=fits(cost.script))
        if cost.grows and not cost.asked
        else cost
        for cost in sorted(costs, key=lambda cost: (-cost.tokens_before, cost.script))
    ]


def _rows_to_keep(tokenizer: TokenizerFile, rows: int, script: str) -> int:
    """Rows that keeping a script takes, its tokens' parents included, beside the alphabet."""
    ids = np.array(sorted(tokens_of_scripts(tokenizer, [script])), dtype=np.int64)
    closed = merge_tree(tokenizer, rows).with_parents(ids)
    return len(set(closed.tolist()) - tokenizer.alphabet)


def lines_by_script(documents: Iterable[str]) -> dict[str, list[str]]:
    """Script of most of a line's letters → such lines of the first ``TEXT_CHARACTERS``."""
    lines: dict[str, list[str]] = {}
    left = TEXT_CHARACTERS
    for document in documents:
        for line in document[:left].splitlines(keepends=True):
            lines.setdefault(script_of(line), []).append(line)
        left -= len(document)
        if left <= 0:
            break
    return lines


def tokens_by_script(
    tokenizer: "Tokenizer", lines: dict[str, list[str]], counts: np.ndarray | None = None
) -> dict[str, int]:
    """Script → tokens of its lines. How often each token occurs is added to ``counts``."""
    found = dict.fromkeys(lines, 0)
    for name, texts in lines.items():
        for part in encoded(tokenizer, texts):
            found[name] += len(part)
            if counts is not None:
                counts += np.bincount(part, minlength=len(counts))[: len(counts)]
    return found


@dataclass(frozen=True)
class RemovedToken:
    """A token of the source that the output lacks."""

    id: int
    """Its id in the source."""
    token: str
    """As the source's vocabulary spells it."""
    text: str
    """As people read it: a space is ␣, a byte ``<0xE4>``."""
    script: str
    """As in ``ScriptCost``."""
    count: int | None
    """How often the source's tokenizer uses it in a text; None where there is no text."""


@dataclass(frozen=True, eq=False)
class RemovedTokens:
    """The tokens that a plan removes: by script, in each the most common first."""

    before: dict[str, int]
    """Script or kind, as in ``ScriptCost`` → tokens of the source."""
    removed: dict[str, list[tuple[int, str]]]
    """Script or kind → id and spelling of its removed tokens; the script that loses most first."""
    kind: Kind = BYTE_LEVEL
    """Of the source's tokenizer."""
    counts: np.ndarray | None = None
    """int64 by id: how often the source's tokenizer uses a token in a text."""

    @property
    def tokens(self) -> list[RemovedToken]:
        """All removed tokens."""
        return [token for script in self.removed for token in self.of(script)]

    def count(self, script: str) -> int:
        """How many tokens of a script are removed."""
        return len(self.removed.get(script, ()))

    def of(self, script: str, limit: int | None = None) -> list[RemovedToken]:
        """The ``limit`` most common removed tokens of a script; None is all of them."""
        return [
            RemovedToken(
                id_,
                token,
                readable(token, self.kind),
                script,
                None if self.counts is None else int(self.counts[id_]),
            )
            for id_, token in self.removed.get(script, [])[:limit]
        ]

    def table(self, limit: int | None = None, script: str | None = None) -> str:
        """Return the tokens as text for people, each with its count where there is a text.

        Args:
            limit: Most tokens of a script; None is all.
            script: The only script to show; None is all.

        Raises:
            TokenizerError: there is no such script.
        """
        rows = []
        for name in self._names(script):
            found = self.of(name, limit)
            shown = f", the {len(found):,} most common" if len(found) < self.count(name) else ""
            head = f"{self.count(name):,} of {self.before.get(name, 0):,} tokens removed"
            rows.append(f"{name}: {head}{shown}")
            texts = [
                shortened_token(token.text) + ("" if token.count is None else f" {token.count:,}")
                for token in found
            ]
            rows += [f"    {line}" for line in token_lines(texts, LINE - 4)]
        return "\n".join([*rows, self.total()])

    def total(self) -> str:
        """Return how many tokens are removed, as a line for people."""
        if not self.before:
            return "all tokens are kept"
        removed = sum(map(len, self.removed.values()))
        return f"{removed:,} of {sum(self.before.values()):,} tokens are removed"

    def facts(self, limit: int | None = None, script: str | None = None) -> dict[str, Any]:
        """Return what ``table`` shows, for JSON."""
        return {
            name: {
                "before": self.before.get(name, 0),
                "removed": self.count(name),
                "tokens": [asdict(token) for token in self.of(name, limit)],
            }
            for name in self._names(script)
        }

    def _names(self, script: str | None) -> list[str]:
        if script is None:
            return list(self.removed)
        known = {name.lower(): name for name in (*KINDS, BYTES, *self.before)}
        return [known.get(script.lower()) or check_script(script, "script")]


def list_removed(
    tokenizer: TokenizerFile,
    ids: IdMap,
    ranks: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> RemovedTokens:
    """List the tokens that ``ids`` removes.

    Args:
        tokenizer: The source's.
        ids: The tokens that are kept.
        ranks: The tokenizer's ``merge_ranks``, if they are at hand.
        counts: int64 by id: how common each token is. Equally common ones are in the order of
            merges.
    """
    if ranks is None:
        ranks = merge_ranks(tokenizer, merge_tree(tokenizer, ids.old_size))
    by_id = np.asarray(ranks).tolist()
    how_often = counts.tolist() if counts is not None else [0] * len(by_id)
    before: Counter[str] = Counter()
    removed: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    groups = token_groups(tokenizer, ranks)
    for (token, id_), group in zip(tokenizer.token_ids.items(), groups, strict=True):
        before[group] += 1
        if ids.new(id_) is None:
            removed[group].append((id_, token))

    def commonness(entry: tuple[int, str]) -> tuple[int, int, int]:
        return -how_often[entry[0]], by_id[entry[0]], entry[0]

    most_first = sorted(removed, key=lambda name: (-len(removed[name]), name))
    ordered = {name: sorted(removed[name], key=commonness) for name in most_first}
    return RemovedTokens(dict(before), ordered, tokenizer.kind, counts)


def shortened_token(text: str) -> str:
    """``text`` without its end where it is long."""
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]}…"


def token_lines(texts: Iterable[str], width: int) -> list[str]:
    """Put ``texts`` on lines of at most ``width`` columns, two spaces apart."""
    lines: list[str] = []
    used = width
    for text in texts:
        columns = sum(_columns(char) for char in text)
        if used + 2 + columns > width:
            lines.append(text)
            used = columns
        else:
            lines[-1] += f"  {text}"
            used += 2 + columns
    return lines


def _columns(char: str) -> int:
    """Columns that a terminal shows a character in."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
