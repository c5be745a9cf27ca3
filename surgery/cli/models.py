"""The commands that run a model, and those that work on its statistics."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calib.statistics.options import CalibrationOptions
from calib.streaming.settings import ComputeOptions
from surgery.apply.run import ApplyOptions
from surgery.cli.cut_options import cut_options, size_options, vocabulary_options
from surgery.cli.options import (
    ModelOptions,
    Refusal,
    capped_options,
    compute_options,
    engine_option,
    engines_option,
    family_option,
    force_option,
    gathered,
    json_option,
    model_options,
    number_option,
    path_type,
    prune_text_options,
    push_option,
    refuse_idle,
    score_text_options,
    tasks_option,
    text_options,
)
from surgery.cli.terminal import bars, print_text, running, show_plan, show_written, size_flags
from surgery.planning.request import CutRequest
from surgery.process import peak_rss_bytes, spoken, spoken_range, spoken_stages
from surgery.text.documents import TextOptions

if TYPE_CHECKING:
    from calib.scoring.tasks import Measured
    from surgery.layout.layout import Layout
    from surgery.planning.choice import SizeChoice
    from surgery.stats.channel_stats import ChannelStats

NO_TIME = "not estimated for models on the hub or on a cluster"


@click.command()
@model_options
@text_options
@capped_options
@gathered(
    "options",
    CalibrationOptions,
    size_options,
    click.option(
        "--vocab-sizes",
        metavar="V,V,…",
        help="Sizes V' that the statistics are exact for.  "
        "[default: that of the sizes, else those of --ratio 0.1, 0.2, 0.35 and 0.5]",
    ),
    click.option(
        "--part",
        metavar="K/N",
        help="Use every N-th window from the K-th on; stats merge adds up the parts.",
    ),
    engine_option,
    click.option(
        "--parts",
        type=click.IntRange(1),
        help="Tasks of --engine ray.  [default: one per node, or per GPU]",
    ),
    vocabulary_options,
    click.option(
        "-o",
        "--output",
        type=path_type,
        default="stats.safetensors",
        show_default=True,
        help="File that the statistics are written to.",
    ),
    click.option("--resume", is_flag=True, help="Continue an interrupted run, if there is one."),
    force_option,
)
@click.option(
    "--dry-run", is_flag=True, help="Predict time, memory, disk and bytes read; write nothing."
)
@json_option
def calibrate(
    model: ModelOptions,
    text: TextOptions,
    compute: ComputeOptions,
    options: CalibrationOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Sum squared FFN activations over text, one layer in memory at a time.

    Give it the sizes and the options of the vocabulary that plan will get. The text is then
    tokenized as the result will tokenize it, and the statistics are exact for that plan.
    OUTPUT.partial holds the results of finished layers until OUTPUT is written.
    """
    from calib.statistics.prepare import open_calibration, run_calibration
    from surgery.stats.channels import too_few_tokens

    options.check(compute)
    if dry_run:
        options = replace(options, force=True)
    layout, start = model.layout(), time.perf_counter()
    made = open_calibration(layout, text, compute, options)
    prediction = made.prediction()
    few = too_few_tokens(made.tokens) if options.part is None else None
    if dry_run:
        seconds = None if options.engine == "ray" else made.seconds()
        if as_json:
            click.echo(json.dumps({**prediction.facts(), "seconds": seconds}))
        else:
            click.echo(f"text: {len(made.windows):,} windows, {made.tokens:,} tokens")
            if few:
                print_text(f"note: {few}")
            click.echo(prediction.table())
            click.echo(f"{'time':<26}{spoken_range(seconds) if seconds else NO_TIME:>15}")
        return
    with running() as progress:
        stats = run_calibration(made, compute, options, progress)
    facts = {
        "settings": made.settings.facts(),
        "predicted": prediction.facts(),
        "measured": {**made.measured(), "seconds": time.perf_counter() - start},
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        then = ("plan", model.model, "--stats", options.output, *size_flags(options.sizes))
        took = spoken(time.perf_counter() - start)
        if few:
            print_text(f"note: {few}")
        show_written(f"{options.output}: {_counts(stats)}, {took}", *then)


def _counts(stats: "ChannelStats") -> str:
    return f"{stats.info.samples} windows, {stats.info.tokens:,} tokens"


@dataclass(frozen=True)
class ScoredModels:
    """The models that score compares."""

    models: tuple[str, ...]
    """Local directories, or hub ids; the first one is the reference."""
    family: str | None = None
    """As for ``ModelOptions``, for all of them."""


@click.command()
@gathered(
    "given",
    ScoredModels,
    click.argument("models", metavar="MODEL…", nargs=-1, required=True),
    family_option,
)
@score_text_options
@number_option("--window-bytes", default=2048, least=4, help="Bytes of text per window.")
@tasks_option
@compute_options
@json_option
def score(
    given: ScoredModels,
    text: TextOptions,
    window_bytes: int,
    tasks: tuple[Path, ...],
    compute: ComputeOptions,
    as_json: bool,
) -> None:
    """Measure bits per byte on held-out text and right answers, one layer in memory at a time.

    Several models are scored on the same windows of text and the same items, and each is compared
    with the first. A figure depends on which windows and items there happen to be. Its ± says how
    much, by a bootstrap: a smaller difference may be chance. --json prints an object for each
    model, in a list if there are several.
    """
    from calib.scoring.answers import answers_table
    from calib.scoring.score import score_table
    from calib.scoring.tasks import measure_models, read_tasks

    if not (text.data or tasks):
        raise Refusal("--data: is missing; name held-out text, or items with --tasks")
    if not text.data:
        refuse_idle("without --data", "samples", "seed", "field", "strict", "window_bytes")
    items = read_tasks(tasks)
    layouts = [ModelOptions(model, given.family).layout() for model in given.models]
    rows, start = [], time.perf_counter()
    heldout = text if text.data else None
    with running() as progress:
        found = measure_models(layouts, heldout, window_bytes, items, compute, progress)
        for model, result in zip(given.models, found, strict=True):
            rows.append((model, result, time.perf_counter() - start))
            start += rows[-1][2]
    scores = [(model, each.score, took) for model, each, took in rows if each.score]
    answers = [(model, each.answers, took) for model, each, took in rows if each.answers]
    for model, score, _ in scores:
        if score.lossy_windows:
            lost = f"{model} loses text in {score.lossy_windows} windows, so its bits are too low"
            click.echo(f"note: the tokenizer of {lost}", err=True)
    if as_json:
        facts = [_measured(model, each, rows[0][1], took) for model, each, took in rows]
        click.echo(json.dumps(facts if len(facts) > 1 else facts[0]))
    else:
        tables = [score_table(scores)] if scores else []
        tables += [answers_table(answers)] if answers else []
        click.echo("\n\n".join(tables))
    sys.exit(0 if all(score.finite for _, score, _ in scores) else 1)


def _measured(model: str, found: "Measured", first: "Measured", took: float) -> dict[str, Any]:
    """Return what was measured of a model for JSON, compared with the first where it is another."""
    facts: dict[str, Any] = {"model": model}
    if found.score is not None and first.score is not None:
        change = found.score.change_from(first.score) if found is not first else None
        facts |= {**found.score.facts(), "change": change and asdict(change)}
    if found.answers is not None:
        facts["tasks"] = found.answers.facts(first.answers if found is not first else None)
    return facts | {"seconds": took, "peak_rss_bytes": peak_rss_bytes()}


@dataclass(frozen=True)
class PruneOptions:
    """The directory that prune writes, and how."""

    output: Path | None
    """None only for a dry run."""
    resume: bool
    force: bool
    """Whether a plan and statistics that are there are replaced."""
    dry_run: bool
    engines: bool
    push_to: str | None
    report: bool
    """Whether to write a page beside the directory."""


_COMPARE = "compact-surgery compare shows what a cut of this size costs in quality\n"


def _next_command(layout: "Layout", source: str, output: Path) -> tuple[object, ...]:
    """The words of the command that measures an output."""
    if layout.predicts:
        return ("score", source, output, "--data", "HELDOUT")
    return ("verify", output, "--forward")


@click.command()
@model_options
@prune_text_options
@capped_options
@cut_options
@gathered(
    "options",
    PruneOptions,
    click.option(
        "-o", "--output", type=path_type, metavar="DIR", help="Directory to write.  [required]"
    ),
    click.option(
        "--resume", is_flag=True, help="Continue what a killed run of the same command left."
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Replace the statistics and the plan beside DIR; DIR itself is never replaced.",
    ),
    engines_option,
    click.option(
        "--dry-run",
        is_flag=True,
        help="Show the sizes and what is lost, predict time, memory and disk; write nothing.",
    ),
    push_option,
    click.option(
        "--report",
        is_flag=True,
        help="Also write DIR.report.html, a page that shows what the cut keeps and loses.",
    ),
)
def prune(
    model: ModelOptions,
    text: TextOptions,
    compute: ComputeOptions,
    cut: CutRequest,
    options: PruneOptions,
) -> None:
    """Calibrate, plan, apply and verify in one command.

    The statistics and the plan are kept beside DIR as DIR.stats.safetensors and DIR.plan.json.
    A run that was killed continues with --resume, at the layer or shard that it had reached.
    """
    from calib.pipeline import (
        PlanFiles,
        apply_and_verify,
        calibrated_plan,
        forecast_prune,
        write_page,
    )
    from calib.statistics.prepare import choose_before_calibration
    from surgery.hub.upload import push

    check_pruned(cut, options)
    output, resume = options.output or Path("pruned"), options.resume
    layout = model.layout()
    read = [layout.checkpoint.path, *text.files, *cut.vocabulary.files]
    files = PlanFiles.beside(
        output, read, resume=resume, force=options.force, report=options.report
    )
    choice = choose_before_calibration(layout, cut, text)
    check_used(choice, layout, text)
    applied = ApplyOptions(output, resume)
    if options.dry_run:
        forecast = forecast_prune(layout, choice, text, compute, files, applied)
        show_plan(forecast.plan, layout, cut.sizes)
        print_text(f"\n{forecast.table()}")
        click.echo(_COMPARE * layout.predicts + "nothing was written")
        return
    with running() as progress:
        plan, first = calibrated_plan(layout, choice, text, compute, files, progress)
    show_plan(plan, layout, cut.sizes)
    with bars() as progress:
        report, last = apply_and_verify(plan, layout, applied, progress)
    click.echo(spoken_stages({**first, **last}))
    print_text(report.table(engines=options.engines))
    if report.ok:
        write_page(plan, layout, text, files, model.model, report)
        if options.push_to:
            click.echo(push(output, options.push_to))
        also = f", {files.page}" if files.page else ""
        then = _next_command(layout, model.model, output)
        show_written(f"{output}{also} and {files.plan}", *then)
    sys.exit(0 if report.ok else 1)


def check_pruned(cut: CutRequest, options: PruneOptions) -> None:
    """Refuse options of ``prune`` that do not work together, before the model is opened."""
    from surgery.hub.upload import check_push

    if options.dry_run:
        refuse_idle("with --dry-run", "resume", "push_to", "report")
    if options.push_to:
        check_push(options.push_to)
    if not cut.sizes.removes_experts:
        refuse_idle("where no experts are removed", "expert_criterion")
    if options.output is None and not options.dry_run:
        raise Refusal("--output: is missing; name the directory to write, such as -o smaller")


def check_used(choice: "SizeChoice", layout: "Layout", text: TextOptions) -> None:
    """Refuse options of a text, or of a pass over it, where ``choice`` needs none."""
    sizes, channels = choice.request.sizes, choice.request.channels
    calibrates = choice.needs_statistics(layout) or channels.repair != "none"
    if not calibrates and not sizes.by_rule:
        why = "where nothing is chosen by a text's activations"
        refuse_idle(why, "samples", "seq_len", "device", "dtype")
        refuse_idle(why, "max_memory", "max_gpu_memory", "spill", "min_expert_tokens")
    if not text.data:
        refuse_idle("without --data", "field", "strict", "seed")


@click.group()
def stats() -> None:
    """Work on files of statistics."""


@stats.command()
@click.argument("paths", metavar="STATS…", nargs=-1, required=True, type=path_type)
@click.option(
    "-o", "--output", type=path_type, required=True, metavar="FILE", help="File to write."
)
@force_option
def merge(paths: tuple[Path, ...], output: Path, force: bool) -> None:
    """Add up the statistics of separate runs over parts of a text, or over several texts."""
    from surgery.files.atomic import check_file
    from surgery.stats.merge import merge_stats

    check_file(output, paths, force=force)
    merged = merge_stats(paths)
    merged.save(output)
    then = ("plan", "MODEL", "--stats", output, "--ratio", "0.2")
    show_written(f"{output}: {_counts(merged)}", *then)
