"""Errors a user can act on: each is one line with where, what, and what to do."""

from collections.abc import Callable, Iterable
from copy import copy
from numbers import Integral
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 1200
"""Of a name or a value in an error; a tensor's name may be a megabyte long."""

ADD_FAMILY = "see 'Add a model family' in CONTRIBUTING.md"
"""The fix for a model that the tables of families do not have."""


AMEND = "correct it, or use the file that the model was published with"
"""The fix for a file that is whole, but whose content cannot be meant."""


GET_AGAIN = "download the file again, or use another checkpoint"
"""The fix for weights that cannot be meant."""


SAVE_WITH_GLINER = (
    "save it once with the package gliner, which writes all that is needed: "
    "GLiNER.from_pretrained(dir).save_pretrained(new_dir, safe_serialization=True)"
)
"""The fix for a GLiNER's directory that lacks a part, or has it as a pickle."""


def shortened(value: object) -> str:
    """``value`` as text, without its middle where it is very long."""
    text, half = str(value), MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def printable(text: str) -> str:
    """``text`` as one line that sends no escape sequence to a terminal."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line)


def did_you_mean(path: Path | str) -> str:
    """Return "did you mean …? " with names like that of a path that is not there, or nothing."""
    from difflib import get_close_matches

    path = Path(path)
    try:
        names = [p.name for p in path.absolute().parent.iterdir() if p.name != path.name]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=3, cutoff=0.7)
    known = " or ".join(str(path.with_name(name)) for name in close)
    return f"did you mean {known}? " if known else ""


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library panicked. Python does not derive that error from ``Exception``."""
    return type(error).__name__ == "PanicException"


class SurgeryError(Exception):
    """Base of every error that bad input can cause.

    The message reads ``where: problem: expected X, found Y; fix``. Each part is an attribute.
    Options have the names of Python's parameters, in backticks. The command line prints them as
    flags.
    """

    where: str
    """The file, tensor or option that is wrong."""
    problem: str
    """What is wrong with it."""
    expected: str | None
    """What it should be; None where the problem makes that clear."""
    found: str | None
    """What it is instead; None where the problem makes that clear."""
    fix: str
    """What to do."""

    def __init__(
        self,
        where: object,
        problem: str,
        *,
        expected: object = None,
        found: object = None,
        fix: str,
    ) -> None:
        self.where, self.problem, self.fix = str(where), problem, fix
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        super().__init__(self.message())

    def message(self, rewrite: Callable[[str], str] = str) -> str:
        """The error in one line; ``rewrite`` changes the parts that may name options."""
        facts = []
        if self.expected is not None:
            facts.append(f"expected {rewrite(shortened(self.expected))}")
        if self.found is not None:
            facts.append(f"found {shortened(self.found)}")
        details = f": {', '.join(facts)}" if facts else ""
        head = f"{rewrite(shortened(self.where))}: {rewrite(self.problem)}"
        return printable(f"{head}{details}; {rewrite(self.fix)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle message and attributes; unpickling does not call the constructor."""
        return _same_error, (type(self), str(self)), self.__dict__

    def inside(self, where: object) -> "SurgeryError":
        """The same error; ``where`` now begins with the file that contains the fault."""
        error = copy(self)
        error.where = f"{where}: {self.where}"
        error.args = (error.message(),)
        return error


def _same_error(kind: type[SurgeryError], message: str) -> SurgeryError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class CheckpointError(SurgeryError):
    """The source directory, one of its shards or JSON files is damaged or not supported."""


class NotFiniteError(CheckpointError):
    """A weight is NaN or infinity, or gives one: what a run has begun with it is of no use."""


class FamilyError(SurgeryError):
    """The model type is unknown, or a tensor does not belong to its family."""


class UnknownTypeError(FamilyError):
    """The table of families has no entry for a model type."""

    def __init__(
        self,
        where: object,
        model_type: object,
        *,
        code: bool,
        fix: str = f"add an entry to the table of families; {ADD_FAMILY}",
    ) -> None:
        never_run = ", and its own code is never run" if code else ""
        super().__init__(
            where, f"model type is not supported{never_run}", found=model_type, fix=fix
        )
        self.model_type = model_type
        """The value in config.json, which may be no text."""
        self.code = code
        """Whether the checkpoint brings Python code of its own (``auto_map``)."""


class TokenizerError(SurgeryError):
    """The tokenizer cannot be pruned, or its files contradict each other."""


class BudgetError(SurgeryError):
    """The target sizes or the target ratio are out of reach."""


class StatsError(SurgeryError):
    """The statistics file is damaged or was taken from another model."""


class PlanError(SurgeryError):
    """The plan is damaged, incomplete, or made for another source."""


class DataError(SurgeryError):
    """The text is missing, unreadable or too short."""


class EngineError(SurgeryError):
    """There is no Ray cluster, or it lost a task."""


class OutputError(SurgeryError):
    """The output cannot be written to the given path."""


class OptionError(SurgeryError):
    """An option has a value that it does not take."""


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of ``choices``.

    Raises:
        OptionError: it names the option.
    """
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise OptionError(
            f"`{option}`",
            "does not take this value",
            expected=", ".join(names),
            found=repr(value),
            fix="choose one of them",
        )


def check_least(option: str, value: object, least: int) -> None:
    """Refuse a value that is no whole number, or that is less than ``least``.

    Raises:
        OptionError: it names the option.
    """
    if not isinstance(value, Integral) or int(value) < least:
        raise OptionError(
            f"`{option}`",
            "does not take this value",
            expected=f"a whole number from {least} on",
            found=repr(value),
            fix="correct it",
        )
