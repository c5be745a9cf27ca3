"""Which tokens to keep: the order of rarity, by merges or by counts, parents before children."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgery.config.rewrite import template_tokens, token_references
from surgery.errors import BudgetError, DataError, TokenizerError, check_choice, did_you_mean
from surgery.families.default_ids import fill_defaults
from surgery.files.model_files import PROMPTS_NAME
from surgery.files.strict_json import read_file, read_json
from surgery.layout.layout import Layout
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import SENTENCEPIECE, WORDPIECE
from surgery.tokenizer.merges import MergeTree
from surgery.tokenizer.tokenizer_file import TokenizerFile
from surgery.vocabulary.scripts import scripts_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Rarity:
    """The rows of the embedding from the most to the least common."""

    order: np.ndarray
    """int64 ``[V]``: row ids. Any prefix that holds ``must_keep`` is closed under merges."""
    must_keep: int
    """How many rows at the front must be kept."""
    tokens: int
    """Tokens that have a row; the rest of ``order`` are padding rows."""
    rowless: int
    """Added tokens after the last row."""
    dropped: int = 0
    """Tokens with a row that the options want removed; of all tokens they are the rarest."""
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 by id, ``merge_ranks``; empty where the whole vocabulary is kept."""

    def check(self, vocab_size: int | None) -> None:
        """Refuse a size that the vocabulary cannot have.

        Raises:
            BudgetError: ``vocab_size`` is above V or below ``must_keep``.
        """
        if vocab_size is not None and not self.must_keep <= vocab_size <= len(self.order):
            raise BudgetError(
                "`vocab_size`",
                "is out of reach",
                expected=f"{self.must_keep} (bytes, special, referenced and asked-for tokens, "
                f"white space) to {len(self.order)} (the source's rows)",
                found=vocab_size,
                fix="choose a size in this range",
            )

    def id_map(self, vocab_size: int) -> IdMap:
        """Keep the ``vocab_size`` most common rows.

        Raises:
            BudgetError: as ``check``.
        """
        self.check(vocab_size)
        return IdMap(np.sort(self.order[:vocab_size]), len(self.order), self.rowless)

    def buckets(self, edges: Sequence[int]) -> np.ndarray:
        """int64 ``[V]``: for each row the first bucket whose edge is above its rank."""
        buckets = np.empty(len(self.order), dtype=np.int64)
        buckets[self.order] = np.searchsorted(edges, np.arange(len(self.order)), side="right")
        return buckets


def identity_rarity(rows: int) -> Rarity:
    """The order of a vocabulary that is kept whole: every row must be kept."""
    return Rarity(np.arange(rows), must_keep=rows, tokens=rows, rowless=0)


BATCH_CHARACTERS = 1 << 18
"""Text encoded at a time: its tokens take some 30 MB."""


def count_tokens(tokenizer: "Tokenizer", documents: Iterable[str], size: int) -> np.ndarray:
    """int64 ``[size]``: occurrences of every id below ``size`` in ``documents``.

    Special tokens that the post-processor adds are not counted.

    Raises:
        DataError: there is no token at all.
    """
    counts = np.zeros(size, dtype=np.int64)
    for ids in encoded(tokenizer, documents):
        counts += np.bincount(ids, minlength=size)[:size]
    if not counts.any():
        raise DataError("`data`", "has no text to count tokens in", fix="give a text")
    return counts


def encoded(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the ids of ``texts``, a batch at a time, without the post-processor's tokens."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for batch in _batches(texts):
        found = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield np.concatenate([np.array(part.ids, dtype=np.int64) for part in found])


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    """Gather short texts and split long ones, at line ends where there are any."""
    batch: list[str] = []
    size = 0
    for text in texts:
        for part in _parts(text):
            batch.append(part)
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        line_end = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1
        stop = line_end or start + BATCH_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


DEAD = np.iinfo(np.int64).max
"""Rank of a token that no merge produces: it occurs in no tokenized text."""

RESERVED = re.compile(
    r"<unused_?\d+>|<\|?reserved_special_token_\d+\|?>|<\|reserved_token_\d+\|>"
    r"|<[｜|]place[▁_]holder[▁_]no[▁_]\d+[｜|]>|<\|placeholder\d+\|>|<\|dummy_\d+\|>"
    r"|\[control_\d+\]|<SPECIAL_\d+>|\[unused_?\d+\]"
)
"""Names of tokens that are reserved for later use."""


ORDERS = ("merge-order", "frequency")


@dataclass(frozen=True)
class VocabularyOptions:
    """How to choose the tokens to keep, apart from their number."""

    vocab_by: str = "merge-order"
    """What makes a token rare: "merge-order" (late in the merge list) or "frequency" in a text."""
    drop_reserved: bool = False
    """Whether to remove tokens that are reserved for later use and that nothing refers to."""
    keep_tokens: Path | str | Sequence[str] | None = None
    """Tokens to keep, as the vocabulary spells them or as plain text; or the path of a file of
    them, one a line."""
    keep_scripts: Sequence[str] = ()
    """Unicode scripts whose tokens to keep, such as Cyrillic."""
    drop_scripts: Sequence[str] = ()
    """Unicode scripts whose tokens are removed before all others."""

    def __post_init__(self) -> None:
        check_choice("vocab_by", self.vocab_by, ORDERS)

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [Path(self.keep_tokens)] if isinstance(self.keep_tokens, str | Path) else []

    @property
    def drops(self) -> bool:
        """Whether tokens are named that are to be removed."""
        return self.drop_reserved or bool(self.drop_scripts)

    def given(self) -> list[str]:
        """Return the names of the options that are not left at their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]


@dataclass(frozen=True)
class VocabularyChoice:
    """Which tokens are the most common, and which others to keep."""

    counts: np.ndarray | None = None
    """int64 by id: how often each token occurs; None orders by the merge list."""
    drop_reserved: bool = False
    """Whether tokens that are reserved for later use are the rarest of all."""
    keep: frozenset[int] = frozenset()
    """Ids to keep."""
    keep_scripts: Sequence[str] = ()
    """Unicode scripts whose tokens to keep."""
    drop_scripts: Sequence[str] = ()
    """Unicode scripts whose tokens are the rarest of all."""


def open_vocabulary(layout: Layout) -> TokenizerFile:
    """Open a checkpoint's tokenizer and check that it belongs to the embedding.

    Raises:
        TokenizerError: it cannot be pruned, or has tokens without a row that are not the last ones.
    """
    tokenizer = TokenizerFile.open(layout.checkpoint.path)
    beyond = sorted(i for i in tokenizer.token_ids.values() if i >= layout.vocab_size)
    if beyond and (
        max(tokenizer.vocab.values()) >= layout.vocab_size
        or beyond != list(range(layout.vocab_size, layout.vocab_size + len(beyond)))
    ):
        raise TokenizerError(
            tokenizer.path,
            "has tokens without a row in the embedding",
            expected=f"ids below {layout.vocab_size}",
            found=beyond[0],
            fix="use the tokenizer that belongs to this checkpoint",
        )
    return tokenizer


def rarity_of(
    layout: Layout,
    choice: VocabularyChoice = VocabularyChoice(),
    tokenizer: TokenizerFile | None = None,
) -> Rarity:
    """Order the rows of a checkpoint's embedding from the most to the least common.

    The order follows from its tokenizer, its JSON files and ``choice``.

    Args:
        layout: The checkpoint.
        choice: What must be kept, and what counts as rare.
        tokenizer: The result of ``open_vocabulary``; it is opened where this is None.

    Raises:
        TokenizerError: the tokenizer cannot be pruned.
    """
    tokenizer = tokenizer or open_vocabulary(layout)
    reserved = reserved_tokens(tokenizer) if choice.drop_reserved else {}
    referenced = set(token_references(layout.checkpoint, tokenizer.token_ids))
    referenced |= template_tokens(layout.checkpoint.path, reserved)
    referenced |= prompt_tokens(layout.checkpoint.path, tokenizer)
    referenced |= set(range(layout.vocab_size - layout.rows_beside_text, layout.vocab_size))
    if layout.family.positions_after_pad:  # the padding token must keep its id
        filled = fill_defaults(layout.checkpoint.config, lambda old: old, layout.checkpoint.family)
        padding = {**filled, **layout.family.text_config(filled)}["pad_token_id"]
        referenced |= set(range(padding or 0))
    return order_rows(tokenizer, layout.vocab_size, referenced, choice)


def prompt_tokens(directory: Path, tokenizer: TokenizerFile) -> set[int]:
    """Ids of the tokens of an embedding model's prompts, which sentence-transformers prepends."""
    path = directory / PROMPTS_NAME
    prompts = read_json(path).get("prompts") if path.exists() else None
    texts = [text for text in prompts.values() if text] if isinstance(prompts, dict) else []
    if not all(isinstance(text, str) for text in texts):
        raise TokenizerError(
            f"{path}: prompts", "has an entry that is no text", fix="correct it, or remove it"
        )
    found = encoded(tokenizer.library(), texts) if texts else ()
    return {int(id_) for ids in found for id_ in ids}


def reserved_tokens(tokenizer: TokenizerFile) -> dict[str, int]:
    """Token → id of the tokens whose names mark them as reserved for later use."""
    return {token: id_ for token, id_ in tokenizer.token_ids.items() if RESERVED.fullmatch(token)}


def order_rows(
    tokenizer: TokenizerFile,
    rows: int,
    referenced: Iterable[int],
    choice: VocabularyChoice = VocabularyChoice(),
) -> Rarity:
    """Order ``rows`` embedding rows from those that must be kept to the rarest.

    First come the rows that must be kept: the alphabet, added tokens, ``referenced`` ids, runs of
    white space, what ``choice`` asks for, and whatever these are merged from. Then come tokens by
    count, where there are counts, and by rank (``merge_ranks``). A token never comes before its
    parents: text whose tokens are all kept is tokenized as before. Last come dead tokens, those
    that ``choice`` drops unless others are merged from them, and padding rows.
    """
    size = max(rows, max(tokenizer.token_ids.values(), default=0) + 1)
    tree = MergeTree(tokenizer.vocab, tokenizer.merges, size)
    rank = merge_ranks(tokenizer, tree)
    must = tokenizer.alphabet | set(tokenizer.added.values()) | choice.keep
    must |= tokens_of_scripts(tokenizer, choice.keep_scripts)
    must |= set(referenced) | tokenizer.referenced_ids()
    count = np.zeros(len(rank), dtype=np.int64)
    if choice.counts is not None:
        count[: len(choice.counts)] = choice.counts[: len(count)]
        tree.lift_parents(count)
    unwanted = tokens_of_scripts(tokenizer, choice.drop_scripts) - must
    if choice.drop_reserved:
        unused = set(reserved_tokens(tokenizer).values()) - set(referenced) - choice.keep
        unused -= tokenizer.referenced_ids()
        must -= unused
        unwanted |= unused
    count[list(unwanted)] = -1
    if choice.drop_scripts:
        tree.lift_parents(count)
    token_rows = np.unique([i for i in tokenizer.token_ids.values() if i < rows])
    first = tree.with_parents(np.array(sorted(i for i in must if i < rows), dtype=np.int64))
    order = np.lexsort((token_rows, tree.length[token_rows], rank[token_rows], -count[token_rows]))
    later = token_rows[order]
    later = later[~np.isin(later, first)]
    padding = np.setdiff1d(np.arange(rows), token_rows)
    return Rarity(
        np.concatenate([first, later, np.setdiff1d(padding, first)]),
        must_keep=len(first),
        tokens=len(token_rows),
        rowless=sum(i >= rows for i in tokenizer.token_ids.values()),
        dropped=int((count[later] < 0).sum()),
        ranks=rank,
    )


def merge_ranks(tokenizer: TokenizerFile, tree: MergeTree) -> np.ndarray:
    """int64 by id: the paper's order, where the last merges are the rarest; ``DEAD`` for the dead.

    - Byte-level BPE ranks a token by its first merge.
    - SentencePiece-style vocabularies have their merges in the order of ids, but list runs of
      spaces last and characters after all pieces. So they rank by id. A character ranks as the
      first piece that needs it, or after all pieces.
      Where vocab.json gives the ids of a model's pieces in any order, they rank by their merges.
    - Unigram ranks by score, WordPiece by id.

    Where the library takes a token whole, without merges (``ignore_merges``), it ranks with the
    ids before it.
    """
    by_id = np.arange(len(tree.length))
    known = tree.length > 0
    if tokenizer.scores is not None:
        rank = np.full(len(by_id), DEAD)
        rank[np.argsort(-tokenizer.scores, kind="stable")] = np.arange(len(tokenizer.scores))
        return rank
    if tokenizer.kind is WORDPIECE:
        return np.where(known, by_id, DEAD)
    if tokenizer.kind is SENTENCEPIECE:
        place = by_id.copy()
        if tokenizer.models is not None:
            place[tokenizer.merges[:, 2]] = np.arange(len(tokenizer.merges))
        rank = np.where(tree.merged, place, DEAD)
        letters = np.flatnonzero(tree.length == 1)
        rank[letters] = len(by_id) + letters
        parents, children = tree.parents[tree.merged], np.flatnonzero(tree.merged)
        for side in parents.T:
            of_letter = tree.length[side] == 1
            np.minimum.at(rank, side[of_letter], place[children[of_letter]])
    else:
        rank = np.full(len(by_id), DEAD)
        product = tokenizer.merges[:, 2]
        rank[product[::-1]] = np.arange(len(product))[::-1]
        rank[(tree.length > 1) & ~tree.merged] = DEAD
        rank[tree.length == 1] = -1
    if tokenizer.ignore_merges:
        whole = np.flatnonzero(known & (rank == DEAD))
        before = np.maximum.accumulate(np.where(rank == DEAD, -1, rank))
        rank[whole] = before[whole]
    tree.lower_children(rank)
    return rank


def kept_tokens(
    tokens: Path | str | Sequence[str] | None, tokenizer: TokenizerFile
) -> frozenset[int]:
    """Ids of ``tokens``, as the vocabulary spells them or as plain text; or of a file of them.

    A text of several tokens stands for all tokens that it is made of.

    Raises:
        TokenizerError: the vocabulary lacks one of them, and cannot spell it.
    """
    if tokens is None:
        return frozenset()
    is_file = isinstance(tokens, str | Path)
    lines = _lines(Path(tokens)) if isinstance(tokens, str | Path) else tokens
    where = f"{tokens}: line" if is_file else "`keep_tokens`: item"
    spelled: dict[str, int] = {}
    for token, id_ in tokenizer.vocab.items():
        text = tokenizer.kind.text(token)
        if text is not None:
            spelled.setdefault(text, id_)
    found, library, texts = set[int](), None, list[str]()
    for number, line in enumerate(lines, 1):
        named = tokenizer.token_ids.get(line, spelled.get(line))
        if named is not None:
            found.add(named)
            continue
        library = library or tokenizer.library()
        ids = library.encode(line, add_special_tokens=False).ids
        if line and (not ids or tokenizer.unknown & set(ids)):
            raise TokenizerError(
                f"{where} {number}",
                "is not made of tokens of this vocabulary",
                found=repr(line),
                fix="correct or remove it: spell it as the vocabulary does, or as plain text",
            )
        found.update(ids)
        if line:
            texts.append(line)
    if texts:
        LOG.info(
            "note: `keep_tokens`: %d of its texts are several tokens, which are all kept; the "
            "first is %r",
            len(texts),
            texts[0],
        )
    return frozenset(found)


def _lines(path: Path) -> list[str]:
    try:
        return read_file(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TokenizerError(path, "is not UTF-8 text", fix="save it as UTF-8") from error
    except OSError as error:
        fix = f"{did_you_mean(path)}name a file of tokens with `keep_tokens`"
        raise TokenizerError(path, "cannot be read", found=error.strerror, fix=fix) from error


def tokens_of_scripts(tokenizer: TokenizerFile, names: Sequence[str]) -> set[int]:
    """Ids of the tokens of these scripts."""
    if not names:
        return set()
    scripts = scripts_of(map(tokenizer.kind.text, tokenizer.vocab))
    ids = tokenizer.vocab.values()
    return {id_ for id_, script in zip(ids, scripts, strict=True) if script in names}
