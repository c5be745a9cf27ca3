"""What the command line asks for → the order of rarity and the sizes of the cut."""

from collections.abc import Iterable
from typing import NamedTuple

from surgery.budget import Sizes, split
from surgery.errors import BudgetError, DataError, TokenizerError
from surgery.frequency import count_tokens
from surgery.layout import Layout
from surgery.options import Target, VocabularyOptions
from surgery.rarity import Rarity, identity_rarity
from surgery.scripts import check_script
from surgery.tokenizer import TokenizerFile
from surgery.vocabulary import VocabularyChoice, keep_file, open_vocabulary, rarity_of


class Chosen(NamedTuple):
    """The sizes of a cut and the order in which the vocabulary goes."""

    rarity: Rarity
    sizes: Sizes
    tokenizer: TokenizerFile | None
    """None where the vocabulary stays whole, which needs no tokenizer that can be cut."""


def choose_sizes(
    layout: Layout,
    target: Target,
    vocabulary: VocabularyOptions,
    documents: Iterable[str] | None = None,
) -> Chosen:
    """Return the order of rarity and (V', I') from ``--ratio`` or from the two sizes.

    Args:
        layout: The model.
        target: How much goes.
        vocabulary: How the order comes about.
        documents: To count tokens in, where the order is by frequency.

    Raises:
        BudgetError: neither a ratio nor both sizes, or all of them.
        DataError: the order is by frequency and there is no text.
        TokenizerError: the vocabulary cannot be cut, or lacks what is to be kept.
    """
    sizes = _given_sizes(target)
    if sizes is not None and sizes.vocab_size == layout.vocab_size:
        return Chosen(identity_rarity(layout.vocab_size), sizes, None)
    tokenizer = open_vocabulary(layout)
    choice = _choice(layout, tokenizer, vocabulary, documents)
    rarity = rarity_of(layout, choice, tokenizer)
    if sizes is None:
        sizes = split(layout, target.ratio or 0.0, rarity.must_keep)
    return Chosen(rarity, sizes, tokenizer)


def rarity_or_whole(
    layout: Layout, vocabulary: VocabularyOptions, documents: Iterable[str]
) -> Rarity:
    """The order of rarity; a vocabulary that cannot be cut stays whole."""
    try:
        tokenizer = open_vocabulary(layout)
    except TokenizerError:
        return identity_rarity(layout.vocab_size)
    return rarity_of(layout, _choice(layout, tokenizer, vocabulary, documents), tokenizer)


def parse_vocab_sizes(text: str, layout: Layout) -> list[int]:
    """Return the sizes in "V,V,…".

    Raises:
        BudgetError: not numbers between 1 and V.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if not 1 <= min(sizes) <= max(sizes) <= layout.vocab_size:
        raise BudgetError(
            "--vocab-sizes",
            "are not sizes of this vocabulary",
            expected=f"numbers from 1 to {layout.vocab_size}, with commas",
            found=text,
            fix="correct them",
        )
    return sizes


def _given_sizes(target: Target) -> Sizes | None:
    """The two sizes, or None where they follow from the ratio."""
    given = (target.vocab_size is not None, target.intermediate_size is not None)
    if (target.ratio is not None, *given) not in {(True, False, False), (False, True, True)}:
        raise BudgetError(
            "sizes",
            "are not clear",
            expected="--ratio, or --vocab-size and --intermediate-size",
            fix="give one or the other",
        )
    if target.vocab_size is None or target.intermediate_size is None:
        return None
    return Sizes(target.vocab_size, target.intermediate_size)


def _choice(
    layout: Layout,
    tokenizer: TokenizerFile,
    vocabulary: VocabularyOptions,
    documents: Iterable[str] | None,
) -> VocabularyChoice:
    """Read what the options name, and count tokens if they ask for it."""
    scripts = tuple(check_script(name) for name in vocabulary.keep_scripts)
    keep = frozenset[int]()
    if vocabulary.keep_tokens is not None:
        keep = keep_file(vocabulary.keep_tokens, tokenizer)
    counts = None
    if vocabulary.vocab_by == "frequency":
        if documents is None:
            raise DataError(
                "--vocab-by frequency", "needs a text to count tokens in", fix="give --data TEXT"
            )
        counts = count_tokens(tokenizer.library(), documents, layout.vocab_size)
    return VocabularyChoice(counts, vocabulary.drop_reserved, keep, scripts)
