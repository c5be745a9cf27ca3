"""The commands that train a pruned model back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from calib.recovery.options import (
    METHODS,
    PLAN_END,
    RecoverOptions,
    TeachOptions,
    TrainingError,
)
from calib.streaming.settings import ComputeOptions
from surgery.cli.options import (
    ModelOptions,
    Refusal,
    ShowOptions,
    capped_options,
    choice_option,
    compute_options,
    data_options,
    gathered,
    json_option,
    model_options,
    number_option,
    path_type,
    refuse_idle,
    seed_option,
    show_options,
)
from surgery.cli.terminal import print_text, running, show_written
from surgery.errors import CheckpointError, did_you_mean
from surgery.files.strict_json import parse_json, read_file
from surgery.process import spoken
from surgery.text.documents import TextOptions

TRAINING_FILE = "compact_surgery.training_file"
"""Key of a command's context for the file of --training-args."""


def _training_arguments(
    context: click.Context, _: click.Parameter, path: Path | None
) -> dict[str, Any]:
    """Return the arguments in a file; of no file, none.

    Raises:
        TrainingError: it cannot be read, or holds no JSON object.
    """
    context.meta[TRAINING_FILE] = path
    if path is None:
        return {}
    try:
        return parse_json(read_file(path), path)
    except OSError as error:
        raise TrainingError(
            path,
            "cannot be read" if path.exists() else "does not exist",
            found=error.strerror if path.exists() else None,
            fix=f"{did_you_mean(path)}name a JSON file of transformers' TrainingArguments",
        ) from error
    except CheckpointError as error:
        raise TrainingError(
            path, error.problem, expected=error.expected, found=error.found, fix="correct it"
        ) from error


training_text_options = gathered(
    "text",
    TextOptions,
    data_options(required=False),
    number_option("--seq-len", default=512, least=2, help="Tokens per window."),
    number_option(
        "--windows",
        default=16,
        help="Most windows of 2,048 bytes to hold out; they choose the best state.",
    ),
    seed_option,
)


resume_option = click.option("--resume", is_flag=True, help="Continue a run that was killed.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Predict what it takes; write nothing."
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
    choice_option(
        "--method",
        of=METHODS,
        default="distill",
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
    number_option("--batch-size", default=1, help="Windows of a step, on each device."),
    resume_option,
    click.option(
        "--training-args",
        "training",
        type=path_type,
        callback=_training_arguments,
        metavar="FILE",
        help="JSON of transformers' TrainingArguments, over those that are chosen here.",
    ),
)
@gathered("dry", DryRun, dry_run_option)
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
    from transformers.utils.logging import (  # noqa: TID251
        disable_progress_bar,
        set_verbosity_error,
    )

    from calib.recovery.run import Recovery
    from surgery.api import open_layout

    disable_progress_bar()
    set_verbosity_error()
    if dry.dry_run:
        refuse_idle("with --dry-run", "resume", "plot", "as_json")
    if show.plot is None:
        refuse_idle("without --plot", "force")
    if not text.data:
        refuse_idle("with the files of a teacher", "seq_len", "windows", "field", "strict")
    given = click.get_current_context().meta[TRAINING_FILE]
    show.check(directory, options.teacher, given, *text.files)
    recovery = Recovery(open_layout(directory), text, compute, options)
    with running() as progress:
        if dry.dry_run:
            print_text(f"{recovery.forecast().table()}\nnothing was written")
            return
        made = recovery.run(progress)
    if not recovery.is_main_process:
        return
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


@dataclass(frozen=True)
class TeachRun:
    """Whose vocabulary a teacher's files count, and how the command answers."""

    plans: tuple[Path, ...]
    dry_run: bool
    as_json: bool


@click.command()
@model_options
@training_text_options
@capped_options
@gathered(
    "options",
    TeachOptions,
    click.option(
        "-o",
        "--output",
        "outputs",
        multiple=True,
        type=path_type,
        required=True,
        metavar="DIR",
        help="Directory to write; one for each --plan, in their order.",
    ),
    click.option("--tokens", type=click.IntRange(1), required=True, help="Tokens of text."),
    number_option("--top-k", default=64, help="Likeliest kept tokens of each position."),
    choice_option(
        "--precision",
        of=("float16", "float32"),
        default="float16",
        help="Of the log-probabilities.",
    ),
    resume_option,
)
@gathered(
    "asked",
    TeachRun,
    click.option(
        "--plan",
        "plans",
        multiple=True,
        type=path_type,
        required=True,
        metavar="PLAN",
        help="The plan whose vocabulary counts, or a directory that it made; several times for "
        "several vocabularies in one pass.",
    ),
    dry_run_option,
    json_option,
)
def teach(
    model: ModelOptions,
    text: TextOptions,
    compute: ComputeOptions,
    options: TeachOptions,
    asked: TeachRun,
) -> None:
    """Write what a dense model predicts, one layer in memory at a time (extra 'recover').

    For each position of the text, as the pruned model will tokenize it, the likeliest kept tokens
    are written with their log-probabilities, and what is left over. Then recover --teacher DIR
    needs no dense model.
    """
    from calib.recovery.teach import Teaching
    from surgery.verify.files import plan_at

    if asked.dry_run:
        refuse_idle("with --dry-run", "resume", "as_json")
    if not text.data:
        raise Refusal("--data: is missing; name the text")
    made = Teaching(model.layout(), [*map(plan_at, asked.plans)], text, compute, options)
    if asked.dry_run:
        click.echo(f"{made.prediction().table()}\nfiles: {made.nbytes / 1e6:,.0f} MB")
        click.echo("nothing was written")
        return
    with running() as progress:
        taught = made.run(progress)
    if asked.as_json:
        click.echo(json.dumps(taught.facts()))
        return
    outputs = " and ".join(map(str, taught.outputs))
    what = f"{outputs}: {taught.tokens:,} tokens, {taught.nbytes / 1e6:,.1f} MB, "
    first, tokens = taught.outputs[0], taught.tokens // len(taught.outputs)
    then = ("recover", "PRUNED", "--teacher", first, "-o", "OUT", "--tokens", tokens)
    show_written(what + spoken(taught.seconds), *then)
