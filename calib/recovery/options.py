"""What a recovery trains, for how long, and where it writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from surgery.errors import BudgetError, OutputError, SurgeryError, check_choice, check_least
from surgery.files.strict_json import read_file

T = TypeVar("T")

DISTILL, CONTINUE, SELF_DATA = METHODS = ("distill", "continue", "self-data")
FFN_ALONE = "ffn"
PRECISIONS = ("float16", "float32")

LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 1e-3
"""Peaks of the cosine, where none is given."""

WORK_END = ".training"
"""What the name of the directory of an unfinished run ends in."""

PLAN_END, WEIGHTS_END, TEXT_END = ".plan.json", ".trained.safetensors", ".self-data.jsonl"
"""Files beside the output: its plan, the trained tensors that the plan names, and the text that a
teacher wrote."""

EVALUATIONS = 16
"""How often the held-out text is measured and a checkpoint is kept, over the whole run."""


class TrainingError(SurgeryError):
    """A training cannot run as asked."""


@dataclass(frozen=True)
class RecoverOptions:
    """What is trained, by what, for how long, and where the result is written."""

    output: Path
    """Directory to write; it must not exist."""
    tokens: int | None = None
    """Tokens to train on; text that is shorter is repeated."""
    minutes: float | None = None
    """Time to train, instead of ``tokens``: as many tokens as a first step promises."""
    method: str = DISTILL
    """distill: towards the teacher's distribution. continue: as pretraining. self-data: as
    pretraining, on text that the teacher has written."""
    teacher: str | None = None
    """The dense model, or a directory that ``teach`` wrote; None is the source that the plan of the
    model names."""
    lora: int | None = None
    """Rank of adapters that are trained instead of the weights, and merged at the end."""
    only: str | None = None
    """ffn: the FFNs alone are trained; None trains everything."""
    learning_rate: float | None = None
    """Peak of the cosine; None is 1e-4, or 1e-3 for adapters."""
    batch_size: int = 1
    """Windows of a step, on each device."""
    resume: bool = False
    """Whether to continue a run that was killed."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """transformers' ``TrainingArguments`` by name, over those that are chosen here."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.only is not None:
            check_choice("only", self.only, (FFN_ALONE,))
        check_least("batch_size", self.batch_size, 1)
        if self.lora is not None:
            check_least("lora", self.lora, 1)
        if (self.tokens is None) == (self.minutes is None):
            raise BudgetError(
                "`tokens`",
                "and `minutes` say how long to train",
                expected="one of them",
                found="both" if self.tokens else "none",
                fix="give `tokens` or `minutes`",
            )
        for name in ("tokens", "minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise BudgetError(
                    f"`{name}`",
                    "is not a finite number above 0",
                    found=value,
                    fix="give a finite number above 0",
                )
        if self.method == CONTINUE and self.teacher is not None:
            raise BudgetError(
                "`teacher`", "has no effect with `method` continue", fix="leave it out"
            )

    @property
    def work(self) -> Path:
        """Directory of the unfinished run, beside the output."""
        return self._beside(WORK_END)

    @property
    def plan(self) -> Path:
        """File of the plan, beside the output."""
        return self._beside(PLAN_END)

    @property
    def weights(self) -> Path:
        """File of the trained tensors, beside the output."""
        return self._beside(WEIGHTS_END)

    @property
    def self_data(self) -> Path:
        """File of the text that the teacher writes, beside the output."""
        return self._beside(TEXT_END)

    def _beside(self, end: str) -> Path:
        return self.output.with_name(self.output.name + end)

    @property
    def peak_rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (LORA_LEARNING_RATE if self.lora else LEARNING_RATE)


@dataclass(frozen=True)
class TeachOptions:
    """What is kept of the teacher's distribution, and where."""

    outputs: tuple[Path, ...]
    """Directories to write, one for each plan; they must not exist."""
    tokens: int
    """Tokens of text; fewer where the text has fewer."""
    top_k: int = 64
    """Likeliest kept tokens of each position."""
    precision: str = "float16"
    """Of the log-probabilities: float16 or float32."""
    resume: bool = False
    """Whether to continue a run that was killed."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("tokens", "top_k"):
            check_least(name, getattr(self, name), 1)


def read_state(path: Path, kind: type[T]) -> T:
    """Return what a file of an unfinished run holds.

    Raises:
        OutputError: it is damaged.
    """
    try:
        return msgspec.json.decode(read_file(path), type=kind)
    except msgspec.MsgspecError as error:
        fix = "delete the directory and begin anew"
        raise OutputError(path, "is damaged", found=error, fix=fix) from error


def check_same_options(path: Path, known: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Refuse to continue the run of a directory with other options than it was begun with.

    Args:
        path: The directory.
        known: What it was begun with, by the options' names.
        given: The same of the run that would continue.

    Raises:
        OutputError: naming the first option that differs.
    """
    for name in sorted({*known, *given}):
        if known.get(name) != given.get(name):
            raise OutputError(
                f"{path}: `{name}`",
                "was another one when the run was begun",
                expected=known.get(name),
                found=given.get(name),
                fix="give the same options, or delete the directory and begin anew",
            )
