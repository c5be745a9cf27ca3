"""The merge rules of a tokenizer.json: read one at a time, held as the ids of their tokens."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import TokenizerError

AGAIN = "download the file again"


class _Rule:
    """What stands for a rule that was read: one object for all of them."""


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
            TokenizerError: a rule is no pair, not of the form of the first, or names no token.
            msgspec.MsgspecError: it is no array.
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

    def named(self, stays: np.ndarray, vocab: Mapping[str, int]) -> "NamedRules":
        """The rules of the mask ``stays``, spelled with the tokens of ``vocab``."""
        return NamedRules(MergeRules(self.ids[stays], self.paired), vocab)


@dataclass(frozen=True, eq=False)
class NamedRules:
    """Rules as the file has them, [a, b] or "a b", made as they are asked for."""

    rules: MergeRules
    vocab: Mapping[str, int]
    """Token → id of all tokens that the rules name."""

    def __iter__(self) -> Iterator[Any]:
        """One rule after the other, by rank."""
        names = np.full(self.rules.ids.max(initial=0) + 1, "", dtype=object)
        for token, id_ in self.vocab.items():
            if id_ < len(names):
                names[id_] = token
        for left, right, _ in map(np.ndarray.tolist, self.rules.ids):
            pair = [names[left], names[right]]
            yield pair if self.rules.paired else " ".join(pair)


def merge_entries(merges: list[Any]) -> list[Any]:
    """Rules as the file has them, "a b" or [a, b], without a ``#version`` line."""
    return [entry for entry in merges if not _is_version(entry)]


def check_form(rule: Any, first: Any, path: Path) -> None:
    """All merges have the form of the ``first``."""
    if type(rule) is not type(first):
        raise TokenizerError(
            f"{path}: merge {rule!r}",
            "is not of the form of the first",
            expected=f"a form like {first!r}",
            fix=AGAIN,
        )


def rule_ids(entry: Any, vocab: Mapping[str, int], path: Path) -> tuple[int, int, int]:
    """Ids of left part, right part and product.

    Raises:
        TokenizerError: ``entry`` is no pair, or a part or product is not in the vocabulary.
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
        return TokenizerError(f"{path}: merge {entry!r}", "is not a pair of tokens", fix=AGAIN)
    return TokenizerError(
        f"{path}: merge {parts[0]!r} {parts[1]!r}",
        "needs a token that the vocabulary lacks",
        expected=repr(error.args[0]),
        fix=AGAIN,
    )
