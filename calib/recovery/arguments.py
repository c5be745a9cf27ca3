"""transformers' TrainingArguments of a recovery: those chosen here, and those a user may give."""

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from calib.recovery.options import RecoverOptions, TrainingError
from calib.streaming.settings import PassSettings

METRIC = "bits_per_byte"

OWN_ARGUMENTS = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "resume_from_checkpoint",
    "per_device_train_batch_size",
    "auto_find_batch_size",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_only_model",
    "remove_unused_columns",
    "use_cpu",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
)
"""Of ``TrainingArguments``, those that follow from other options."""

IDLE_ARGUMENTS = (
    "do_train",
    "do_eval",
    "do_predict",
    "prediction_loss_only",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "batch_eval_metrics",
    "include_for_metrics",
    "bf16_full_eval",
    "fp16_full_eval",
    "label_names",
    "label_smoothing_factor",
)
"""Those that change nothing: the losses and the measurement of held-out text are our own."""

WHOLE_PROCESS = ("deepspeed", "fsdp", "fsdp_config")
"""Those that set up the process once, so that they are not tried before."""

WARMUP = 0.03
"""Share of the steps over which the learning rate rises."""


def check_arguments(training: Mapping[str, Any]) -> None:
    """Refuse arguments of the library that it does not have, or that follow from other options.

    Raises:
        TrainingError: naming the first one.
    """
    known, types = (
        {each.name for each in fields(TrainingArguments)},
        get_type_hints(TrainingArguments),
    )
    for name, value in training.items():
        problem = None
        if name in OWN_ARGUMENTS:
            problem = "follows from other options"
        elif name in IDLE_ARGUMENTS:
            problem = "has no effect here"
        elif name not in known:
            problem = "is none of transformers' TrainingArguments"
        if problem is not None:
            fix = "correct it" if name not in known else "leave it out"
            raise TrainingError(f"`training`: {name}", problem, fix=fix)
        try:
            msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            what = "is of another type"
            raise TrainingError(
                f"`training`: {name}", what, found=error, fix="correct it"
            ) from error
        except TypeError:  # a type that msgspec does not know; the library looks at the value
            continue
    steps = training.get("gradient_accumulation_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise TrainingError(
            "`training`: gradient_accumulation_steps",
            "is not a number of steps",
            expected="a whole number of at least 1",
            found=steps,
            fix="correct it",
        )


def check_values(options: RecoverOptions, settings: PassSettings, seed: int) -> None:
    """Refuse, before a model is loaded, values of the user's arguments that the library refuses.

    Reports, optimizer, scheduler and loader are tried with a model of two numbers. What needs the
    real one, such as an optimizer's ``optim_target_modules``, is refused when that is trained.

    Raises:
        TrainingError: with the library's reason.
    """
    tried = {name: value for name, value in options.training.items() if name not in WHOLE_PROCESS}
    asked, steps = replace(options, training=tried), 100
    made: Any = training_arguments(asked, settings, options.work, steps, 1, seed)
    windows: Any = [0]
    model: Any = torch.nn.Linear(1, 1)
    groups = [{"params": [each]} for each in model.parameters()]  # as many as a Trainer makes
    try:
        get_reporting_integration_callbacks(made.report_to)
        if made.optim_target_modules is None:
            Trainer.get_optimizer_cls_and_kwargs(made, model)
        get_scheduler(
            made.lr_scheduler_type,
            torch.optim.SGD(groups, made.learning_rate),
            made.get_warmup_steps(steps),
            steps,
            made.lr_scheduler_kwargs,
        )
        torch.utils.data.DataLoader(
            windows,
            num_workers=made.dataloader_num_workers,
            persistent_workers=made.dataloader_persistent_workers,
            prefetch_factor=made.dataloader_prefetch_factor,
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise refused("Trainer", error) from error


def check_libraries(options: RecoverOptions) -> None:
    """Refuse a training without the libraries that do it.

    Raises:
        TrainingError: naming the extra.
    """
    for name in ("accelerate", *(("peft",) if options.lora else ())):
        if find_spec(name) is None:
            raise TrainingError(
                name, "is not installed", fix="pip install 'compact-surgery[recover]'"
            )


def training_arguments(
    options: RecoverOptions,
    settings: PassSettings,
    path: Path,
    steps: int,
    every: int,
    seed: int,
) -> TrainingArguments:
    """Return the library's arguments of a run.

    Args:
        options: What is trained, with the user's own arguments.
        settings: Where and in what dtype.
        path: Directory of the checkpoints.
        steps: Of the run.
        every: Steps between two measurements of held-out text, and two checkpoints.
        seed: Of the order of windows.

    Raises:
        TrainingError: the library refuses the user's arguments.
    """
    chosen: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.peak_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(WARMUP * steps)),
        "weight_decay": 0.0,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": METRIC,
        "greater_is_better": False,
        "logging_steps": every,
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
    except (ImportError, TypeError, ValueError) as error:
        raise refused("TrainingArguments", error) from error
    made._n_gpu = min(made.n_gpu, 1)  # several cards are used by several processes
    return made


def refused(by: str, error: Exception) -> TrainingError:
    """Return the error of a user's argument that the library refuses."""
    what = f"is refused by transformers' {by}"
    return TrainingError("`training`", what, found=error, fix="correct it")
