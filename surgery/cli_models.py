"""The commands that run a model: calibrate, score, prune."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.apply import JOBS
from surgery.options import (
    ChannelOptions,
    CutOptions,
    DivisionOptions,
    Refusal,
    VocabularyOptions,
    calibration_options,
    channel_options,
    compute_options,
    cut_options,
    data_option,
    division_options,
    family_option,
    json_option,
    model_argument,
    path_type,
    push_option,
    samples_option,
    seed_option,
    vocabulary_options,
)
from surgery.resources import Resources, Running, resource_options
from surgery.size_options import Target, size_options

if TYPE_CHECKING:
    from surgery.part import Division


@click.command()
@model_argument
@family_option
@calibration_options
@cut_options
@division_options
@vocabulary_options
@click.option("-o", "output", type=path_type, default="stats.safetensors", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, if any.")
@resource_options
@click.option("--dry-run", is_flag=True, help="Show what the run would take, and end.")
@json_option
def calibrate(
    model: str,
    family: str | None,
    cut: CutOptions,
    spread: DivisionOptions,
    output: Path,
    vocabulary: VocabularyOptions,
    resume: bool,
    resources: Resources,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Sum squared FFN activations over text, one layer in memory at a time.

    What each finished layer leaves lies in OUTPUT.partial until OUTPUT is written. The statistics
    are exact for a plan with the same options of the vocabulary.
    """
    from calib.documents import read_documents
    from surgery.choices import parse_vocab_sizes, rarity_or_whole
    from surgery.steps import open_model, prepare_calibration, take_on_ray, take_statistics
    from surgery.text_vocabulary import TextVocabulary
    from surgery.writer import check_file

    if spread.engine == "ray" and resources != Resources():
        raise Refusal("--max-memory, --max-gpu-memory and --spill are for --engine local")
    place = output.absolute().parent
    division = _division(spread, place, resume)
    layout, _ = open_model(model, family)
    check_file(output, layout.checkpoint.path)
    exact = parse_vocab_sizes(cut.vocab_sizes, layout) if cut.vocab_sizes else ()
    rarity = rarity_or_whole(layout, vocabulary, read_documents(options["data"]))
    start = time.perf_counter()
    local = division.engine == "local"
    running = Running(output if local else None, resume, resources, division)
    of_text = TextVocabulary(rarity, cut.vocab_size, exact)
    made = prepare_calibration(layout, of_text, running=running, **options)
    if dry_run:
        click.echo(json.dumps(made.prediction.facts()) if as_json else made.prediction.table())
        return
    if local:
        stats = take_statistics(made)
    else:
        stats = take_on_ray(made, division, options["device"], options["dtype"])
        stats.save(output)
    text = f"{output}: {stats.info.samples} windows, {stats.info.tokens:,} tokens"
    click.echo(json.dumps(made.measured(start)) if as_json else text)


def _division(spread: DivisionOptions, place: Path, resume: bool) -> "Division":
    from surgery.part import Division, Part

    if spread.parts and spread.engine != "ray":
        raise Refusal("--parts is for --engine ray; use --part K/N to take a part here")
    if resume and spread.engine == "ray":
        raise Refusal("--resume is for --engine local; with ray, tasks of lost nodes begin anew")
    part = Part.parse(spread.part) if spread.part else None
    return Division(part, spread.engine, spread.parts, place)


@click.command()
@model_argument
@family_option
@data_option
@samples_option
@click.option(
    "--window-bytes",
    default=2048,
    show_default=True,
    type=click.IntRange(4),
    help="Bytes of text per window.",
)
@seed_option
@compute_options
@json_option
def score(model: str, family: str | None, as_json: bool, **options: Any) -> None:
    """Measure bits per byte on held-out text, one layer in memory at a time."""
    from surgery.process import peak_rss_bytes
    from surgery.steps import open_model, score_model

    start = time.perf_counter()
    result = score_model(open_model(model, family)[0], **options)
    facts = {
        "bits_per_byte": result.bits_per_byte,
        "bytes": result.bytes,
        "tokens": result.tokens,
        "windows": result.windows,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    table = (
        "{bits_per_byte:.4f} bits per byte ({windows} windows, {bytes:,} bytes, {tokens:,} tokens)"
    )
    click.echo(json.dumps(facts) if as_json else table.format(**facts))
    if result.lossy_windows:
        click.echo(f"note: the tokenizer drops text in {result.lossy_windows} windows", err=True)
    sys.exit(0 if result.finite else 1)


@click.command()
@model_argument
@family_option
@calibration_options
@size_options
@vocabulary_options
@channel_options
@click.option("-o", "output", type=path_type, metavar="DIR", required=True)
@push_option
def prune(
    model: str,
    family: str | None,
    target: Target,
    vocabulary: VocabularyOptions,
    channels: ChannelOptions,
    output: Path,
    push_to: str | None,
    **options: Any,
) -> None:
    """Calibrate, plan, apply and verify in one command.

    The statistics and the plan stay beside DIR as DIR.stats.safetensors and DIR.plan.json.
    """
    from calib.documents import read_documents
    from surgery.choices import choose_sizes
    from surgery.preview import RULE, plan_table
    from surgery.push import check_push, push
    from surgery.steps import open_model, run_apply
    from surgery.studies import calibrated_plan
    from surgery.verify import verify_files
    from surgery.writer import check_file, check_place

    if push_to:
        check_push(push_to)
    layout, source = open_model(model, family)
    path = layout.checkpoint.path
    check_place(output, path)
    plan_path = output.with_name(output.name + ".plan.json")
    if output.absolute().parent.is_dir():  # else it is made
        check_file(plan_path, path)
    chosen = choose_sizes(layout, target, vocabulary, read_documents(options["data"]))
    made = calibrated_plan(
        layout,
        source,
        chosen,
        plan_path,
        channels=channels,
        ratio=target.ratio,
        vocab_by=vocabulary.vocab_by,
        output=output,
        stats_path=output.with_name(output.name + ".stats.safetensors"),
        **options,
    )
    click.echo(plan_table(made, path))
    if target.ratio is not None:
        click.echo(f"note: {RULE}")
    run_apply(made, path, output, resume=False, jobs=JOBS)
    report = verify_files(output, made, path, download=False)
    click.echo(report.table())
    if push_to and report.ok:
        click.echo(push(output, push_to))
    sys.exit(0 if report.ok else 1)
