"""A teacher as files: the dense model's likeliest tokens, from one streamed pass."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from calib.estimate import MB, Prediction, WindowLengths, predict
from calib.recovery.options import TeachOptions, TrainingError, check_same_options, read_state
from calib.recovery.taught import (
    HELD,
    PART,
    SETTINGS,
    TeacherInfo,
    schema_of,
    vocabulary_digest,
)
from calib.recovery.text import hold_out, training_windows
from calib.scoring.score import check_predicts, first_token
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import WeightReader, choose_settings
from calib.text.chat import documents_of
from calib.text.windows import within_positions
from surgery.apply.output_directory import check_output_path, check_space, file_system
from surgery.errors import BudgetError, NotFiniteError, OutputError, PlanError
from surgery.files.atomic import (
    PARTIAL,
    check_no_partial,
    lock_output,
    new_file,
    write_atomic,
)
from surgery.hub.fetch import source_at_hand
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.process import Progress, stage
from surgery.text.documents import TextOptions
from surgery.tokenizer.tokenizer_file import TokenizerFile, load_tokenizer, prune_tokenizer

LOG = logging.getLogger(__name__)

PART_BYTES = 1 << 28
"""Hidden states and likeliest tokens of the windows that pass through the model together."""

WINDOWS, BEGUN = "windows.npy", "begun.json"
"""Of an unfinished directory: its text as ids, and the options that the text was read by."""


@dataclass(frozen=True)
class Taught:
    """What ``teach`` wrote."""

    outputs: tuple[Path, ...]
    tokens: int
    """Of all outputs."""
    nbytes: int
    """Of the files."""
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "outputs": [str(each) for each in self.outputs]}


class Teaching:
    """A checked request to write a teacher's files, and what it takes.

    Several vocabularies are taught in one pass: each layer's weights are read once for all.
    """

    def __init__(
        self,
        layout: Layout,
        plans: Sequence[Plan],
        text: TextOptions,
        compute: ComputeOptions,
        options: TeachOptions,
    ) -> None:
        """Check the request; read no text and no weights.

        Raises:
            SurgeryError: the model predicts no token, a plan is another one's, or an output cannot
                be written.
        """
        if find_spec("pyarrow") is None:
            fix = "pip install 'compact-surgery[recover]'"
            raise TrainingError("pyarrow", "is not installed", fix=fix)
        check_predicts(layout)
        _check_outputs(plans, options.outputs)
        self.layout, self.options = layout, options
        self.settings = choose_settings(compute, layout.checkpoint)
        seq_len = within_positions(text.seq_len, positions(layout))
        width = layout.by_name[layout.family.embedding].shape[1]
        of_token = 2 * width * self.settings.dtype.itemsize + 12 * options.top_k
        windows = max(1, PART_BYTES // (of_token * seq_len * len(plans)))
        self.lessons = [
            Lesson(layout, plan, output, text, options, seq_len, windows)
            for plan, output in zip(plans, options.outputs, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without their headers and before compression."""
        return sum(lesson.info.nbytes for lesson in self.lessons)

    def prediction(self) -> Prediction:
        """Predict what a pass of one part of each output takes."""
        infos = [lesson.info for lesson in self.lessons]
        windows = sum(min(info.windows, info.windows_of_part) for info in infos)
        rows = sum(info.vocab_size for info in infos)
        text = WindowLengths.full(windows, infos[0].seq_len, min(rows, self.layout.vocab_size))
        return predict(self.layout, text, self.settings, buckets=0, journal=False)

    def run(self, progress: Progress | None = None) -> Taught:
        """Write the directories, part by part; they get their names when all parts are there.

        Raises:
            SurgeryError: the disk is too small, or the run to continue was another one.
        """
        start = time.perf_counter()
        self._check_space()
        with ExitStack() as locks:
            for lesson in self.lessons:
                locks.enter_context(lesson.locked())
            tokens = self._write(progress)
        files = [path for each in self.lessons for path in each.output.glob("*.parquet")]
        nbytes, seconds = sum(path.stat().st_size for path in files), time.perf_counter() - start
        return Taught(self.options.outputs, tokens, nbytes, seconds)

    def _write(self, progress: Progress | None) -> int:
        """Write what is not there yet of all directories; return the tokens of all."""
        lessons = self.lessons
        infos = [lesson.begin() for lesson in lessons]
        LOG.info("%s of files, without compression", f"{self.nbytes / MB:,.0f} MB")
        tokens = sum(info.windows * info.seq_len for info in infos)
        advance = stage(progress, "teach", tokens)
        for number in range(max(info.parts for info in infos)):
            self._write_parts([each for each in lessons if each.lacks(number)], number)
            for info in infos:
                if number < info.parts:
                    advance(info.windows_in(number) * info.seq_len)
        for lesson in lessons:
            lesson.end()
        return tokens

    def _check_space(self) -> None:
        """Refuse outputs that do not fit on their disks; those of one disk count together."""
        disks: dict[int, list[Lesson]] = {}
        for lesson in self.lessons:
            disks.setdefault(file_system(lesson.output), []).append(lesson)
        for lessons in disks.values():
            check_space(lessons[0].output, sum(lesson.info.nbytes for lesson in lessons))

    def _write_parts(self, lessons: "Sequence[Lesson]", number: int) -> None:
        """Run the windows of a part of each lesson through the model together, and write them."""
        if not lessons:
            return
        windows = [lesson.windows_of(number) for lesson in lessons]
        streams = [each.stream(ids) for each, ids in zip(lessons, windows, strict=True)]
        with WeightReader(self.layout.checkpoint, self.settings.device, self.settings.dtype) as r:
            decoder = StreamedDecoder(self.layout, r, self.settings)
            decoder.embed(streams)
            decoder.run_layers(streams)
            kept = [lesson.plan.ids().kept for lesson in lessons]
            asked = list(zip(streams, kept, strict=True))
            found = likeliest(decoder, asked, self.options.top_k)
        for lesson, ids, likely in zip(lessons, windows, found, strict=True):
            lesson.write(number, ids, likely)


class Lesson:
    """What a dense model teaches in one vocabulary: a directory of files, and how far it is."""

    def __init__(  # noqa: PLR0913
        self,
        layout: Layout,
        plan: Plan,
        output: Path,
        text: TextOptions,
        options: TeachOptions,
        seq_len: int,
        windows_of_part: int,
    ) -> None:
        """Check it; read no text.

        Raises:
            SurgeryError: the plan is another model's, or the output cannot be written.
        """
        if plan.before.vocab_size != layout.vocab_size:
            raise PlanError(
                "`plan`",
                "was made for a model with another vocabulary",
                expected=layout.vocab_size,
                found=plan.before.vocab_size,
                fix="name the plan of this model",
            )
        if options.top_k > plan.after.vocab_size:
            raise BudgetError(
                "`top_k`",
                "is more than the tokens that are kept",
                expected=f"at most {plan.after.vocab_size:,}",
                found=options.top_k,
                fix="choose fewer",
            )
        self.layout, self.plan, self.output = layout, plan, output
        self._text, self._options = text, options
        self._seq_len, self._windows_of_part = seq_len, windows_of_part
        self._look()
        self._check_tokens()

    def _look(self) -> None:
        """See how far an earlier run came, and refuse an output that cannot be written."""
        output, options = self.output, self._options
        self._partial = _partial(output)
        several = options.resume and len(options.outputs) > 1
        self._ended = several and (output / SETTINGS).exists() and not self._partial.exists()
        if self._ended:  # the run was killed before the others had their names
            self._partial = output
        else:
            check_output_path(output, [self.layout.checkpoint.path, *self._text.files])
            check_no_partial(output, resume=options.resume)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from writing the directory; ``DIR.partial.lock`` exists meanwhile.

        A model with NaN or infinity, which shows in the first part, leaves no directory.

        Raises:
            OutputError: another run writes it, or has written it since it was looked at.
        """
        partial = _partial(self.output)
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_output(self.output, partial.with_name(f"{partial.name}.lock"))
        try:
            self._look()
            yield
        except NotFiniteError:
            if not (self._partial / PART.format(0)).exists():
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        finally:
            lock.remove()

    def _check_tokens(self) -> None:
        """Refuse a plan for other tokens, or one without the token that begins a text."""
        path, ids, first = self.layout.checkpoint.path, self.plan.ids(), first_token(self.layout)
        if ids.new(first) is None:
            raise PlanError(
                f"`plan`: token {first}",
                "begins each text of this model, and is not kept",
                fix="name the plan of this model",
            )
        if self.plan.fingerprint == self.layout.checkpoint.fingerprint:
            return
        if (source := source_at_hand(self.plan.source)) is None:
            return  # recover compares the tokens
        own, other = (load_tokenizer(each).get_vocab() for each in (path, source))
        for token, row in sorted(other.items(), key=lambda item: item[1]):
            if row < ids.old_size and ids.new(row) is not None and own.get(token) != row:
                raise PlanError(
                    f"`plan`: token {token!r}",
                    f"has another id in {path} than in the plan's source",
                    expected=row,
                    found=own.get(token),
                    fix="name the plan of this model, or a model with the same tokenizer",
                )

    @cached_property
    def info(self) -> TeacherInfo:
        """What the directory will say of itself, with as many windows as are asked for."""
        options, plan = self._options, self.plan
        return TeacherInfo(
            self.layout.checkpoint.fingerprint,
            self.layout.checkpoint.weights,
            plan.kept_tokens,
            plan.after.vocab_size,
            max(1, options.tokens // self._seq_len),
            self._seq_len,
            options.top_k,
            options.precision,
            vocabulary_digest(self._tokenizer[0], plan.after.vocab_size),
            ", ".join(each.name for each in self._text.data),
            self._windows_of_part,
        )

    @cached_property
    def _tokenizer(self) -> tuple[Any, np.ndarray]:
        """The pruned tokenizer, and the dense model's id for each of its ids."""
        ids, path = self.plan.ids(), self.layout.checkpoint.path
        if ids.identity:
            return load_tokenizer(path), np.arange(ids.old_size)
        return prune_tokenizer(TokenizerFile.reopen(path), ids)

    def _read_text(self) -> tuple[np.ndarray, list[str]]:
        documents, held = hold_out(documents_of(self.layout, self._text), self._text.windows)
        first = self.plan.ids().new(first_token(self.layout))
        assert first is not None  # checked
        tokenizer, _ = self._tokenizer
        most = self.info.windows
        return training_windows(documents, tokenizer, first, self._seq_len, most), held

    def begin(self) -> TeacherInfo:
        """Make the directory and its text, if no earlier run has; return its settings.

        Raises:
            OutputError: the earlier run was another one.
        """
        path, begun_by = self._partial / SETTINGS, self._partial / BEGUN
        if not path.exists():
            ids, held = self._read_text()
            self._partial.mkdir(exist_ok=True)
            with new_file(self._partial / WINDOWS) as made:
                np.save(made.file, ids)
            write_atomic(self._partial / HELD, json.dumps(held).encode())
            write_atomic(begun_by, msgspec.json.encode(self._read_by))
            begun = msgspec.structs.replace(self.info, windows=len(ids))
            write_atomic(path, msgspec.json.encode(begun))
        if begun_by.exists():  # it is deleted when all parts are there
            known = read_state(begun_by, dict[str, str])
            check_same_options(self._partial, known, self._read_by)
        self.found = read_state(path, TeacherInfo)
        if msgspec.structs.replace(self.info, windows=self.found.windows) != self.found:
            raise OutputError(
                path,
                "is of a run with another model, plan, text or options",
                fix="give the same ones, or delete the directory and begin anew",
            )
        return self.found

    @property
    def _read_by(self) -> dict[str, str]:
        """The options that the text is read by, which a run and its continuation have in common."""
        text = self._text
        names = ("seq_len", "windows", "seed", "field")
        found = {name: str(getattr(text, name)) for name in names}
        data = ", ".join(f"{each.name}={each.weight:g}" for each in text.data)
        return found | {"data": data, "tokens": str(self._options.tokens)}

    def lacks(self, number: int) -> bool:
        """Whether a part is still to be written."""
        there = self._ended or (self._partial / PART.format(number)).exists()
        return number < self.found.parts and not there

    def windows_of(self, number: int) -> np.ndarray:
        """Return the ids of a part, of the pruned vocabulary."""
        windows = np.load(self._partial / WINDOWS, mmap_mode="r")
        first = number * self._windows_of_part
        return np.array(windows[first : first + self._windows_of_part], dtype=np.int64)

    def stream(self, windows: np.ndarray) -> Stream:
        """Return windows of the pruned vocabulary as the dense model reads them."""
        return Stream([self._tokenizer[1][window] for window in windows])

    def write(self, number: int, windows: np.ndarray, found: "Sequence[Likely]") -> None:
        """Write a part: the likeliest tokens at each position of its windows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        info, schema = self.found, schema_of(self.found)
        ids = np.uint16 if info.vocab_size <= 1 << 16 else np.uint32
        float_type = np.float16 if info.precision == "float16" else np.float32
        path = self._partial / PART.format(number)
        with new_file(path) as made, pq.ParquetWriter(made.file, schema) as writer:
            for window, (top, logprobs, rest) in zip(windows, found, strict=True):
                row = [
                    _list(pa.array(window.astype(np.int32))),
                    _list(_rows(top.astype(ids))),
                    _list(_rows(logprobs.astype(float_type))),
                    _list(pa.array(rest.astype(float_type))),
                ]
                writer.write_table(pa.table(row, schema=schema))

    def end(self) -> None:
        """Give the directory its name."""
        if self._ended:
            return
        for name in (BEGUN, WINDOWS):  # gone if a run was killed after this
            (self._partial / name).unlink(missing_ok=True)
        self._partial.rename(self.output)


def _partial(output: Path) -> Path:
    """Return the name of a directory that is not whole yet."""
    return output.parent / f"{output.name}{PARTIAL}"  # "." has no name


def _check_outputs(plans: Sequence[Plan], outputs: Sequence[Path]) -> None:
    """Refuse outputs that are not one directory for each plan, none inside another.

    Raises:
        BudgetError: they are not.
    """
    if not plans:
        raise BudgetError("`plan`", "is none, whose vocabulary would count", fix="name one")
    names = [each.resolve() for path in outputs for each in (path, _partial(path))]
    inside = any({*name.parents}.intersection(names) for name in names)
    if len(plans) != len(outputs) or len({*names}) < len(names) or inside:
        raise BudgetError(
            "`output`",
            "names a directory for each plan, none inside another",
            expected=f"{len(plans)} different ones",
            found=", ".join(map(str, outputs)),
            fix="give as many as plans, in their order",
        )


def _list(values: Any) -> Any:
    """Return a column of one row, which is the list of ``values``."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _rows(values: np.ndarray) -> Any:
    """Return an Arrow array of the rows of ``values``."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


Likely = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one window: positions in the rows ``(tokens, count)``, likeliest first; their ln p over the
rows; and the ln of the probability that is left over, −inf where nothing is."""


@torch.no_grad()
def likeliest(
    decoder: StreamedDecoder, asked: Sequence[tuple[Stream, np.ndarray]], count: int
) -> list[list[Likely]]:
    """Return, for each text and its ascending rows of the head, the likeliest of each window.

    The head is read once, block by block; each block leaves the ``count`` best logits so far.
    """
    texts = [
        [_Likeliest(states, rows, count) for _, _, states in stream.hidden()]
        for stream, rows in asked
    ]
    every = [window for windows in texts for window in windows]
    for index, part, logits in decoder.logits([(each.states[None], each.rows) for each in every]):
        every[index].add(part, logits[0].float())
    return [[window.result() for window in windows] for windows in texts]


class _Likeliest:
    """Adds up one window's log-sum-exp, and keeps its largest logits."""

    def __init__(self, states: torch.Tensor, rows: np.ndarray, count: int) -> None:
        self.states, self.rows, self._count = states, rows, count
        self._total = torch.full(states.shape[:1], -torch.inf)
        self._best = torch.empty(len(states), 0)
        self._ids = torch.empty(len(states), 0, dtype=torch.int64)

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Add ``logits`` ``(tokens, rows)`` of the ``part`` of the vocabulary."""
        self._total = torch.logaddexp(self._total, logits.logsumexp(-1).cpu())
        found, ids = logits.topk(min(self._count, logits.shape[-1]), -1)
        best = torch.cat([self._best, found.cpu()], -1)
        every = torch.cat([self._ids, ids.cpu() + part.start], -1)
        self._best, order = best.topk(min(self._count, best.shape[-1]), -1)
        self._ids = every.gather(-1, order)

    def result(self) -> Likely:
        """Return ids, ln p and the ln of what is left over."""
        logprobs = self._best - self._total[:, None]
        rest = torch.log1p(-logprobs.double().exp().sum(-1).clamp(max=1)).float()
        if self._count == len(self.rows):
            rest = torch.full_like(rest, -torch.inf)
        return self._ids.numpy(), logprobs.numpy(), rest.numpy()
