"""A part of the calibration windows, for one machine of several."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from surgery.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Every ``of``-th window, from the ``number``-th on."""

    number: int
    """1 to ``of``."""
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/4".

        Raises:
            DataError: no such part.
        """
        words = text.split("/")
        if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words):
            number, of = map(int, words)
            if 1 <= number <= of:
                return cls(number, of)
        raise DataError(
            "`part`", "is no part", expected="K/N with 1 <= K <= N", found=text, fix="correct it"
        )

    def choose(self, windows: list[Item]) -> list[Item]:
        """The windows of this part.

        Raises:
            DataError: there are none.
        """
        chosen = windows[self.number - 1 :: self.of]
        if not chosen:
            raise DataError(
                "`part`",
                "has no window",
                expected=f"at most {len(windows)} parts",
                found=f"{self.number}/{self.of}",
                fix="give more text, a shorter `seq_len` or fewer parts",
            )
        return chosen


@dataclass(frozen=True)
class Division:
    """How the calibration windows are divided over machines."""

    part: Part | None = None
    """The windows that are used; None is all of them."""
    engine: str = "local"
    """Or "ray"."""
    parts: int | None = None
    """Tasks of ``ray``; None is one for each node, or each GPU."""
    folder: Path = Path()
    """What all nodes of ``ray`` can write to."""

    def choose(self, windows: list[Item]) -> list[Item]:
        """The windows that are used.

        Raises:
            DataError: there are none.
        """
        return self.part.choose(windows) if self.part else windows
