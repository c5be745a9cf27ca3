"""The commands that train a pruned model back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from calib.recovery.options import METHODS, PLAN_END, RecoverOptions
from calib.streaming.settings import ComputeOptions
from surgery.cli.options import (
    Refusal,
    ShowOptions,
    compute_options,
    data_option,
    gathered,
    path_type,
    refuse_idle,
    seed_option,
    show_options,
)
from surgery.cli.terminal import print_text, running, show_written
from surgery.files.strict_json import read_json
from surgery.text.documents import TextOptions


def _training_arguments(_: click.Context, __: click.Parameter, path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_json(path)


training_text_options = gathered(
    "text",
    TextOptions,
    data_option,
    click.option(
        "--seq-len",
        default=512,
        show_default=True,
        type=click.IntRange(2),
        help="Tokens per window.",
    ),
    click.option(
        "--windows",
        default=16,
        show_default=True,
        type=click.IntRange(1),
        help="Most windows of 2,048 bytes to hold out; they choose the best state.",
    ),
    seed_option,
)


@dataclass(frozen=True)
class DryRun:
    """Whether a training is only predicted."""

    dry_run: bool


@click.command()
@click.argument("directory", metavar="DIR", type=path_type)
@training_text_options
@compute_options
@gathered(
    "options",
    RecoverOptions,
    click.option(
        "-o", "--output", type=path_type, required=True, metavar="OUT", help="Directory to write."
    ),
    click.option("--tokens", type=click.IntRange(1), help="Tokens to train on."),
    click.option("--minutes", type=float, help="Minutes to train, instead of --tokens."),
    click.option(
        "--method",
        default="distill",
        show_default=True,
        type=click.Choice(METHODS),
        help="distill: towards the dense model's distribution; continue: as pretraining; "
        "self-data: as pretraining, on text that the dense model writes first.",
    ),
    click.option(
        "--teacher",
        metavar="MODEL",
        help="The dense model, or a directory that teach wrote.  [default: the source that DIR's "
        "plan names]",
    ),
    click.option(
        "--lora",
        type=click.IntRange(1),
        metavar="RANK",
        help="Train adapters of this rank and merge them, where memory holds no optimizer.",
    ),
    click.option("--only", type=click.Choice(["ffn"]), help="Train the FFNs alone."),
    click.option(
        "--learning-rate", type=float, help="Its peak.  [default: 1e-4, of adapters 1e-3]"
    ),
    click.option(
        "--batch-size",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Windows of a step, on each device.",
    ),
    click.option("--resume", is_flag=True, help="Continue a run that was killed."),
    click.option(
        "--training-args",
        "training",
        type=path_type,
        callback=_training_arguments,
        metavar="FILE",
        help="JSON of transformers' TrainingArguments, over those that are chosen here.",
    ),
)
@gathered(
    "dry",
    DryRun,
    click.option("--dry-run", is_flag=True, help="Predict memory and time; write nothing."),
)
@show_options
def recover(
    directory: Path,
    text: TextOptions,
    compute: ComputeOptions,
    options: RecoverOptions,
    dry: DryRun,
    show: ShowOptions,
) -> None:
    """Train a pruned model back, towards its dense model; write the best state (extra 'recover').

    Some of the text is held out. The state that needs the fewest bits for it is written to OUT, a
    checkpoint like DIR. If no state is better than DIR, nothing is written. OUT.training holds the
    last checkpoint until OUT is written: a run that was killed continues with --resume.
    """
    from transformers.utils.logging import disable_progress_bar  # noqa: TID251

    from calib.recovery.run import Recovery
    from surgery.api import open_layout

    disable_progress_bar()
    if dry.dry_run:
        refuse_idle("with --dry-run", "resume", "plot")
    show.check()
    recovery = Recovery(open_layout(directory), text, compute, options)
    with running() as progress:
        if dry.dry_run:
            print_text(f"{recovery.forecast().table()}\nnothing was written")
            return
        made = recovery.run(progress)
    if show.plot is not None:
        made.plot(show.plot, str(directory))
    if show.as_json:
        click.echo(json.dumps(made.facts()))
        return
    print_text(made.table())
    if made.output is not None and made.checks is not None:
        if not made.checks.ok:
            raise Refusal(made.checks.table())
        plan = made.output.with_name(made.output.name + PLAN_END)
        then = ("score", directory, made.output, "--data", "HELDOUT")
        show_written(f"{made.output} and {plan}", *then)
