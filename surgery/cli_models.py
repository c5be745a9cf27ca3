"""The commands that run a model: calibrate, score, prune."""

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from surgery.apply import JOBS
from surgery.options import (
    ChannelOptions,
    Refusal,
    Target,
    VocabularyOptions,
    calibration_options,
    channel_options,
    compute_options,
    data_option,
    family_option,
    json_option,
    model_argument,
    path_type,
    push_option,
    samples_option,
    seed_option,
    size_options,
    vocabulary_options,
)


@click.command()
@model_argument
@family_option
@calibration_options
@click.option(
    "--vocab-sizes",
    metavar="V,V,…",
    help="Sizes V' for which the statistics are to be exact; "
    "else those of --ratio 0.1, 0.2, 0.35 and 0.5.",
)
@vocabulary_options
@click.option("-o", "output", type=path_type, default="stats.safetensors", show_default=True)
def calibrate(
    model: str,
    family: str | None,
    vocab_sizes: str | None,
    output: Path,
    vocabulary: VocabularyOptions,
    **options: Any,
) -> None:
    """Sum squared FFN activations over text, one layer in memory at a time.

    The statistics are exact for a plan with the same options of the vocabulary.
    """
    from calib.documents import read_documents
    from surgery.choices import parse_vocab_sizes, rarity_or_whole
    from surgery.steps import calibrate_model, open_model

    layout, _ = open_model(model, family)
    if not output.absolute().parent.is_dir():  # known before the work, not after it
        raise Refusal(f"{output}: its directory does not exist; create it, or name another")
    sizes = parse_vocab_sizes(vocab_sizes, layout) if vocab_sizes else None
    rarity = rarity_or_whole(layout, vocabulary, read_documents(options["data"]))
    stats = calibrate_model(layout, sizes, rarity=rarity, **options)
    stats.save(output)
    click.echo(f"{output}: {stats.info.samples} windows, {stats.info.tokens:,} tokens")


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
    from surgery.steps import open_model, score_model

    start = time.perf_counter()
    result = score_model(open_model(model, family)[0], **options)
    facts = {
        "bits_per_byte": result.bits_per_byte,
        "bytes": result.bytes,
        "tokens": result.tokens,
        "windows": result.windows,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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
    from surgery.preview import plan_table
    from surgery.push import check_push, push
    from surgery.steps import calibrate_model, open_model, plan_model, run_apply
    from surgery.verify import verify_files
    from surgery.writer import check_place

    if push_to:
        check_push(push_to)
    layout, source = open_model(model, family)
    path = layout.checkpoint.path
    check_place(output, path)
    chosen = choose_sizes(layout, target, vocabulary, read_documents(options["data"]))
    planned = partial(
        plan_model,
        layout,
        source,
        chosen,
        channels=channels,
        ratio=target.ratio,
        output=output,
        vocab_by=vocabulary.vocab_by,
    )
    planned(None)  # refuses before the work
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    sizes = [chosen.sizes.vocab_size]
    stats = None
    if layout.widths:
        stats = calibrate_model(layout, sizes, rarity=chosen.rarity, **options)
        stats.save(output.with_name(output.name + ".stats.safetensors"))
    made = planned(stats, documents=read_documents(options["data"]))
    made.save(output.with_name(output.name + ".plan.json"))
    click.echo(plan_table(made, path))
    run_apply(made, path, output, resume=False, jobs=JOBS)
    report = verify_files(output, made, path, download=False)
    click.echo(report.table())
    if push_to and report.ok:
        click.echo(push(output, push_to))
    sys.exit(0 if report.ok else 1)
