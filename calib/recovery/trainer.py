"""transformers' Trainer with a recovery's loss and its held-out bits per byte."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from calib.recovery.arguments import METRIC, refused
from calib.recovery.model import Student
from calib.recovery.taught import LOGPROBS, REST, TOP, TaughtWindows, divergence_from_top
from calib.streaming.settings import PassSettings
from surgery.process import Progress

LOG = logging.getLogger(__name__)

Loss = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""Returns the loss of the student's logits for a batch."""


def next_tokens(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean −ln p of each next token: what pretraining minimizes."""
    targets = batch["input_ids"][:, 1:].long()
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def taught_tokens(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss towards what ``teach`` has written."""
    return divergence_from_top(logits, batch[TOP], batch[LOGPROBS], batch[REST])


def half_precision(settings: PassSettings) -> AbstractContextManager[Any]:
    """Compute in 16 bits where that is asked for; the weights that are trained stay float32."""
    half = settings.dtype != torch.float32
    return torch.autocast(settings.device.type, settings.dtype, enabled=half)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of token ids, read from a file as they are used."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self._ids[index].astype(np.int64))}


class HeldOut:
    """Held-out windows of text that measure a whole model in bits per byte."""

    def __init__(
        self,
        windows: Sequence[Sequence[int]],
        nbytes: int,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._context = context
        self.windows = windows
        """Token ids; the first one of each is given, not predicted."""
        self.nbytes = nbytes
        """UTF-8 bytes of all windows."""

    @torch.no_grad()
    def bits_per_byte(self, model: Any, device: torch.device) -> float:
        """Return Σ −log2 p of the windows' tokens for each byte of their text."""
        training, total = model.training, 0.0
        model.eval()
        for window in self.windows:
            ids = torch.tensor([window], device=device)
            with self._context():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            chosen = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])
            total -= float(chosen.double().sum())
        model.train(training)
        return total / math.log(2) / self.nbytes


@dataclass(frozen=True)
class Training:
    """What is trained, towards what, and on which text."""

    student: Student
    loss: Loss
    heldout: HeldOut
    windows: "Windows | TaughtWindows"
    settings: PassSettings

    def bits_per_byte(self) -> float:
        """Return the student's bits for each byte of held-out text."""
        return self.heldout.bits_per_byte(self.student.trained, self.settings.device)

    def try_step(self, batch_size: int) -> None:
        """Take a step's loss and gradients, and forget them."""
        model, device = self.student.trained, self.settings.device
        items = [self.windows[number % len(self.windows)] for number in range(batch_size)]
        batch = {name: tensor.to(device) for name, tensor in default_data_collator(items).items()}
        model.train()
        with half_precision(self.settings):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = self.loss(logits, batch)
        loss.backward()
        model.zero_grad(set_to_none=True)


def run_trainer(
    training: Training, arguments: TrainingArguments, reports: "Reports", last: Path | None
) -> list[tuple[int, float]]:
    """Train to the end, or on from the checkpoint ``last``; the student then has its best state.

    Returns:
        Steps, and bits per byte of the held-out text after them.

    Raises:
        TrainingError: the library refuses the arguments.
    """
    try:
        trainer = RecoveryTrainer(
            loss=training.loss,
            heldout=training.heldout,
            model=training.student.trained,
            args=arguments,
            train_dataset=training.windows,
            eval_dataset=training.heldout.windows,
            callbacks=[reports],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise refused("Trainer", error) from error
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except (ImportError, ValueError) as error:  # of optimizer and loader, which are made here
        raise refused("Trainer", error) from error
    key = f"eval_{METRIC}"
    history = trainer.state.log_history
    return [(int(entry["step"]), entry[key]) for entry in history if key in entry]


STATE = "model.safetensors"
"""The trained model's tensors within a checkpoint, by the names of its modules."""


class RecoveryTrainer(Trainer):
    """A Trainer whose loss looks at the logits alone, and which evaluates bits per byte.

    Its checkpoints hold the model's own state, which is loaded strictly: a Trainer's have the names
    of published files, of which it would load those alone that the modules have too.
    """

    def __init__(self, *, loss: Loss, heldout: HeldOut, **options: Any) -> None:
        super().__init__(**options)
        self._loss, self._heldout = loss, heldout
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, with the model's outputs if they are asked for."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        loss = self._loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    @property
    def _whole(self) -> bool:
        """Whether this process holds all of the model, and all of it is trained or kept."""
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return plain and not hasattr(self.model, "peft_config")

    @property
    def _module(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self._whole:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self._module, str(folder / STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._whole:
            self._load_state(resume_from_checkpoint, model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._whole:
            self._load_state(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_state(self, checkpoint: str, model: Any = None) -> None:
        load_model(self._module if model is None else model, Path(checkpoint) / STATE, strict=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out text, log it, and tell the callbacks."""
        found = self._heldout.bits_per_byte(self.model_wrapped, self.args.device)
        metrics = {f"{metric_key_prefix}_{METRIC}": found}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class Reports(TrainerCallback):
    """Reports the tokens of finished steps, and logs the bits of held-out text."""

    def __init__(self, progress: Progress | None, tokens: int) -> None:
        self._progress, self._tokens = progress, tokens

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the finished tokens and their total; have the last step judged and kept."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if self._progress is not None:
            done, total = (steps * self._tokens for steps in (state.global_step, state.max_steps))
            self._progress("recover", done, total)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Log the bits, once for all processes."""
        if not state.is_world_process_zero:
            return
        tokens, bits = state.global_step * self._tokens, given["metrics"][f"eval_{METRIC}"]
        LOG.info("%s tokens: %.4f bits per byte of held-out text", f"{tokens:,}", bits)
