"""What the rows of a vocabulary hold: tokens by kind and by script."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.layout.layout import Layout
from surgery.plot import html_table, saved_figure, titled
from surgery.tokenizer.merges import MergeTree
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.order import DEAD, merge_ranks, open_vocabulary, reserved_tokens
from surgery.vocabulary.scripts import BYTES, COMMON, scripts_of

KINDS = ("ordinary", "unreachable", "alphabet", "special", "reserved")
"""The kinds of tokens, in the order in which they are shown."""
TOP_SCRIPTS = 12
"""Scripts shown by name; the others are added up in one line."""
_LABELS = {COMMON: f"{COMMON} (no letters)", BYTES: f"{BYTES} (partial)"}


@dataclass(frozen=True)
class VocabCensus:
    """Counts of one vocabulary's tokens and embedding rows."""

    rows: int
    """Rows of the embedding."""
    tokens: int
    padding_rows: int
    """Rows after the last token."""
    rowless_tokens: int
    """Tokens after the last row."""
    kinds: dict[str, int]
    """Tokens by kind, all of :data:`KINDS`."""
    scripts: dict[str, int]
    """Ordinary tokens by script, largest first; "Bytes" are parts of characters."""
    mean_chars: dict[str, float]
    """Mean Unicode characters of an ordinary token by script; none for "Bytes"."""
    max_chars: dict[str, int]
    """Unicode characters of the longest ordinary token by script; none for "Bytes"."""

    @classmethod
    def of(cls, rows: int, texts: Sequence[str | None], kinds: Sequence[str]) -> "VocabCensus":
        """Count the tokens of a vocabulary, in any order.

        Args:
            rows: Rows of the embedding.
            texts: The text of each token; None if it is not made of whole characters.
            kinds: One of :data:`KINDS` for each token.

        Raises:
            ValueError: ``texts`` and ``kinds`` differ in length, or a kind is unknown.
        """
        by_kind = Counter(kinds)
        if unknown := by_kind.keys() - set(KINDS):
            raise ValueError(f"unknown kinds of tokens: {sorted(unknown)}")
        ordinary = [text for text, kind in zip(texts, kinds, strict=True) if kind == "ordinary"]
        by_script: defaultdict[str, list[str | None]] = defaultdict(list)
        for text, script in zip(ordinary, scripts_of(ordinary), strict=True):
            by_script[script].append(text)
        largest_first = sorted(by_script, key=lambda script: (-len(by_script[script]), script))
        lengths = {
            script: [len(text) for text in by_script[script] if text is not None]
            for script in largest_first
            if script != BYTES
        }
        return cls(
            rows=rows,
            tokens=len(texts),
            padding_rows=max(rows - len(texts), 0),
            rowless_tokens=max(len(texts) - rows, 0),
            kinds={kind: by_kind[kind] for kind in KINDS},
            scripts={script: len(by_script[script]) for script in largest_first},
            mean_chars={script: sum(chars) / len(chars) for script, chars in lengths.items()},
            max_chars={script: max(chars) for script, chars in lengths.items()},
        )

    def top_scripts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Script → ordinary tokens: of the scripts to show by name, and of all others."""
        counts = list(self.scripts.items())
        return dict(counts[:TOP_SCRIPTS]), dict(counts[TOP_SCRIPTS:])

    def table(self) -> str:
        """The census as text for people."""
        rows = [f"{'rows':<24}{self.rows:>12,}", f"{'tokens':<24}{self.tokens:>12,}"]
        for kind, count in self.kinds.items():
            rows.append(f"  {kind:<22}{count:>12,}{_share(count, self.tokens):>8.1%}")
        rows.append(f"{'padding rows':<24}{self.padding_rows:>12,}")
        if self.rowless_tokens:
            rows.append(f"{'tokens without a row':<24}{self.rowless_tokens:>12,}")
        rows.append("")
        rows.append(
            f"{'ordinary, by script':<24}{'tokens':>12}{'share':>8}{'chars':>8}{'longest':>9}"
        )
        top, others = self.top_scripts()
        for script in top:
            rows.append(self._line(_LABELS.get(script, script), [script]))
        if others:
            rows.append(self._line(_others(others), list(others)))
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        rows = [(name, count, _share(count, self.tokens)) for name, count in self.kinds.items()]
        rows += [(f"ordinary: {n}", c, _share(c, self.tokens)) for n, c in self.scripts.items()]
        title = f"{self.tokens:,} tokens, {self.rows:,} embedding rows"
        return html_table(title, ("tokens", "count", "share"), rows)

    def _line(self, label: str, scripts: list[str]) -> str:
        """One line of the table: tokens, share, mean and longest length of some scripts."""
        count = sum(self.scripts[script] for script in scripts)
        line = f"  {label:<22}{count:>12,}{_share(count, self.kinds['ordinary']):>8.1%}"
        known = [script for script in scripts if script in self.mean_chars]
        if not known:
            return line
        total = sum(self.mean_chars[script] * self.scripts[script] for script in known)
        mean = total / sum(self.scripts[script] for script in known)
        return f"{line}{mean:>8.1f}{max(self.max_chars[script] for script in known):>9,}"


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def _others(others: dict[str, int]) -> str:
    return f"{len(others)} other{'s' if len(others) != 1 else ''}"


def _bars(census: VocabCensus) -> tuple[dict[str, int], dict[str, int]]:
    """Label → count of each bar: ordinary tokens by script, and all other rows."""
    top, others = census.top_scripts()
    scripts = {_LABELS.get(script, script): count for script, count in top.items()}
    if others:
        scripts[_others(others)] = sum(others.values())
    rest = {**census.kinds, "padding rows": census.padding_rows}
    del rest["ordinary"]
    return scripts, {label: count for label, count in rest.items() if count}


def plot_vocab_census(census: VocabCensus, path: Path, model: str = "") -> None:
    """Write a bar for each script, kind of token and the padding rows to the image ``path``.

    The title names ``model``.

    Raises:
        OutputError: as ``saved_figure``.
    """
    scripts, rest = _bars(census)
    with saved_figure(path, 8, 1.6 + 0.3 * (len(scripts) + len(rest))) as figure:
        axes = figure.subplots()
        total = census.tokens + census.padding_rows
        for label, counts in (("ordinary tokens, by script", scripts), ("other rows", rest)):
            bars = axes.barh(list(counts), list(counts.values()), label=label)
            texts = [f"{count:,}  ({_share(count, total):.1%})" for count in counts.values()]
            axes.bar_label(bars, texts, padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.24, y=0.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(
            xlabel="tokens (share of all)",
            title=titled(model, f"{census.tokens:,} tokens, {census.rows:,} embedding rows"),
        )
        figure.legend(loc="outside lower center", ncols=2, frameon=False)


def vocabulary_census(layout: Layout) -> VocabCensus:
    """Count the tokens of a checkpoint's vocabulary.

    Raises:
        TokenizerError: this kind of tokenizer cannot be pruned.
    """
    tokenizer = open_vocabulary(layout)
    ranks = merge_ranks(tokenizer, merge_tree(tokenizer, layout.vocab_size))
    kinds = token_kinds(tokenizer, ranks)
    texts = list(map(tokenizer.kind.text, tokenizer.token_ids))
    return VocabCensus.of(layout.vocab_size, texts, kinds)


def merge_tree(tokenizer: TokenizerFile, rows: int) -> MergeTree:
    """Return the tree of merges of a tokenizer whose embedding has ``rows`` rows."""
    size = 1 + max(rows - 1, *tokenizer.token_ids.values())
    return MergeTree(tokenizer.vocab, tokenizer.merges, size)


def token_kinds(tokenizer: TokenizerFile, ranks: np.ndarray) -> list[str]:
    """Return one of :data:`KINDS` for each of the tokenizer's ``token_ids``, in their order."""
    dead = set(np.flatnonzero(ranks == DEAD).tolist())
    reserved = reserved_tokens(tokenizer)
    kinds = []
    for token, id_ in tokenizer.token_ids.items():
        if token in reserved:
            kinds.append("reserved")
        elif token in tokenizer.added:
            kinds.append("special")
        elif id_ in tokenizer.alphabet:
            kinds.append("alphabet")
        else:
            kinds.append("unreachable" if id_ in dead else "ordinary")
    return kinds


def token_groups(tokenizer: TokenizerFile, ranks: np.ndarray) -> list[str]:
    """Return the script of each ordinary token and the kind of each other one, in order."""
    texts = scripts_of(map(tokenizer.kind.text, tokenizer.token_ids))
    kinds = token_kinds(tokenizer, ranks)
    return [s if k == "ordinary" else k for s, k in zip(texts, kinds, strict=True)]
