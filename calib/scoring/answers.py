"""A model's answers to the items of tasks: which are right, and how much of that may be chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from calib.scoring.score import LEAST_WINDOWS, half_interval
from surgery.errors import DataError
from surgery.plot import html_table
from surgery.process import spoken

MEAN = "mean"
"""Name of the figures of all tasks."""


@dataclass(frozen=True)
class TaskAnswers:
    """Which items of a task a model answers right."""

    name: str
    digest: str
    chance: float
    right: tuple[bool, ...]
    """By item: whether the right choice has the largest log-likelihood."""
    right_norm: tuple[bool, ...]
    """Whether it has the largest log-likelihood per byte."""

    @property
    def acc(self) -> float:
        """The share of items that are right by the log-likelihood."""
        return mean(self.right)

    @property
    def acc_norm(self) -> float:
        """The share of items that are right by the log-likelihood per byte."""
        return mean(self.right_norm)


@dataclass(frozen=True)
class Share:
    """How many right answers a model gives, as a share of another one's."""

    share: float
    """Accuracy / accuracy of the reference."""
    margin: float | None
    """Half of the interval that holds 95 % of the shares of items drawn anew (bootstrap, the same
    items of both models). None for fewer than ``LEAST_WINDOWS`` items."""

    @property
    def clear(self) -> bool | None:
        """Whether the share differs from 1 by more than chance; None where that is not known."""
        return None if self.margin is None else abs(self.share - 1) > self.margin


@dataclass(frozen=True)
class Answers:
    """A model's answers to the items of some tasks."""

    tasks: tuple[TaskAnswers, ...]

    @property
    def accuracy(self) -> float:
        """The mean of ``acc_norm`` over the tasks."""
        return mean(task.acc_norm for task in self.tasks)

    @property
    def chance(self) -> float:
        """The accuracy of one who guesses."""
        return mean(task.chance for task in self.tasks)

    @property
    def margin(self) -> float | None:
        """Half of the interval that holds 95 % of the accuracies on items drawn anew."""
        return half_interval(self._weights(), self._weights(right=False), self._sizes())

    def of_task(self, name: str) -> "Answers":
        """Return the answers to one task alone."""
        return Answers(tuple(task for task in self.tasks if task.name == name))

    def share_of(self, reference: "Answers") -> Share:
        """Return the accuracy as a share of that of ``reference``.

        Example:
            >>> before, after = (calib.answer(m, tasks=files) for m in ("my-model", "smaller"))
            >>> after.share_of(before).share

        Raises:
            DataError: the answers are to other items, or the reference gives no right one.
        """
        if [task.digest for task in self.tasks] != [task.digest for task in reference.tasks]:
            raise DataError(
                "`tasks`",
                "are not the same for both models, so their answers cannot be compared",
                fix="give both models the same task files",
            )
        if not reference.accuracy:
            raise DataError(
                "`tasks`", "have no item that the reference answers right", fix="give other tasks"
            )
        half = half_interval(self._weights(), reference._weights(), self._sizes())
        return Share(self.accuracy / reference.accuracy, half)

    def facts(self, reference: "Answers | None" = None) -> dict[str, Any]:
        """Return the figures for JSON, those of each task with its items, and their mean.

        An item is 1 where it is answered right, by the sums or, in ``right_norm``, per byte. A
        share of no right answer is None.
        """
        found: dict[str, Any] = {
            task.name: {
                "items": len(task.right),
                "digest": task.digest,
                "right": [int(right) for right in task.right],
                "right_norm": [int(right) for right in task.right_norm],
                "acc": task.acc,
                **self.of_task(task.name)._facts(reference and reference.of_task(task.name)),
            }
            for task in self.tasks
        }
        return found | {MEAN: self._facts(reference)}

    def _facts(self, reference: "Answers | None") -> dict[str, Any]:
        share = self.share_of(reference) if reference and reference.accuracy else None
        return {
            "acc_norm": self.accuracy,
            "margin": self.margin,
            "chance": self.chance,
            "share": share and share.share,
            "share_margin": share and share.margin,
        }

    def _repr_html_(self) -> str:
        rows = [(t.name, len(t.right), f"{t.acc:.1%}", f"{t.acc_norm:.1%}") for t in self.tasks]
        return html_table("answers", ("", "items", "acc", "acc_norm"), rows)

    def _sizes(self) -> list[int]:
        return [len(task.right) for task in self.tasks]

    def _weights(self, *, right: bool = True) -> list[float]:
        """What each item adds to the accuracy: of right answers, or of all items."""
        return [
            (won if right else 1) / len(task.right) / len(self.tasks)
            for task in self.tasks
            for won in task.right_norm
        ]


def answers_table(rows: Sequence[tuple[str, Answers, float]]) -> str:
    """Return answers to the same items as text for people, in per cent.

    Args:
        rows: Name of a model, its answers, and the seconds that took. The first is the reference.
    """
    name, first, _ = rows[0]
    wide = 2 + max(len(each) for each in (*(name for name, _, _ in rows), "chance"))
    several = len(first.tasks) > 1
    heads = [*(task.name for task in first.tasks), *["mean"] * several, "±", "time"]
    heads += ["of the first", "±"] * (len(rows) > 1)
    widths = [max(10, len(head) + 2) for head in heads]

    def line(name: str, cells: Sequence[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
        return f"{name:<{wide}}" + "".join(cells)

    lines = [line("acc_norm", heads)]
    for name, answers, took in rows:
        cells = [f"{100 * task.acc_norm:.1f}" for task in answers.tasks]
        cells += [f"{100 * answers.accuracy:.1f}"] * several
        cells += [_percent(answers.margin, ""), spoken(took)]
        note = ""
        if answers is not first:
            share = answers.share_of(first)
            cells += [f"{share.share:.1%}", _percent(share.margin, "%")]
            note = "  may be chance" if share.clear is False else ""
        lines.append(line(name, cells) + note)
    cells = [f"{100 * task.chance:.1f}" for task in first.tasks]
    cells += [f"{100 * first.chance:.1f}"] * several
    if len(rows) > 1 and first.accuracy:
        cells += ["", "", f"{first.chance / first.accuracy:.1%}"]
    lines.append(line("chance", cells))
    sizes = " + ".join(f"{len(task.right):,}" for task in first.tasks)
    lines.append(f"right answers in %, by log-likelihood per byte, to {sizes} items")
    lines.append(
        f"±: not known from fewer than {LEAST_WINDOWS} items"
        if first.margin is None
        else "±: other items of this kind move a figure by less, in 95 of 100 cases; "
        "a difference that is smaller may be chance"
    )
    return "\n".join(lines)


def _percent(share: float | None, sign: str) -> str:
    return "?" if share is None else f"{100 * share:.1f}{sign}"
