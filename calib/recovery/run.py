"""Train a pruned checkpoint, and write the result as a checkpoint like it."""

import json
import logging
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments, default_data_collator

from calib.estimate import MB
from calib.recovery.forecast import (
    Forecast,
    expected_seconds,
    fitting_steps,
    free_memory,
    predict_memory,
    timed,
    trained_parameters,
)
from calib.recovery.losses import divergence, divergence_from_top, surprise
from calib.recovery.model import (
    ParameterMap,
    Teacher,
    check_chosen,
    check_trainable,
    file_tensors,
    load_model,
)
from calib.recovery.options import (
    CONTINUE,
    DISTILL,
    EVALUATIONS,
    FFN_ALONE,
    SELF_DATA,
    RecoverOptions,
    TrainingError,
)
from calib.recovery.self_data import Writing, seconds_of, write_self_data
from calib.recovery.teach import LOGPROBS, REST, TOP, TaughtWindows, is_taught
from calib.recovery.text import encode_heldout, hold_out, training_windows
from calib.recovery.trainer import (
    METRIC,
    HeldOut,
    Loss,
    RecoveryTrainer,
    Reports,
    check_arguments,
    check_libraries,
)
from calib.recovery.work import CLOCK, Schedule, TrainingText, WorkDirectory
from calib.recovery.written import kept_rows, plan_for, trained_plan
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
from surgery.errors import BudgetError, CheckpointError, DataError
from surgery.files.atomic import check_file
from surgery.layout.layout import Layout
from surgery.plot import saved_figure, titled
from surgery.process import Progress, Seconds, peak_rss_bytes, spoken
from surgery.text.documents import TextOptions, read_documents
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import VerifyReport, verify_files

LOG = logging.getLogger(__name__)

WARMUP = 0.03
"""Share of the steps over which the learning rate rises."""

WRITING = 0.5
"""Share of the minutes of self-data in which the teacher writes."""


@dataclass(frozen=True)
class Recovered:
    """What a recovery made."""

    output: Path | None
    """The checkpoint; None where training did not help, so that none was written."""
    method: str
    before: float
    """Bits per byte of the held-out text, of the checkpoint that was trained."""
    after: float
    """Of the best state, in the checkpoint's dtype."""
    curve: tuple[tuple[int, float], ...]
    """Tokens trained on, and bits per byte of the held-out text after them."""
    seconds: float
    peak_rss_bytes: int | None
    writing_seconds: float = 0.0
    """In which the teacher wrote the text; a part of ``seconds``."""
    checks: VerifyReport | None = None
    """What verify says of the output."""

    @property
    def helped(self) -> bool:
        """Whether the best state needs fewer bits than the checkpoint that was trained."""
        return self.after < self.before

    @property
    def tokens(self) -> int:
        """Tokens that were trained on."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def best_tokens(self) -> int:
        """Tokens after which the best state was reached."""
        return min(self.curve, key=lambda point: point[1])[0] if self.curve else 0

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        found = {key: value for key, value in asdict(self).items() if key != "checks"}
        return found | {"output": str(self.output) if self.output else None, "tokens": self.tokens}

    def table(self) -> str:
        """Return the bits as lines for people."""
        lines = [f"{'tokens':>12}{'bits per byte of held-out text':>34}"]
        lines += [f"{tokens:>12,}{bits:>34.4f}" for tokens, bits in ((0, self.before), *self.curve)]
        change = f"{self.after / self.before - 1:+.2%}"
        if self.output is None:
            lines.append(f"no better than before ({change}): nothing was written")
        else:
            lines.append(f"written: {self.after:.4f}, {change}, in {spoken(self.seconds)}")
        return "\n".join(lines)

    def plot(self, path: Path, model: str = "") -> None:
        """Draw bits against tokens to a picture (extra ``plot``)."""
        with saved_figure(path, 7, 4.2) as figure:
            axes = figure.subplots()
            points = ((0, self.before), *self.curve)
            axes.plot(*zip(*points, strict=True), marker="o", label=self.method)
            axes.axhline(self.before, linestyle=":", color="#000000", label="before")
            axes.set_xlabel("tokens trained on")
            axes.set_ylabel("bits per byte of held-out text")
            axes.set_title(titled(model, "trained back"))
            axes.grid(alpha=0.3)
            axes.legend()


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
        if not (options.resume and options.work.exists()):  # nothing there is of an earlier run
            for path in (options.plan, options.weights, options.self_data):
                check_file(path, layout.checkpoint.path)
        check_output_path(options.output, layout.checkpoint.path)
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
        if (self.taught is None) != bool(text.data):
            raise DataError(
                "`data`",
                "is the text to train on; the files of a teacher have their own",
                fix="leave it out" if text.data else "give a text",
            )

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
        state = PartialState(cpu=self.settings.device.type == "cpu")
        main, start = state.is_main_process, time.perf_counter()
        work = self._work(self.options.work, resume=self.options.resume, main=main)
        try:
            with state.main_process_first():
                text = self._text(work, progress)
            session = _Session(self, work, text)
            made = session.train(progress)
            if not math.isfinite(made.after):
                work.close(done=True)
                raise TrainingError(
                    "the trained model",
                    "predicts numbers that are not finite; nothing was written",
                    found=made.after,
                    fix="give a smaller `learning_rate`, or check the teacher's weights",
                )
            if not main:  # the first process writes
                return replace(made, output=self.options.output if made.helped else None)
            made = replace(session.write(made), seconds=time.perf_counter() - start)
            work.close(done=True)
            return made
        finally:
            work.close(keep=self.options.self_data.exists())

    def forecast(self) -> Forecast:
        """Predict memory and time, by a first step that changes nothing; write nothing.

        Raises:
            SurgeryError: as ``run``.
        """
        with TemporaryDirectory() as folder:
            work = self._work(Path(folder) / "work", resume=False, main=True)
            try:
                return _Session(self, work, self._text(work, dry=True)).forecast
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


def _named(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint is known by: its tensors' shapes, and their values."""
    return f"{checkpoint.fingerprint} {checkpoint.weights}"


def _refused(by: str, error: Exception) -> TrainingError:
    what = f"is refused by transformers' {by}"
    return TrainingError("`training`", what, found=error, fix="correct it")


class _Session:
    """The models of a recovery in memory, and what trains one of them."""

    def __init__(self, recovery: Recovery, work: WorkDirectory, text: TrainingText) -> None:
        self._recovery, self._work, self._text = recovery, work, text
        options, settings, layout = recovery.options, recovery.settings, recovery.layout
        self._memory = self._fitting_memory()
        tokenizer = load_tokenizer(layout.checkpoint.path)
        held = encode_heldout(text.heldout, tokenizer, first_token(layout), positions(layout))
        self._heldout = HeldOut(held, sum(len(each.encode()) for each in text.heldout), self._amp)
        on_card = settings.device.type != "cpu"
        dtype = settings.dtype if options.lora and on_card else torch.float32
        self._model = load_model(layout, dtype).to(settings.device)
        self._parameters = ParameterMap(self._model, layout)
        self._parameters.check()
        self._loss: Loss = lambda logits, batch: surprise(logits, batch["input_ids"])
        if recovery.taught is not None:
            self._loss = lambda logits, batch: divergence_from_top(
                logits, batch[TOP], batch[LOGPROBS], batch[REST]
            )
        elif options.method == DISTILL and recovery.teacher is not None:
            teacher = Teacher(recovery.teacher, recovery.kept, settings.dtype)
            teacher.to(settings.device)
            self._loss = lambda logits, batch: divergence(
                logits, teacher.logits(batch["input_ids"])
            )
        self._trained = self._prepare_parameters()
        self._seconds: Seconds | None = None
        self._schedule = work.schedule or self._begin()

    def _amp(self) -> AbstractContextManager[Any]:
        """Compute in 16 bits where that is asked for; the weights that are trained stay float32."""
        settings = self._recovery.settings
        half = settings.dtype != torch.float32
        return torch.autocast(settings.device.type, settings.dtype, enabled=half)

    def _fitting_memory(self) -> dict[str, int]:
        """Predict the peak of memory, and refuse what does not fit."""
        recovery = self._recovery
        options, settings = recovery.options, recovery.settings
        sizes = 2 if options.lora and settings.device.type != "cpu" else 4
        found = predict_memory(
            recovery.layout,
            recovery.teacher if options.method == DISTILL else None,
            trained=trained_parameters(recovery.layout, options.lora, options.only),
            batch_tokens=options.batch_size * recovery.seq_len,
            itemsizes=(sizes, settings.dtype.itemsize),
        )
        free, need = free_memory(settings.device), sum(found.values())
        if need > free:
            raise BudgetError(
                f"`device` {settings.device}",
                "has too little memory to train this model",
                expected=f"{need / MB:,.0f} MB free",
                found=f"{free / MB:,.0f} MB",
                fix="give `lora` a rank, a smaller `seq_len`, or the directory that teach writes "
                "as `teacher`",
            )
        return found

    def _prepare_parameters(self) -> Any:
        """Choose what is trained; return the model, or the one of peft around it."""
        recovery, model = self._recovery, self._model
        options = recovery.options
        ffn = self._parameters.of_ffn() if options.only == FFN_ALONE else None
        if options.lora is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(ffn is None or name in ffn)
            return model
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recovery.text.seed or 0)
        if recovery.layout.experts:
            LOG.info("note: adapters are for linear maps alone, so packed experts stay as they are")
        modules = "all-linear" if ffn is None else [n.removesuffix(".weight") for n in ffn]
        return get_peft_model(
            model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=modules)
        )

    def _begin(self) -> Schedule:
        """Measure the held-out text and the pace of a step; choose the number of steps."""
        recovery, device = self._recovery, self._recovery.settings.device
        options = recovery.options
        began = time.perf_counter()
        start = self._heldout.bits_per_byte(self._trained, device)
        evaluation = time.perf_counter() - began
        if not math.isfinite(start):
            raise CheckpointError(
                recovery.layout.checkpoint.path,
                "predicts numbers that are not finite, so it cannot be trained",
                found=f"{start} bits per byte of held-out text",
                fix="check its weights",
            )
        step = timed(self._try_step) * self._accumulated
        steps, evaluations = max(1, (options.tokens or 0) // self._tokens_of_step), EVALUATIONS
        if options.minutes is not None:
            seconds = 60 * options.minutes - self._recovery.writing_seconds
            steps, evaluations = fitting_steps(seconds, step, evaluation)
        every = -(-steps // evaluations)
        self._seconds = expected_seconds(steps, step, -(-steps // every), evaluation)
        return self._work.begin(steps, every, start)

    def _try_step(self) -> None:
        """Take a step's loss and gradients, and forget them."""
        device, size = self._recovery.settings.device, self._recovery.options.batch_size
        items = [self._text.windows[number % len(self._text.windows)] for number in range(size)]
        batch = {name: tensor.to(device) for name, tensor in default_data_collator(items).items()}
        self._trained.train()
        with self._amp():
            logits = self._trained(input_ids=batch["input_ids"], use_cache=False).logits
            loss = self._loss(logits, batch)
        loss.backward()
        self._trained.zero_grad(set_to_none=True)

    @property
    def _accumulated(self) -> int:
        return int(self._recovery.options.training.get("gradient_accumulation_steps", 1))

    @property
    def _tokens_of_step(self) -> int:
        recovery, processes = self._recovery, PartialState().num_processes
        windows = recovery.options.batch_size * self._accumulated * processes
        return windows * recovery.seq_len

    @property
    def forecast(self) -> Forecast:
        """What the run takes."""
        steps = self._schedule.steps
        return Forecast(steps, steps * self._tokens_of_step, self._memory, self._seconds)

    def train(self, progress: Progress | None) -> Recovered:
        """Train to the end, or on from the last checkpoint; the model then has its best state."""
        recovery, schedule, start = self._recovery, self._schedule, time.perf_counter()
        LOG.info("%s", self.forecast.table())
        LOG.info("0 tokens: %.4f bits per byte of held-out text", schedule.start)
        arguments, last = self._arguments(), self._work.last_checkpoint()
        try:
            trainer = RecoveryTrainer(
                loss=self._loss,
                heldout=self._heldout,
                model=self._trained,
                args=arguments,
                train_dataset=self._text.windows,
                eval_dataset=self._heldout.windows,
                callbacks=[Reports(progress, self._tokens_of_step)],
            )
        except (ImportError, ValueError) as error:
            raise _refused("Trainer", error) from error
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except ImportError as error:  # of the optimizer, which is made here
            raise _refused("Trainer", error) from error
        curve = tuple(
            (int(entry["step"]) * self._tokens_of_step, entry[f"eval_{METRIC}"])
            for entry in trainer.state.log_history
            if f"eval_{METRIC}" in entry
        )
        if recovery.options.lora is not None:
            self._model = self._trained.merge_and_unload()
        self._parameters.round()
        after = self._heldout.bits_per_byte(self._model, recovery.settings.device)
        took = time.perf_counter() - start
        method = recovery.options.method
        return Recovered(
            None,
            method,
            schedule.start,
            after,
            curve,
            took,
            peak_rss_bytes(),
            recovery.writing_seconds,
        )

    def _arguments(self) -> TrainingArguments:
        recovery, schedule = self._recovery, self._schedule
        options, settings = recovery.options, recovery.settings
        seed = recovery.text.seed or 0
        chosen: dict[str, Any] = {
            "output_dir": str(self._work.path),
            "max_steps": schedule.steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": options.peak_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, round(WARMUP * schedule.steps)),
            "weight_decay": 0.0,
            "eval_strategy": "steps",
            "eval_steps": schedule.every,
            "save_strategy": "steps",
            "save_steps": schedule.every,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": METRIC,
            "greater_is_better": False,
            "logging_steps": schedule.every,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": settings.device.type == "cpu",
            "bf16": settings.dtype == torch.bfloat16,
            "fp16": settings.dtype == torch.float16,
            "seed": seed,
            "data_seed": seed,
        }
        try:
            made = TrainingArguments(**{**chosen, **options.training})
        except (TypeError, ValueError) as error:
            raise _refused("TrainingArguments", error) from error
        made._n_gpu = min(made.n_gpu, 1)  # several cards are used by several processes
        return made

    def write(self, made: Recovered) -> Recovered:
        """Write the checkpoint, its plan and its trained tensors, if training helped."""
        recovery = self._recovery
        options, layout = recovery.options, recovery.layout
        if not made.helped:
            return made
        what = (
            f"{made.method} on {made.best_tokens:,} tokens: {made.before:.4f} bits per byte of "
            f"held-out text, {made.after:.4f} trained"
        )
        tensors = file_tensors(self._model, self._model.state_dict())
        plan = trained_plan(recovery.plan, layout, tensors, options.weights, what)
        plan = msgspec.structs.replace(plan, output=str(options.output.absolute()))
        plan.save(options.plan)
        apply_to(plan, recovery.source, ApplyOptions(options.output, options.resume))
        checks = verify_files(options.output, plan, recovery.source, download=False)
        return replace(made, output=options.output, checks=checks)
