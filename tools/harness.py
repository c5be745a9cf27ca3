"""lm-evaluation-harness on a checkpoint directory as it is."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

BATCH_SIZE = 16
NOISY = ("lm_eval", "transformers", "datasets")

Results = dict[str, dict[str, Any]]
"""By task: each metric under ``metric,filter``, as the harness names it."""


def quiet() -> None:
    """Leave only errors of the harness and its libraries, and its progress."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def task_manager(include: Path | None = None) -> Any:
    """Return the harness's tasks, and those of a directory of YAML files alone where one is given.

    Raises:
        click.ClickException: the harness is not installed.
    """
    quiet()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise click.ClickException(
            f"lm-evaluation-harness is missing ({error.name}); install the extra `eval`"
        ) from error
    return TaskManager(include_path=include, include_defaults=include is None)


def evaluate(
    directory: Path, shots: Mapping[str, int], tasks: Any, limit: int | None = None
) -> Results:
    """Evaluate a checkpoint; float32 on the CPU, the checkpoint's own dtype on CUDA.

    Args:
        directory: A Hugging Face checkpoint.
        shots: Examples in the prompt by task or group.
        tasks: A task manager.
        limit: Only so many documents of each task.

    Raises:
        click.ClickException: the model cannot be loaded, or the data of a task not be had.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    if not (directory / "config.json").is_file():
        raise click.ClickException(f"{directory}: is not a checkpoint; it has no config.json")
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "float32")
    try:
        model = HFLM(str(directory), device=device, dtype=dtype, batch_size=BATCH_SIZE)
    except (OSError, ValueError, RuntimeError) as error:
        raise click.ClickException(f"{directory}: {first_line(error)}") from error
    results: Results = {}
    for number in sorted(set(shots.values())):
        names = [name for name, count in shots.items() if count == number]
        results |= run(model, names, number, tasks, limit)
    return results


def run(model: Any, names: Sequence[str], shots: int, tasks: Any, limit: int | None) -> Results:
    """Evaluate a loaded model on tasks with the same number of examples."""
    import datasets
    import lm_eval

    try:
        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise click.ClickException(
            f"the data of {', '.join(names)} cannot be had: {first_line(error)}; "
            "run this where the hub can be reached, or fill its cache there and copy it"
        ) from error
    return dict(found["results"])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
