"""A reader's own text in a report: tokenized before and after the cut, and its words."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import printable
from surgery.text.documents import Source, TextOptions
from surgery.tokenizer.id_map import IdMap
from surgery.tokenizer.kinds import SENTENCEPIECE, readable
from surgery.tokenizer.tokenizer_file import TokenizerFile, prune_tokenizer
from surgery.vocabulary.cost import TEXT_CHARACTERS, lines_by_script, tokens_by_script

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MOST_PASSAGES = 20
"""Passages that a page shows, of all files together."""

PASSAGE_CHARACTERS = 360
"""A longer paragraph is shown up to here."""

MOST_WORD_CHARACTERS = 1 << 20
"""Characters of text whose words a page holds, to count their tokens at any size."""

LEAST_GROWTH = 0.0005
"""A page shows less as no growth."""

Texts = Mapping[str, Sequence[str]]
"""Name of a text → its documents."""


def read_texts(
    options: TextOptions, documents: Callable[[TextOptions], Iterable[str]]
) -> dict[str, list[str]]:
    """Read the first ``TEXT_CHARACTERS`` of each source of a text, by its name.

    Args:
        options: Its sources, and how they are read.
        documents: Reads a text.

    Raises:
        DataError: as ``documents``.
    """
    found: dict[str, list[str]] = {}
    for source in options.data:
        texts, left = found.setdefault(_name(source, found), []), TEXT_CHARACTERS
        for document in documents(replace(options, data=(source,))):
            texts.append(document[:left])
            left -= len(document)
            if left <= 0:
                break
    return found


def _name(source: Source, taken: Collection[str]) -> str:
    """The name of a source's file without its ending, or all of it where another is the same."""
    short = printable(Path(source.name).stem or source.name)
    return printable(source.name) if short in taken else short


@dataclass(frozen=True)
class Piece:
    """A token of a passage."""

    text: str
    """As people read it."""
    id: int
    """In the source."""
    marked: bool
    """Before: whether it is removed. After: whether it stands where a token was removed."""


@dataclass(frozen=True)
class Passage:
    """A paragraph, tokenized by the source's tokenizer and by the pruned one."""

    name: str
    """The text that it is from."""
    text: str
    before: list[Piece]
    after: list[Piece]

    @property
    def growth(self) -> float:
        """Share by which its tokens increase."""
        return len(self.after) / len(self.before) - 1 if self.before else 0.0


@dataclass(frozen=True)
class TextGrowth:
    """The tokens of a text, or of its lines in one script."""

    name: str
    nbytes: int
    """UTF-8 bytes."""
    before: int
    after: int

    @property
    def growth(self) -> float:
        """Share by which its tokens increase."""
        return self.after / self.before - 1 if self.before else 0.0


@dataclass(frozen=True)
class TextFacts:
    """What a page says of the given texts."""

    texts: list[TextGrowth] = field(default_factory=list)
    scripts: list[TextGrowth] = field(default_factory=list)
    """Of all texts together, by script of the lines."""
    passages: list[Passage] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 by id: how often each token of the source is in the texts."""

    @property
    def grown(self) -> list[TextGrowth]:
        """Texts that take more tokens, in the page's digits; the one that grows most is first."""
        found = [row for row in self.texts if row.growth >= LEAST_GROWTH]
        return sorted(found, key=lambda row: -row.growth)

    @property
    def total(self) -> TextGrowth:
        """All texts together."""
        sums = (sum(getattr(t, key) for t in self.texts) for key in ("nbytes", "before", "after"))
        return TextGrowth("all text", *sums)


def text_facts(tokenizer: TokenizerFile, old: "Tokenizer", ids: IdMap, texts: Texts) -> TextFacts:
    """Tokenize the first ``TEXT_CHARACTERS`` of each text with both tokenizers.

    Args:
        tokenizer: The source's.
        old: The same, as the library has it.
        ids: The rows that are kept.
        texts: What the reader gave.
    """
    new, old_ids = prune_tokenizer(tokenizer, ids)
    counts = np.zeros(ids.old_size + ids.rowless, dtype=np.int64)
    found, passages, scripts = list[TextGrowth](), list[Passage](), dict[str, TextGrowth]()
    for name, documents in texts.items():
        lines = lines_by_script(documents)
        before, after = tokens_by_script(old, lines, counts), tokens_by_script(new, lines)
        sizes = {s: sum(len(line.encode("utf-8", "replace")) for line in lines[s]) for s in lines}
        found.append(
            TextGrowth(name, sum(sizes.values()), sum(before.values()), sum(after.values()))
        )
        for script, nbytes in sizes.items():
            so_far = scripts.get(script, TextGrowth(script, 0, 0, 0))
            scripts[script] = TextGrowth(
                script,
                so_far.nbytes + nbytes,
                so_far.before + before[script],
                so_far.after + after[script],
            )
    for name, paragraph in _in_turns(texts):
        passages.append(_passage(name, paragraph, tokenizer, (old, new), (ids, old_ids)))
    by_size = sorted(scripts.values(), key=lambda row: (-row.nbytes, row.name))
    return TextFacts(found, by_size, passages, counts)


def _in_turns(texts: Texts) -> list[tuple[str, str]]:
    """Return ``MOST_PASSAGES`` paragraphs with their texts' names: the first of each, and so on."""
    each = {name: list(islice(_paragraphs(texts[name]), MOST_PASSAGES)) for name in texts}
    turns = zip_longest(*each.values())
    found = [pair for turn in turns for pair in zip(each, turn, strict=True) if pair[1]]
    return found[:MOST_PASSAGES]


def _paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Yield the paragraphs of a text with their last newlines, long ones up to a word's end."""
    left = TEXT_CHARACTERS
    for document in documents:
        for paragraph in re.split(r"(?<=\n)\s*\n", document[:left]):
            text = paragraph.lstrip("\n")
            if len(text) > PASSAGE_CHARACTERS:
                cut = text.rfind(" ", PASSAGE_CHARACTERS // 2, PASSAGE_CHARACTERS)
                text = text[: cut if cut > 0 else PASSAGE_CHARACTERS]
            if text.strip():
                yield text
        left -= len(document)
        if left <= 0:
            return


def _passage(
    name: str,
    text: str,
    tokenizer: TokenizerFile,
    libraries: tuple["Tokenizer", "Tokenizer"],
    maps: tuple[IdMap, np.ndarray],
) -> Passage:
    """Tokenize a paragraph twice, and mark what is removed and what stands in its place.

    Its lines are tokenized one by one, as where the tokens of a text are counted.
    """
    passage, (ids, old_ids) = Passage(name, text, [], []), maps
    for line in text.splitlines(keepends=True):
        before, after = (each.encode(line, add_special_tokens=False) for each in libraries)
        gone = [ids.new(id_) is None for id_ in before.ids]
        places = {
            n
            for (start, stop), removed in zip(before.offsets, gone, strict=True)
            if removed
            for n in range(start, stop)
        }
        instead = [any(n in places for n in range(*span)) for span in after.offsets]
        passage.before.extend(_pieces(before, before.ids, gone, tokenizer))
        olds = [int(old_ids[id_]) for id_ in after.ids]
        passage.after.extend(_pieces(after, olds, instead, tokenizer))
    return passage


def _pieces(
    encoding: "Encoding", ids: list[int], marked: list[bool], tokenizer: TokenizerFile
) -> list[Piece]:
    return [
        Piece(readable(token, tokenizer.kind), id_, mark)
        for token, id_, mark in zip(encoding.tokens, ids, marked, strict=True)
    ]


@dataclass(frozen=True)
class Words:
    """The words of a text, to count its tokens at any size of the vocabulary."""

    scripts: list[str]
    words: list[list[str]]
    """For each script: each word once, as the vocabulary spells it."""
    counts: list[list[int]]
    """How often each word occurs."""
    constant: list[int]
    """For each script: tokens that no size changes, such as those of single bytes."""
    nbytes: list[int]
    """UTF-8 bytes of the lines of each script."""

    def facts(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)


def text_words(
    tokenizer: TokenizerFile,
    library: "Tokenizer",
    texts: Texts,
    characters: int = MOST_WORD_CHARACTERS,
) -> Words:
    """Return the words of the first ``characters`` of the texts.

    A word is what merges cannot cross. Its spelling is that of its tokens, joined.
    """
    fixed = set(tokenizer.added.values()) | tokenizer.unknown
    if tokenizer.kind is SENTENCEPIECE:
        fixed |= {id_ for token, id_ in tokenizer.vocab.items() if _BYTE.fullmatch(token)}
    crosses = any(_INSIDE.search(token) for token in tokenizer.vocab)
    result = Words([], [], [], [], [])
    for script, lines in _first_lines(texts, characters).items():
        counts, constant = _count_words(library, lines, fixed)
        if not crosses:
            whole, counts = counts, Counter()
            for word, count in whole.items():
                for part in _INSIDE.split(word):
                    counts[part] += count
        counts.pop("", None)
        result.scripts.append(script)
        result.words.append(list(counts))
        result.counts.append(list(counts.values()))
        result.constant.append(constant)
        result.nbytes.append(sum(len(line.encode("utf-8", "replace")) for line in lines))
    return result


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_INSIDE = re.compile("(?<=[^\u2581])(?=\u2581)")
"""Between a word and the next: no merge crosses it where no token does."""


def _first_lines(texts: Texts, characters: int) -> dict[str, list[str]]:
    """Script → lines of the first ``characters`` of the texts."""
    lines, left = dict[str, list[str]](), characters
    for documents in texts.values():
        for script, found in lines_by_script(documents).items():
            for line in found:
                if left > 0:
                    lines.setdefault(script, []).append(line[:left])
                    left -= len(line)
    return lines


def _count_words(
    library: "Tokenizer", lines: list[str], fixed: set[int]
) -> tuple[Counter[str], int]:
    """Count the words of lines, and the tokens in ``fixed``, which part words."""
    counts, constant = Counter[str](), 0
    for encoding in library.encode_batch(lines, add_special_tokens=False):
        word, number = "", None
        for token, id_, index in zip(encoding.tokens, encoding.ids, encoding.word_ids, strict=True):
            if index != number or id_ in fixed:
                counts[word] += 1
                word, number = "", index
            if id_ in fixed:
                constant += 1
            else:
                word += token
        counts[word] += 1
    return counts, constant
