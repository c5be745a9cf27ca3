"""The command line: a command parses, calls one library function, prints."""

import errno
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from surgery import __version__
from surgery.apply import JOBS
from surgery.cli_models import calibrate, prune, score
from surgery.cli_search import compare, search
from surgery.cli_stats import stats
from surgery.errors import SurgeryError, is_panic, printable, shortened
from surgery.options import (
    ChannelOptions,
    Refusal,
    VocabularyOptions,
    channel_options,
    compute_options,
    device_option,
    engine_option,
    family_option,
    json_option,
    model_argument,
    path_type,
    push_option,
    seed_option,
    spill_option,
    vocabulary_options,
)
from surgery.size_options import Target, size_options

FIXES = {
    errno.ENOSPC: "; free space, or name another place",
    errno.EDQUOT: "; free space, or name another place",
    errno.EROFS: "; name another place",
    errno.EACCES: "; change its permissions, or name another place",
    errno.ENOENT: "; check the name, and make its directory",
}
"""What to do about an error of the file system."""


class Commands(click.Group):
    """Turns errors of ours and of the file system into one line and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
                # A console of Windows may lack a character: then it shows the number.
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            raise Refusal(str(error)) from error
        except OSError as error:
            reason = f"{error.filename or 'input or output'}: {error.strerror or error}"
            fix = FIXES.get(error.errno or 0, "")
            raise Refusal(printable(reason + fix)) from error
        except UnicodeEncodeError as error:
            reason = f"{shortened(ascii(error.object))}: is no UTF-8, so no file can tell of it"
            raise Refusal(f"{reason}; rename it") from error
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = f"tokenizer.json: the tokenizers library gave up on it: {error}"
            raise Refusal(printable(f"{reason}; download the file again")) from error


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
@click.option("--probe", is_flag=True, help="Show which families fit, and propose an entry.")
@click.option("--plot", type=path_type, metavar="FILE.png", help="Write a picture (extra 'plot').")
@family_option
def inspect(
    model: str, as_json: bool, vocab: bool, probe: bool, plot: Path | None, family: str | None
) -> None:
    """Show where the parameters are; reads headers only."""
    from surgery.census import Census, plot_census
    from surgery.steps import open_model, probe_model
    from surgery.vocab_census import plot_vocab_census, vocabulary_census

    if probe:
        proposal = probe_model(model)
        click.echo(json.dumps(asdict(proposal)) if as_json else proposal.table())
        return
    layout = open_model(model, family)[0]
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
@family_option
@click.option("--stats", type=path_type, help="From calibrate.")
@size_options
@vocabulary_options
@click.option(
    "--data",
    metavar="TEXT",
    help="To show what the cut of the vocabulary costs, and to count tokens in; as for calibrate.",
)
@channel_options
@seed_option
@compute_options
@spill_option
@click.option("--output", type=path_type, metavar="DIR", help="Where apply is to write.")
@click.option("-o", "plan_path", type=path_type, default="plan.json", show_default=True)
def plan(
    model: str,
    family: str | None,
    stats: Path | None,
    target: Target,
    vocabulary: VocabularyOptions,
    data: str | None,
    channels: ChannelOptions,
    output: Path | None,
    plan_path: Path,
    **compute: Any,
) -> None:
    """Choose what to cut and predict the result; no weights are read, but with --repair.

    --repair runs the model on --data, in windows as those of the statistics; --seed, --device,
    --dtype and --spill are for it.
    """
    from calib.documents import read_documents
    from surgery.apply_cost import apply_cost
    from surgery.choices import choose_sizes
    from surgery.preview import RULE, plan_table
    from surgery.stats import ChannelStats
    from surgery.steps import open_model, plan_model
    from surgery.studies import repair_plan
    from surgery.writer import check_file

    layout, source = open_model(model, family)
    check_file(plan_path, layout.checkpoint.path)
    loaded = ChannelStats.load(stats) if stats else None
    chosen = choose_sizes(
        layout,
        target,
        vocabulary,
        read_documents(data) if data else None,
        loaded.block_influence if loaded else None,
    )
    made = plan_model(
        layout,
        source,
        chosen,
        loaded,
        channels=channels,
        ratio=target.ratio,
        output=output,
        vocab_by=vocabulary.vocab_by,
        documents=read_documents(data) if data else (),
    )
    if channels.repair != "none":
        if loaded is None or data is None:
            raise Refusal("--repair needs --stats and --data: the channels that stay, and a text")
        text = {"samples": loaded.info.samples, "seq_len": loaded.info.seq_len, **compute}
        made = repair_plan(made, plan_path, layout, chosen, data=data, **text)
    made.save(plan_path)
    click.echo(plan_table(made, layout.checkpoint.path))
    if target.ratio is not None:
        click.echo(f"note: {RULE}")
    if made.complete:
        click.echo(apply_cost(made, layout, JOBS).line())


@main.command()
@click.argument("plan_path", metavar="PLAN", type=path_type)
@click.option("-o", "output", type=path_type, metavar="DIR", help="Instead of the plan's.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same plan.")
@click.option(
    "--jobs", default=JOBS, show_default=True, type=click.IntRange(1), help="Shards at a time."
)
@engine_option
@click.option(
    "--checksum",
    is_flag=True,
    help="Compare each shard with its SHA-256, from SHA256SUMS beside it or from the hub, first.",
)
@push_option
@json_option
def apply(
    plan_path: Path,
    output: Path | None,
    resume: bool,
    jobs: int,
    engine: str,
    checksum: bool,
    push_to: str | None,
    as_json: bool,
) -> None:
    """Stream a plan's source into a new checkpoint directory."""
    from surgery.plan import Plan
    from surgery.push import check_push, push
    from surgery.source import resolve_model
    from surgery.steps import run_apply

    loaded = Plan.load(plan_path)
    place = output or (Path(loaded.output) if loaded.output else None)
    if place is None:
        raise Refusal(f"{plan_path}: names no output; give -o DIR")
    if push_to:
        check_push(push_to)
    source, _ = resolve_model(loaded.source)
    took = run_apply(
        loaded, source, place, resume=resume, jobs=jobs, engine=engine, checksum=checksum
    )
    sizes = {"parameters": loaded.after.parameters, "nbytes": loaded.after.nbytes}
    text = f"{place}: {loaded.after.parameters:,} parameters, {loaded.after.nbytes:,} bytes"
    if push_to:
        text += f"\n{push(place, push_to)}"
    click.echo(json.dumps({"output": str(place), **sizes, **took}) if as_json else text)


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
    from surgery.source import source_at_hand
    from surgery.steps import forward_faults
    from surgery.verify import embedded_plan, verify_files

    loaded = Plan.load(plan_path) if plan_path else embedded_plan(directory)
    source = source_at_hand(loaded.source) if loaded else None
    if forward and (loaded is None or source is None):
        raise Refusal(f"{directory}: --forward needs the plan and its source; neither may be gone")
    report = verify_files(directory, loaded, source)
    if forward and report.ok and loaded and source:
        faults = forward_faults(loaded, source, directory, device)
        report.checks["logits equal the masked dense model's"] = faults
    click.echo(report.table())
    sys.exit(0 if report.ok else 1)


for command in (calibrate, score, prune, search, compare, stats):
    main.add_command(command)
