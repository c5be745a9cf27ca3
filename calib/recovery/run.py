"""Train a pruned checkpoint, and write the result as a checkpoint like it."""

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from calib.recovery.arguments import (
    check_arguments,
    check_libraries,
    check_values,
    training_arguments,
)
from calib.recovery.forecast import (
    Forecast,
    check_memory,
    expected_seconds,
    fitting_steps,
    predict_memory,
    timed,
    trained_parameters,
)
from calib.recovery.model import Student, Teacher, check_chosen, check_trainable
from calib.recovery.options import (
    CONTINUE,
    DISTILL,
    EVALUATIONS,
    SELF_DATA,
    RecoverOptions,
    TrainingError,
)
from calib.recovery.self_data import Writing, seconds_of, write_self_data
from calib.recovery.taught import TaughtWindows, is_taught
from calib.recovery.text import encode_heldout, hold_out, training_windows
from calib.recovery.trainer import (
    HeldOut,
    Loss,
    Reports,
    Training,
    half_precision,
    next_tokens,
    run_trainer,
    taught_tokens,
)
from calib.recovery.work import CLOCK, Schedule, TrainingText, WorkDirectory
from calib.recovery.written import Recovered, kept_rows, plan_for, trained_plan
from calib.scoring.score import check_predicts, first_token
from calib.streaming.empty_model import positions
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import choose_settings
from calib.text.chat import documents_of
from calib.text.windows import within_positions
from surgery.api import open_layout
from surgery.apply.output_directory import check_output_path
from surgery.apply.run import ApplyOptions, apply_to
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import CheckpointError, DataError
from surgery.files.atomic import check_file
from surgery.layout.layout import Layout
from surgery.process import Progress, Seconds, peak_rss_bytes
from surgery.text.documents import TextOptions, read_documents
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import verify_files

LOG = logging.getLogger(__name__)

WRITING = 0.5
"""Share of the minutes of self-data in which the teacher writes."""

TRYING = 0.04
"""Share of the minutes in which steps are tried, to know how many fit."""


class Recovery:
    """A checked request; its text is read and its models are loaded when it runs."""

    def __init__(
        self, layout: Layout, text: TextOptions, compute: ComputeOptions, options: RecoverOptions
    ) -> None:
        """Check what can be checked before text and weights are read; write nothing.

        Raises:
            SurgeryError: the model cannot be trained, the teacher is not known or has another
                vocabulary, or the output cannot be written.
        """
        check_libraries(options)
        check_arguments(options.training)
        check_predicts(layout)
        check_trainable(layout)
        check_chosen(layout, options)
        self.layout, self.text, self.options = layout, text, options
        self.settings = choose_settings(compute, layout.checkpoint)
        self._check_outputs([layout.checkpoint.path, *text.files])
        self.seq_len = within_positions(text.seq_len, positions(layout))
        self.plan, self.source = plan_for(layout)
        self.taught: TaughtWindows | None = None
        self.teacher: Layout | None = None
        if options.method == DISTILL and is_taught(options.teacher):
            self.taught = TaughtWindows(Path(str(options.teacher)))
            self.taught.check(layout)
            self.seq_len = self.taught.info.seq_len
        elif options.method != CONTINUE:
            self.teacher = self._teacher()
        self._check_outputs(self._also_read())
        if (self.taught is None) != bool(text.data):
            raise DataError(
                "`data`",
                "is the text to train on; the files of a teacher have their own",
                fix="leave it out" if text.data else "give a text",
            )

    def _check_outputs(self, read: Sequence[Path]) -> None:
        """Refuse outputs that could not be written, or that are ``read``."""
        options = self.options
        check_output_path(options.output, read)
        ours = options.resume and options.work.exists()  # an earlier run has begun them
        fix = "name another output, or move the file away"
        for path in (options.plan, options.weights, options.self_data):
            check_file(path, read, force=ours, fix=fix)

    def _also_read(self) -> list[Path]:
        """Return the directories that are read beside the model's; nothing is written in them."""
        found = [self.source]
        if self.teacher is not None:
            found.append(self.teacher.checkpoint.path)
        if self.taught is not None:
            found.append(self.taught.directory)
        return found

    def _teacher(self) -> Layout:
        name = self.options.teacher
        if name is None and self.source == self.layout.checkpoint.path:
            raise TrainingError(
                "`teacher`",
                "is not known: no plan beside the model names a source that is at hand",
                fix="name the dense model, or use `method` continue",
            )
        found = open_layout(name if name is not None else self.source)
        self.kept = kept_rows(self.layout, found)
        return found

    @cached_property
    def _processes(self) -> Any:
        """The processes that train together; accelerate is in the extra, so it is imported here."""
        from accelerate import PartialState

        return PartialState(cpu=self.settings.device.type == "cpu")

    @property
    def is_main_process(self) -> bool:
        """Whether this process speaks and writes for all."""
        return bool(self._processes.is_main_process)

    @property
    def writing_seconds(self) -> float:
        """Seconds in which the teacher has written text, or will where it has not begun."""
        options, clock = self.options, self.options.work / CLOCK
        if options.method == SELF_DATA and options.minutes is not None and not clock.exists():
            return 60 * options.minutes * WRITING
        return seconds_of(clock)

    @property
    def identity(self) -> dict[str, str]:
        """What a run and its continuation must have in common."""
        options = self.options
        names = ("tokens", "minutes", "method", "lora", "only", "learning_rate", "batch_size")
        checkpoint = self.layout.checkpoint
        found: dict[str, Any] = {name: getattr(options, name) for name in names}
        found |= {
            "model": _named(checkpoint),
            "teacher": _named(self.teacher.checkpoint) if self.teacher else None,
            "taught": self.taught.info if self.taught else None,
            "data": [[str(each.name), each.weight] for each in self.text.data],
            "seq_len": self.seq_len,
            "windows": self.text.windows,
            "seed": self.text.seed,
            "training": json.dumps(dict(options.training), sort_keys=True, default=str),
        }
        return {name: str(value) for name, value in found.items()}

    def read_text(
        self, progress: Progress | None = None, *, dry: bool = False
    ) -> tuple[np.ndarray, list[str]]:
        """Return the windows to train on, and the held-out text.

        With self-data, the teacher writes the windows' text first; ``dry``, it does not.
        """
        documents, held = hold_out(documents_of(self.layout, self.text), self.text.windows)
        if self.options.method == SELF_DATA and not dry:
            documents = self._self_data(documents, progress)
        tokenizer = load_tokenizer(self.layout.checkpoint.path)
        first, tokens = first_token(self.layout), self.options.tokens
        most = None if tokens is None else -(-tokens // self.seq_len)
        return training_windows(documents, tokenizer, first, self.seq_len, most), held

    def _self_data(self, documents: Iterable[str], progress: Progress | None) -> Iterable[str]:
        assert self.teacher is not None
        options, path = self.options, self.options.self_data
        seconds = None if options.minutes is None else 60 * options.minutes * WRITING
        clock, seed = options.work / CLOCK, self.text.seed or 0
        writing = Writing(path, options.tokens, seconds, clock, self.seq_len, seed)
        write_self_data(self.teacher, documents, writing, self.settings, progress)
        return read_documents(path)

    def run(self, progress: Progress | None = None) -> Recovered:
        """Train, judge and write.

        Raises:
            SurgeryError: there is too little memory or text, or an interrupted run is in the way.
        """
        state, main, start = self._processes, self.is_main_process, time.perf_counter()
        check_values(self.options, self.settings, self._seed)
        work = self._work(self.options.work, resume=self.options.resume, main=main)
        try:
            with state.main_process_first():  # the others read what it has written
                text = self._text(work, progress)
            memory = self._fitting_memory()
            training = self._load(text)
            with state.main_process_first():
                schedule, seconds = work.schedule, None
                if schedule is None:
                    schedule, seconds = self._begin(work, training)
            if main:
                LOG.info("%s", self._forecast(schedule, memory, seconds).table())
                LOG.info("0 tokens: %.4f bits per byte of held-out text", schedule.start)
            made = self._train(work, training, schedule, progress)
            if not main:  # the first process writes
                return replace(made, output=self.options.output if made.helped else None)
            made = replace(self._write(made, training), seconds=time.perf_counter() - start)
            work.close(done=True)
            return made
        finally:
            work.close(keep=self.options.self_data.exists())

    def forecast(self) -> Forecast:
        """Predict memory and time, by a first step that changes nothing; write nothing.

        Raises:
            SurgeryError: as ``run``.
        """
        check_values(self.options, self.settings, self._seed)
        with TemporaryDirectory() as folder:
            work = self._work(Path(folder) / "work", resume=False, main=True)
            try:
                text, memory = self._text(work, dry=True), self._fitting_memory()
                schedule, seconds = self._begin(work, self._load(text))
                return self._forecast(schedule, memory, seconds)
            finally:
                work.close()

    def _text(
        self, work: WorkDirectory, progress: Progress | None = None, *, dry: bool = False
    ) -> TrainingText:
        if self.taught is not None:
            return TrainingText(self.taught, self.taught.heldout)
        return work.text(partial(self.read_text, progress, dry=dry))

    def _work(self, path: Path, *, resume: bool, main: bool) -> WorkDirectory:
        return WorkDirectory(path, self.identity, resume=resume, main=main)

    def _fitting_memory(self) -> dict[str, int]:
        """Predict the peak of memory, and refuse what does not fit."""
        options, settings = self.options, self.settings
        sizes = 2 if options.lora and settings.device.type != "cpu" else 4
        found = predict_memory(
            self.layout,
            self.teacher if options.method == DISTILL else None,
            trained=trained_parameters(self.layout, options.lora, options.only),
            batch_tokens=options.batch_size * self.seq_len,
            itemsizes=(sizes, settings.dtype.itemsize),
        )
        check_memory(settings.device, sum(found.values()))
        return found

    def _load(self, text: TrainingText) -> Training:
        """Load the models: the one that is trained, and a teacher that is resident."""
        layout, options, settings = self.layout, self.options, self.settings
        tokenizer = load_tokenizer(layout.checkpoint.path)
        ids = encode_heldout(text.heldout, tokenizer, first_token(layout), positions(layout))
        nbytes = sum(len(each.encode()) for each in text.heldout)
        heldout = HeldOut(ids, nbytes, partial(half_precision, settings))
        student = Student(layout, options, settings, self._seed)
        loss: Loss = next_tokens
        if self.taught is not None:
            loss = taught_tokens
        elif options.method == DISTILL and self.teacher is not None:
            teacher = Teacher(self.teacher, self.kept, settings.dtype)
            teacher.to(settings.device)
            loss = teacher.divergence
        return Training(student, loss, heldout, text.windows, settings)

    def _begin(self, work: WorkDirectory, training: Training) -> tuple[Schedule, Seconds]:
        """Measure the held-out text and the pace of a step; choose the number of steps."""
        options, began = self.options, time.perf_counter()
        start = training.bits_per_byte()
        evaluation = time.perf_counter() - began
        if not math.isfinite(start):
            raise CheckpointError(
                self.layout.checkpoint.path,
                "predicts numbers that are not finite, so it cannot be trained",
                found=f"{start} bits per byte of held-out text",
                fix="check its weights",
            )
        try_step = partial(training.try_step, options.batch_size)
        if options.minutes is None:
            assert options.tokens is not None
            step = timed(try_step) * self._accumulated
            steps, evaluations = max(1, options.tokens // self._tokens_of_step), EVALUATIONS
        else:
            seconds = 60 * options.minutes - self.writing_seconds
            step = timed(try_step, TRYING * seconds) * self._accumulated
            steps, evaluations = fitting_steps((1 - TRYING) * seconds, step, evaluation)
        every = -(-steps // evaluations)
        took = expected_seconds(steps, step, -(-steps // every), evaluation)
        return work.begin(steps, every, start), took

    @property
    def _seed(self) -> int:
        return self.text.seed or 0

    @property
    def _accumulated(self) -> int:
        return int(self.options.training.get("gradient_accumulation_steps", 1))

    @property
    def _tokens_of_step(self) -> int:
        windows = self.options.batch_size * self._accumulated * self._processes.num_processes
        return windows * self.seq_len

    def _forecast(
        self, schedule: Schedule, memory: dict[str, int], seconds: Seconds | None
    ) -> Forecast:
        return Forecast(schedule.steps, schedule.steps * self._tokens_of_step, memory, seconds)

    def _train(
        self,
        work: WorkDirectory,
        training: Training,
        schedule: Schedule,
        progress: Progress | None,
    ) -> Recovered:
        """Train to the end, or on from the last checkpoint; the model then has its best state."""
        start = time.perf_counter()
        arguments = training_arguments(
            self.options, self.settings, work.path, schedule.steps, schedule.every, self._seed
        )
        reports = Reports(progress, self._tokens_of_step)
        curve = tuple(
            (step * self._tokens_of_step, bits)
            for step, bits in run_trainer(training, arguments, reports, work.last_checkpoint())
        )
        training.student.finish()
        after = training.bits_per_byte()
        if not math.isfinite(after):
            work.close(done=True)
            raise TrainingError(
                "the trained model",
                "predicts numbers that are not finite; nothing was written",
                found=after,
                fix="give a smaller `learning_rate`, or check the teacher's weights",
            )
        return Recovered(
            output=None,
            method=self.options.method,
            before=schedule.start,
            after=after,
            curve=curve,
            seconds=time.perf_counter() - start,
            peak_rss_bytes=peak_rss_bytes(),
            writing_seconds=self.writing_seconds,
        )

    def _write(self, made: Recovered, training: Training) -> Recovered:
        """Write the checkpoint, its plan and its trained tensors, if training helped."""
        if not made.helped:
            return made
        options = self.options
        what = (
            f"{made.method} on {made.best_tokens:,} tokens: {made.before:.4f} bits per byte of "
            f"held-out text, {made.after:.4f} trained"
        )
        tensors = training.student.file_tensors()
        plan = trained_plan(self.plan, self.layout, tensors, options.weights, what)
        plan = msgspec.structs.replace(plan, output=str(options.output.absolute()))
        plan.save(options.plan)
        apply_to(plan, self.source, ApplyOptions(options.output, options.resume))
        checks = verify_files(options.output, plan, self.source, download=False)
        return replace(made, output=options.output, checks=checks)


def _named(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint is known by: its tensors' shapes, and their values."""
    return f"{checkpoint.fingerprint} {checkpoint.weights}"
