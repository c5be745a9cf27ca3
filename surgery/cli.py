"""The command line: a command parses, calls one library function, prints."""

import json
import resource
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from surgery import __version__
from surgery.apply import JOBS
from surgery.errors import SurgeryError
from surgery.options import (
    Target,
    VocabularyOptions,
    compute_options,
    criterion_option,
    data_option,
    device_option,
    json_option,
    model_argument,
    path_type,
    samples_option,
    seed_option,
    seq_len_option,
    size_options,
    vocabulary_options,
)


class Refusal(click.ClickException):
    """Bad usage or bad input: one line on stderr."""

    exit_code = 2


class Commands(click.Group):
    """Turns errors of ours and of the file system into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            raise Refusal(str(error)) from error
        except OSError as error:
            raise Refusal(f"{error.filename or 'input or output'}: {error.strerror}") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Make a published LLM checkpoint smaller without ever loading the model.

    MODEL is a local directory or a hub id org/name[@revision].
    """


@main.command()
@model_argument
@json_option
@click.option("--vocab", is_flag=True, help="Show what the vocabulary's rows are spent on instead.")
@click.option("--plot", type=path_type, metavar="FILE.png", help="Write a picture (extra 'plot').")
def inspect(model: str, as_json: bool, vocab: bool, plot: Path | None) -> None:
    """Show where the parameters are; reads headers only."""
    from surgery.census import Census, plot_census
    from surgery.steps import open_model
    from surgery.vocab_census import plot_vocab_census, vocabulary_census

    layout = open_model(model)[0]
    if vocab:
        tokens = vocabulary_census(layout)
        click.echo(json.dumps(asdict(tokens)) if as_json else tokens.table())
        if plot is not None:
            plot_vocab_census(tokens, plot)
        return
    census = Census.of(layout, model)
    click.echo(json.dumps(asdict(census)) if as_json else census.table())
    if plot is not None:
        plot_census(census, plot)


@main.command()
@model_argument
@data_option
@samples_option
@seq_len_option
@seed_option
@compute_options
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

    layout, _ = open_model(model)
    if not output.absolute().parent.is_dir():  # known before the work, not after it
        raise Refusal(f"{output}: its directory does not exist; create it, or name another")
    sizes = parse_vocab_sizes(vocab_sizes, layout) if vocab_sizes else None
    rarity = rarity_or_whole(layout, vocabulary, read_documents(options["data"]))
    stats = calibrate_model(layout, sizes, rarity=rarity, **options)
    stats.save(output)
    click.echo(f"{output}: {stats.info.samples} windows, {stats.info.tokens:,} tokens")


@main.command()
@model_argument
@click.option("--stats", type=path_type, help="From calibrate.")
@size_options
@vocabulary_options
@click.option(
    "--data",
    metavar="TEXT",
    help="To show what the cut of the vocabulary costs, and to count tokens in; as for calibrate.",
)
@criterion_option
@click.option("--output", type=path_type, metavar="DIR", help="Where apply is to write.")
@click.option("-o", "plan_path", type=path_type, default="plan.json", show_default=True)
def plan(
    model: str,
    stats: Path | None,
    target: Target,
    vocabulary: VocabularyOptions,
    data: str | None,
    criterion: str,
    output: Path | None,
    plan_path: Path,
) -> None:
    """Choose what to cut and predict the result; no weights are read."""
    from calib.documents import read_documents
    from surgery.choices import choose_sizes
    from surgery.stats import ChannelStats
    from surgery.steps import open_model, plan_model

    layout, source = open_model(model)
    loaded = ChannelStats.load(stats) if stats else None
    chosen = choose_sizes(layout, target, vocabulary, read_documents(data) if data else None)
    made = plan_model(
        layout,
        source,
        chosen,
        loaded,
        criterion=criterion,
        ratio=target.ratio,
        output=output,
        vocab_by=vocabulary.vocab_by,
        documents=read_documents(data) if data else (),
    )
    made.save(plan_path)
    _show_plan(made, layout.checkpoint.path)


@main.command()
@click.argument("plan_path", metavar="PLAN", type=path_type)
@click.option("-o", "output", type=path_type, metavar="DIR", help="Instead of the plan's.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same plan.")
@click.option(
    "--jobs", default=JOBS, show_default=True, type=click.IntRange(1), help="Shards at a time."
)
def apply(plan_path: Path, output: Path | None, resume: bool, jobs: int) -> None:
    """Stream a plan's source into a new checkpoint directory."""
    from surgery.plan import Plan
    from surgery.source import resolve_model
    from surgery.steps import run_apply

    loaded = Plan.load(plan_path)
    place = output or (Path(loaded.output) if loaded.output else None)
    if place is None:
        raise Refusal(f"{plan_path}: names no output; give -o DIR")
    source, _ = resolve_model(loaded.source)
    run_apply(loaded, source, place, resume=resume, jobs=jobs)
    click.echo(f"{place}: {loaded.after.parameters:,} parameters, {loaded.after.nbytes:,} bytes")


@main.command()
@click.argument("directory", metavar="DIR", type=path_type)
@click.option(
    "--plan", "plan_path", type=path_type, help="Instead of the one in DIR/compact_surgery.json."
)
@click.option("--forward", is_flag=True, help="Compare logits with the masked dense model, too.")
@device_option
def verify(directory: Path, plan_path: Path | None, forward: bool, device: str) -> None:
    """Check an output against its plan and its source; exit status 1 on a fault."""
    from surgery.plan import Plan
    from surgery.source import local_source
    from surgery.steps import forward_faults
    from surgery.verify import embedded_plan, verify_files

    loaded = Plan.load(plan_path) if plan_path else embedded_plan(directory)
    source = local_source(loaded.source) if loaded else None
    if forward and (loaded is None or source is None):
        raise Refusal(f"{directory}: --forward needs the plan and its source; neither may be gone")
    report = verify_files(directory, loaded, source)
    if forward and report.ok and loaded and source:
        faults = forward_faults(loaded, source, directory, device)
        report.checks["logits equal the masked dense model's"] = faults
    click.echo(report.table())
    sys.exit(0 if report.ok else 1)


@main.command()
@model_argument
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
def score(model: str, as_json: bool, **options: Any) -> None:
    """Measure bits per byte on held-out text, one layer in memory at a time."""
    from surgery.steps import open_model, score_model

    start = time.perf_counter()
    result = score_model(open_model(model)[0], **options)
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


@main.command()
@model_argument
@data_option
@samples_option
@seq_len_option
@seed_option
@compute_options
@size_options
@vocabulary_options
@criterion_option
@click.option("-o", "output", type=path_type, metavar="DIR", required=True)
def prune(
    model: str,
    target: Target,
    vocabulary: VocabularyOptions,
    criterion: str,
    output: Path,
    **options: Any,
) -> None:
    """Calibrate, plan, apply and verify in one command.

    The statistics and the plan stay beside DIR as DIR.stats.safetensors and DIR.plan.json.
    """
    from calib.documents import read_documents
    from surgery.choices import choose_sizes
    from surgery.steps import calibrate_model, open_model, plan_model, run_apply
    from surgery.verify import verify_files
    from surgery.writer import check_place

    layout, source = open_model(model)
    path = layout.checkpoint.path
    check_place(output, path)
    chosen = choose_sizes(layout, target, vocabulary, read_documents(options["data"]))
    planned = partial(
        plan_model,
        layout,
        source,
        chosen,
        criterion=criterion,
        ratio=target.ratio,
        output=output,
        vocab_by=vocabulary.vocab_by,
    )
    planned(None)  # refuses before the work
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    sizes = [chosen.sizes.vocab_size]
    stats = calibrate_model(layout, sizes, rarity=chosen.rarity, **options)
    stats.save(output.with_name(output.name + ".stats.safetensors"))
    made = planned(stats, documents=read_documents(options["data"]))
    made.save(output.with_name(output.name + ".plan.json"))
    _show_plan(made, path)
    run_apply(made, path, output, resume=False, jobs=JOBS)
    report = verify_files(output, made, path)
    click.echo(report.table())
    sys.exit(0 if report.ok else 1)


def _show_plan(plan: Any, directory: Path) -> None:
    from surgery.companions import left_behind
    from surgery.preview import plan_table

    click.echo(plan_table(plan, left_behind(directory, plan.ids())))
