"""The merges of a tokenizer: their ids, and the parents from which BPE makes each token."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import AMEND, TokenizerError


class _Rule:
    """Stands for a rule that was read: one object for all of them."""


@dataclass(frozen=True, eq=False)
class MergeRules:
    """Rules by rank. Each takes 12 bytes; as a list of two strings it takes 200."""

    ids: np.ndarray
    """int32 ``[rules, 3]``: ids of left part, right part and product."""
    paired: bool
    """Whether the file has them as [a, b], not as "a b"."""

    @classmethod
    def read(cls, merges: msgspec.Raw, vocab: Mapping[str, int], path: Path) -> "MergeRules":
        """Read model.merges of the file ``path``, a JSON array, without its ``#version`` lines.

        Raises:
            TokenizerError: a rule is not a pair, differs in form from the first, or names no
                token.
            msgspec.MsgspecError: ``merges`` is not an array.
        """
        found, first, rule = array("i"), list[Any](), _Rule()

        def note(_: type, entry: Any) -> _Rule:
            if not _is_version(entry):
                first.append(entry) if not first else check_form(entry, first[0], path)
                found.extend(rule_ids(entry, vocab, path))
            return rule

        # A set of one object does not grow, as a list would.
        msgspec.json.decode(merges, type=set[_Rule], dec_hook=note)
        ids = np.frombuffer(found, dtype=np.int32).reshape(-1, 3)
        return cls(ids, paired=not first or isinstance(first[0], list))

    def named(self, keep: np.ndarray, vocab: Mapping[str, int]) -> "NamedRules":
        """The rules that the mask ``keep`` selects, spelled with the tokens of ``vocab``."""
        return NamedRules(MergeRules(self.ids[keep], self.paired), vocab)


@dataclass(frozen=True, eq=False)
class NamedRules:
    """Rules as the file spells them, [a, b] or "a b"; each is made when it is read."""

    rules: MergeRules
    vocab: Mapping[str, int]
    """Token → id of all tokens that the rules name."""

    def __iter__(self) -> Iterator[Any]:
        """The rules by rank."""
        names = np.full(self.rules.ids.max(initial=0) + 1, "", dtype=object)
        for token, id_ in self.vocab.items():
            if id_ < len(names):
                names[id_] = token
        for left, right, _ in map(np.ndarray.tolist, self.rules.ids):
            pair = [names[left], names[right]]
            yield pair if self.rules.paired else " ".join(pair)


def merge_entries(merges: list[Any]) -> list[Any]:
    """Rules as the file spells them, "a b" or [a, b], without a ``#version`` line."""
    return [entry for entry in merges if not _is_version(entry)]


def check_form(rule: Any, first: Any, path: Path) -> None:
    """Check that ``rule`` has the form of the ``first``."""
    if type(rule) is not type(first):
        raise TokenizerError(
            f"{path}: merge {rule!r}",
            "is not of the form of the first",
            expected=f"a form like {first!r}",
            fix=AMEND,
        )


def rule_ids(entry: Any, vocab: Mapping[str, int], path: Path) -> tuple[int, int, int]:
    """Ids of left part, right part and product.

    Raises:
        TokenizerError: ``entry`` is not a pair, or a part or product is not in the vocabulary.
    """
    try:
        left, right = entry if isinstance(entry, list) else entry.split(" ")
        return vocab[left], vocab[right], vocab[left + right]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _bad_merge(entry, error, path) from error


def _is_version(entry: Any) -> bool:
    return isinstance(entry, str) and entry.startswith("#version")


def _bad_merge(entry: Any, error: Exception, path: Path) -> TokenizerError:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not (isinstance(parts, list) and [type(part) for part in parts] == [str, str]):
        return TokenizerError(f"{path}: merge {entry!r}", "is not a pair of tokens", fix=AMEND)
    return TokenizerError(
        f"{path}: merge {parts[0]!r} {parts[1]!r}",
        "needs a token that the vocabulary lacks",
        expected=repr(error.args[0]),
        fix=AMEND,
    )


NEVER = np.iinfo(np.int64).max
"""Rule of a pair that no merge joins."""

PRODUCT_BITS = 32
"""A rule is one number: the product in these low bits, the rank above. The least applies first."""

UNICODE = 0x110000


class BatchedBpe:
    """A tokenizer's own BPE, run on the text of its tokens.

    The list of merges does not tell a token's parents: Llama 3.1 and Gemma 3 have tokens with
    several merges. All tokens of one length take their steps together. That takes 0.4 s for Llama
    3.1's 128,000 tokens; a loop over them took 1.3 s.
    """

    def __init__(self, vocab: Mapping[str, int], merges: np.ndarray) -> None:
        """Index the merges.

        Args:
            vocab: Token → id.
            merges: int64 ``[merges, 3]``: ids of left part, right part and product, by rank.
        """
        self._names = {id_: token for token, id_ in vocab.items()}
        self._size = max(vocab.values(), default=0) + 1
        self._characters = np.full(UNICODE, -1, dtype=np.int64)
        for token, id_ in vocab.items():
            if len(token) == 1:
                self._characters[ord(token)] = id_
        keys = self._keys(merges[:, 0], merges[:, 1])
        # A pair given twice: the last one wins, as in the tokenizers library.
        self._pairs, index = np.unique(keys[::-1], return_index=True)
        rank = len(keys) - 1 - index
        self._rules = (rank << PRODUCT_BITS) + merges[rank, 2]

    def parents(self, ids: np.ndarray) -> np.ndarray:
        """Return int64 ``[len(ids), 2]``: the parts that BPE joins last on each token's text.

        -1 for a token that is one character or that BPE does not reach.
        """
        result = np.full((len(ids), 2), -1, dtype=np.int64)
        texts = [self._names.get(id_, "") for id_ in ids.tolist()]
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        for length in np.unique(lengths[lengths > 1]).tolist():
            rows = np.flatnonzero(lengths == length)
            chosen = np.array([texts[row] for row in rows.tolist()], dtype=f"U{length}")
            parts = self._characters[chosen.view(np.uint32).reshape(len(rows), length)]
            known = (parts >= 0).all(axis=1)
            result[rows[known]] = self._last_merge(parts[known], ids[rows[known]])
        return result

    def _last_merge(self, parts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Run BPE on the rows of ``parts`` ``[n, length]``; a step does one merge in every row."""
        result = np.full((len(parts), 2), -1, dtype=np.int64)
        rows = np.arange(len(parts))
        rules = self._look_up(parts[:, :-1], parts[:, 1:])
        while len(rows):
            position = rules.argmin(axis=1)
            first = rules[np.arange(len(rows)), position]
            alive = first != NEVER
            rows, parts, rules = rows[alive], parts[alive], rules[alive]
            position, joined = position[alive], first[alive] & ((1 << PRODUCT_BITS) - 1)
            if parts.shape[1] == 2:
                reached = joined == wanted[rows]
                result[rows[reached]] = parts[reached]
                break
            parts = _without(parts, position + 1)
            parts[np.arange(len(rows)), position] = joined
            rules = _without(rules, position)
            for side in (position - 1, position):
                inside = np.flatnonzero((side >= 0) & (side < rules.shape[1]))
                at = side[inside]
                rules[inside, at] = self._look_up(parts[inside, at], parts[inside, at + 1])
        return result

    def _look_up(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Rules of pairs of parts; ``NEVER`` where no merge joins them."""
        if not len(self._pairs):
            return np.full(left.shape, NEVER)
        keys = self._keys(left, right)
        index = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        return np.where(self._pairs[index] == keys, self._rules[index], NEVER)

    def _keys(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return left * self._size + right


def _without(table: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return ``table`` ``[n, m]`` without element ``column[i]`` of each row i."""
    keep = np.arange(table.shape[1]) != column[:, None]
    return table[keep].reshape(len(table), table.shape[1] - 1)


class MergeTree:
    """The two parents from which BPE merges each token of a vocabulary."""

    def __init__(self, vocab: Mapping[str, int], merges: np.ndarray, size: int) -> None:
        """Run BPE on every token.

        Args:
            vocab: Token → id.
            merges: As for ``BatchedBpe``.
            size: One more than the largest id.
        """
        self.length = np.zeros(size, dtype=np.int64)
        """Characters of each token, by id; 0 where the model has none."""
        ids = np.fromiter(vocab.values(), dtype=np.int64, count=len(vocab))
        self.length[ids] = np.fromiter(map(len, vocab), dtype=np.int64, count=len(ids))
        self.parents = np.full((size, 2), -1, dtype=np.int64)
        """int64 ``[size, 2]``; -1 where BPE does not reach the token by merges."""
        if len(merges):
            self.parents[ids] = BatchedBpe(vocab, merges).parents(ids)
        self.merged = self.parents[:, 0] >= 0
        """bool ``[size]``: whether BPE reaches the token by merges."""
        lengths = np.unique(self.length[self.merged]).tolist()
        self._by_length = [np.flatnonzero(self.merged & (self.length == n)) for n in lengths]

    def lower_children(self, rank: np.ndarray) -> None:
        """Raise each rank to the highest rank of the token's parents, in place."""
        for ids in self._by_length:
            rank[ids] = np.maximum(rank[ids], rank[self.parents[ids]].max(axis=1))

    def lift_parents(self, count: np.ndarray) -> None:
        """Raise each count to the highest count of the tokens merged from it, in place."""
        for ids in reversed(self._by_length):
            np.maximum.at(count, self.parents[ids], count[ids][:, None])

    def with_parents(self, ids: np.ndarray) -> np.ndarray:
        """Return ``ids`` with all their parents, ascending."""
        while True:
            parents = self.parents[ids]
            closed = np.union1d(ids, parents[parents >= 0])
            if len(closed) == len(ids):
                return closed
            ids = closed
