"""Task files: multiple-choice items are read, and answered by the likelihood of their choices."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from calib.scoring.answers import MEAN, Answers, TaskAnswers
from calib.scoring.score import (
    AskedText,
    Predictions,
    Score,
    check_predicts,
    first_token,
    run_asked,
    texts_of,
)
from calib.scoring.shared_context import Joined, joined, most_shared
from calib.streaming.batches import Stream
from calib.streaming.empty_model import positions
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import choose_settings
from calib.text.windows import special_ids
from surgery.errors import CheckpointError, DataError, did_you_mean
from surgery.files.strict_json import read_file
from surgery.layout.layout import Layout
from surgery.process import Progress
from surgery.text.documents import TextOptions
from surgery.tokenizer.tokenizer_file import load_tokenizer

LOG = logging.getLogger(__name__)

PACK = 512
"""Tokens of choices that the head predicts together."""


class Item(msgspec.Struct, frozen=True):
    """A question, or the beginning of a text, and what may follow."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


@dataclass(frozen=True)
class Task:
    """The items of a task file."""

    name: str
    """The file's name without its ending."""
    items: tuple[Item, ...]

    @property
    def chance(self) -> float:
        """The share of right answers of one who guesses."""
        return mean(1 / len(item.choices) for item in self.items)

    @property
    def digest(self) -> str:
        """SHA-256 of the items."""
        return hashlib.sha256(msgspec.json.encode(self.items)).hexdigest()


def read_tasks(paths: Sequence[Path | str]) -> list[Task]:
    """Read task files: lines of JSON such as ``{"context": …, "choices": […], "answer": 0}``.

    Raises:
        DataError: a file cannot be read, has no item or a bad one, or is there twice.
    """
    tasks = [_read_task(Path(path)) for path in paths]
    for number, task in enumerate(tasks):
        if task.name == MEAN:
            raise DataError(paths[number], "has the name of the mean of all tasks", fix="rename it")
        if task.name in [each.name for each in tasks[:number]]:
            raise DataError(
                paths[number],
                "has the name of another task file",
                fix="rename one, or leave it out",
            )
    return tasks


def _read_task(path: Path) -> Task:
    try:
        lines = read_file(path).decode("utf-8").split("\n")  # strings hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(
            path, "cannot be read", found=reason, fix=f"{did_you_mean(path)}name a task file"
        ) from error
    found = [_item(line, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(path, "has no item", fix="name a task file")
    return Task(path.stem, tuple(found))


def _item(line: str, where: str) -> Item:
    """Parse an item and check it."""
    try:
        item = msgspec.json.decode(line, type=Item)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(
            where,
            "is no item of a task",
            expected='{"context": …, "choices": […], "answer": 0}',
            found=error,
            fix="correct the line",
        ) from error
    wrong = None
    if not item.context.strip():
        wrong = "has an empty context"
    elif len(item.choices) < 2 or len(set(item.choices)) < len(item.choices):
        wrong = "has fewer than two choices, or one twice"
    elif not all(choice.strip() for choice in item.choices):
        wrong = "has an empty choice"
    elif not 0 <= item.answer < len(item.choices):
        wrong = "has an answer that is no index of its choices"
    if wrong:
        raise DataError(where, wrong, fix="correct the line")
    return item


class AskedTasks:
    """The items of tasks, each choice after its context and a space, on their way through a model.

    Where the model allows it, the choices of an item share their context, which is computed once.

    A text begins with the special tokens that the tokenizer adds; one that would have no token
    before its choice begins with bos (eos where there is none). The tokens of a choice are those
    after as many as the context has, as lm-evaluation-harness counts them.
    """

    def __init__(
        self,
        layout: Layout,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        ids: tuple[np.ndarray, np.ndarray] | None = None,
        most_shared: int = 0,
    ) -> None:
        """Tokenize the items.

        Args:
            layout: The model.
            tasks: From ``read_tasks``.
            tokenizer: Of the model, or of a smaller vocabulary.
            ids: The source's id of each of the tokenizer's, and the source's ids of the
                vocabulary, ascending; None where the tokenizer is the model's own.
            most_shared: Most tokens of a text for the choices of each item to share one window.
                Where one is longer, each choice of all items has a window of its own.

        Raises:
            DataError: a choice has no token, or more than the model has positions.
        """
        self._old_ids = ids[0] if ids is not None else None
        self._rows = ids[1] if ids is not None else np.arange(layout.vocab_size)
        self._tasks, self._most = tasks, positions(layout)
        self._before, _ = special_ids(tokenizer)
        self._first = first_token(layout)
        self._choices: list[np.ndarray] = []
        self._lossy = self._short = 0
        items = list[list[np.ndarray]]()
        for task in tasks:
            for number, item in enumerate(task.items, 1):
                texts = list(self._encode(item, tokenizer, f"{task.name}: item {number}"))
                self._choices += [choice for _, choice in texts]
                items.append([text for text, _ in texts])
        windows = self._windows(items, most_shared)
        self._places = [each.places for each in windows]
        shared = len(windows) < len(self._choices)
        branches = [each.branches for each in windows] if shared else []
        self.stream = Stream([each.window for each in windows], branches=branches)
        if self._lossy:
            LOG.info("note: the tokenizer loses text of %d choices", self._lossy)
        if self._short:
            LOG.info(
                "note: %d choices and their contexts have more tokens than the model has positions "
                "(%s); the first tokens are left out",
                self._short,
                f"{self._most:,}",
            )

    def _encode(
        self, item: Item, tokenizer: Tokenizer, where: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each choice the tokens before its last one, and its own tokens."""
        context = item.context.rstrip()
        texts = [context, *(f"{item.context} {choice}" for choice in item.choices)]
        first, *full = tokenizer.encode_batch(texts, add_special_tokens=False)
        for text, encoded in zip(texts[1:], full, strict=True):
            self._lossy += tokenizer.decode(encoded.ids, skip_special_tokens=False) != text
            choice = np.array(encoded.ids[len(first.ids) :], dtype=np.int64)
            ids = np.array([*self._before, *encoded.ids], dtype=np.int64)
            room = len(choice) if self._most is None else self._most
            if not len(choice) or len(choice) > room:
                raise DataError(
                    where,
                    "has a choice without a token of its own"
                    if not len(choice)
                    else "has a choice with more tokens than the model has positions",
                    found=text[:80],
                    fix="leave it out",
                )
            if self._old_ids is not None:
                ids, choice = self._old_ids[ids], self._old_ids[choice]
            if len(ids) == len(choice):
                ids = np.concatenate([[self._first], ids])
            self._short += self._most is not None and len(ids) - 1 > self._most
            yield ids[:-1][-(self._most or len(ids)) :], choice

    def _windows(self, items: Sequence[Sequence[np.ndarray]], most_shared: int) -> list[Joined]:
        """Return a window for each of the ``items``, or for each text of an item."""
        counts = iter(map(len, self._choices))
        together = [joined(texts, list(islice(counts, len(texts)))) for texts in items]
        share = max((each.longest for each in together), default=0) <= most_shared
        found = list[Joined]()
        for texts, each in zip(items, together, strict=True):
            if share and len(each.window) <= (self._most or len(each.window)):
                found.append(each)
            else:
                last = map(len, each.places)
                found += [joined([text], [n]) for text, n in zip(texts, last, strict=True)]
        return found

    def predictions(self) -> list[Predictions]:
        """As ``Asked``: of the choices' tokens alone, many together."""
        self._packs: list[tuple[list[int], Predictions]] = []
        room = min(PACK, self._most or PACK)
        firsts = np.cumsum([0, *map(len, self._places)]).tolist()
        indices: list[int] = []
        states: list[torch.Tensor] = []
        for window, _, hidden in self.stream.hidden():
            for index, places in enumerate(self._places[window], firsts[window]):
                if indices and sum(map(len, states)) + len(places) > room:
                    self._pack(indices, states)
                    indices, states = [], []
                indices.append(index)
                states.append(hidden[places])
        self._pack(indices, states)
        return [predicted for _, predicted in self._packs]

    def _pack(self, indices: list[int], states: list[torch.Tensor]) -> None:
        tokens = np.concatenate([self._choices[index] for index in indices])
        self._packs.append((indices, Predictions(torch.cat(states), tokens, self._rows)))

    def bits(self) -> list[float]:
        """Return Σ −log2 p(token | earlier tokens) of each choice; the head has counted them."""
        found = np.zeros(len(self._choices))
        for indices, predicted in self._packs:
            stops = np.cumsum([len(self._choices[index]) for index in indices])
            for index, part in zip(indices, np.split(predicted.bits(), stops[:-1]), strict=True):
                found[index] = part.sum()
        return [float(each) for each in found]

    def answers(self, where: object) -> Answers:
        """Return which items are right; the first of equals counts as chosen.

        Raises:
            CheckpointError: the model gives no number for a choice; ``where`` names the model.
        """
        left, found = iter(self.bits()), []
        for task in self._tasks:
            right, right_norm = [], []
            for item in task.items:
                bits = np.array([next(left) for _ in item.choices])
                if np.isnan(bits).any():
                    raise CheckpointError(
                        where, "gives NaN for a choice", found=task.name, fix="use another dtype"
                    )
                nbytes = [len(choice.encode("utf-8")) for choice in item.choices]
                right.append(bool(np.argmin(bits) == item.answer))
                right_norm.append(bool(np.argmin(bits / nbytes) == item.answer))
            made = (task.name, task.digest, task.chance, tuple(right), tuple(right_norm))
            found.append(TaskAnswers(*made))
        return Answers(tuple(found))


@dataclass(frozen=True)
class Measured:
    """What one pass measures of a model."""

    score: Score | None
    """None without a text."""
    answers: Answers | None
    """None without tasks."""


def measure_models(
    layouts: Sequence[Layout],
    text: TextOptions | None,
    window_bytes: int,
    tasks: Sequence[Task],
    compute: ComputeOptions,
    progress: Progress | None = None,
) -> Iterator[Measured]:
    """Yield each model's score on a text and its answers to tasks, both from one pass.

    The text of all models is read and compared before the first one runs.

    Raises:
        FamilyError: a model predicts no token.
        DataError: as ``texts_of`` and ``AskedTasks``.
    """
    for layout in layouts:
        check_predicts(layout)
    texts = texts_of(layouts, text, window_bytes) if text is not None else []
    for layout in layouts:
        tokenizer = load_tokenizer(layout.checkpoint.path)
        settings = choose_settings(compute, layout.checkpoint)
        scored = AskedText(layout, texts, tokenizer) if texts else None
        shared = most_shared(layout, settings) if tasks else 0
        answered = AskedTasks(layout, tasks, tokenizer, most_shared=shared) if tasks else None
        run_asked(layout, [each for each in (scored, answered) if each], settings, progress)
        yield Measured(
            scored.score() if scored else None,
            answered.answers(layout.checkpoint.path) if answered else None,
        )
