"""An engine's greedy texts beside those of transformers, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile, zip_longest

import numpy as np

from tools.engines.jobs import Jobs, Step

TIE = 0.001
"""By which log-probabilities of the two likeliest tokens differ at most where either may be taken:
rounding of float32 moves them by so much, depending on the order in which sums are computed."""


@dataclass(frozen=True)
class Comparison:
    """What was found on all prompts."""

    texts: int
    equal: int
    """Texts whose ids are all the same."""
    ties: tuple[float, ...]
    """Of texts that part at a tie: by how much transformers prefers its own token."""
    largest: float | None
    """Difference of a greedy token's log-probability, up to where texts part, or of a number of an
    embedding; None if unseen."""

    @property
    def right(self) -> bool:
        """Whether every text is transformers' own, but for ties."""
        return self.equal + len(self.ties) == self.texts

    @property
    def cell(self) -> str:
        """The texts, for the page."""
        said = f"{self.equal} of {self.texts}"
        if self.ties:
            said += f", {len(self.ties)} at a tie of {max(self.ties):.5f}"
        return said

    @property
    def difference(self) -> str:
        """The log-probabilities, for the page."""
        return "not given" if self.largest is None else f"{self.largest:.5f}"


def compare(wanted: Jobs, found: Jobs, ends: Collection[int]) -> Comparison:
    """Compare an engine's results with transformers'; ``ends`` are ids that end a text."""
    equal, ties, differences = 0, list[float](), list[float]()
    for row, (first, second) in enumerate(
        zip(wanted["completions"], found["completions"], strict=True)
    ):
        tops: list[Step] = wanted["top"][row]
        likely = [dict(top) for top in tops]
        texts = [list(takewhile(lambda id_: id_ not in ends, ids)) for ids in (first, second)]
        places = list(zip_longest(*texts))
        parted = next((at for at, (one, other) in enumerate(places) if one != other), None)
        for at in range(len(places) if parted is None else parted):
            if found["top"][row][at]:
                differences.append(abs(likely[at][first[at]] - found["top"][row][at][0][1]))
        if parted is None:
            equal += 1
            continue
        taken = likely[parted].get(second[parted]) if parted < len(second) else None
        if taken is not None and tops[parted][0][1] - taken <= TIE:
            ties.append(tops[parted][0][1] - taken)
    largest = max(differences, default=None)
    return Comparison(len(wanted["completions"]), equal, tuple(ties), largest)


COSINE = 0.99999
"""Embeddings are equal from this cosine on."""


def compare_embeddings(wanted: Jobs, found: Jobs) -> Comparison:
    """Compare an engine's embeddings with transformers'; both have length 1."""
    first, second = np.array(wanted["embeddings"]), np.array(found["embeddings"])
    equal = int(((first * second).sum(axis=1) >= COSINE).sum())
    return Comparison(len(first), equal, (), float(np.abs(first - second).max()))
