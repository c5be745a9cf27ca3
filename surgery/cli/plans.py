"""The commands that make a plan and work with one: plan, apply, verify, and export."""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calib.streaming.settings import ComputeOptions
from surgery.apply.run import JOBS, ApplyOptions
from surgery.cli.cut_options import cut_options
from surgery.cli.inspection import add_logits
from surgery.cli.options import (
    ModelOptions,
    Refusal,
    device_option,
    engine_option,
    engines_option,
    force_option,
    gathered,
    json_option,
    model_options,
    number_option,
    path_type,
    plan_text_options,
    push_option,
    refuse_idle,
    spilling_options,
)
from surgery.cli.terminal import (
    bars,
    print_text,
    running,
    show_engines,
    show_plan,
    show_written,
    size_flags,
)
from surgery.export.gguf_file import ExportOptions
from surgery.export.tensors import TYPES
from surgery.planning.request import CutRequest
from surgery.process import spoken
from surgery.stats.channels import RANDOM, RECONSTRUCT
from surgery.text.documents import TextOptions

if TYPE_CHECKING:
    from surgery.layout.layout import Layout
    from surgery.planning.choice import SizeChoice
    from surgery.planning.plan import Plan


@dataclass(frozen=True)
class PlanSources:
    """The statistics that a plan is made from, and the paths it names and is written to."""

    stats: Path | None
    to: Path | None
    output: Path
    force: bool
    engines: bool


@click.command()
@model_options
@cut_options
@plan_text_options
@spilling_options
@gathered(
    "given",
    PlanSources,
    click.option("--stats", type=path_type, help="From calibrate."),
    click.option("--to", type=path_type, metavar="DIR", help="Directory that apply is to write."),
    click.option(
        "-o",
        "--output",
        type=path_type,
        default="plan.json",
        show_default=True,
        help="File that the plan is written to.",
    ),
    force_option,
    engines_option,
)
def plan(
    model: ModelOptions,
    cut: CutRequest,
    text: TextOptions,
    compute: ComputeOptions,
    given: PlanSources,
) -> None:
    """Choose what to remove and predict the result; only --repair and aimer read weights.

    --repair runs the model on --data, in windows like those of the statistics. --seed, --device,
    --dtype and --spill are its options.
    """
    from calib.text.chat import documents_of
    from surgery.api import plan_choice
    from surgery.apply.cost import apply_cost
    from surgery.files.atomic import check_file
    from surgery.planning.choice import choose_sizes
    from surgery.planning.replacement import replacement_file
    from surgery.stats.channel_stats import ChannelStats

    check_planned(cut, text, given)
    layout = model.layout()
    read = [layout.checkpoint.path, *text.files, *cut.vocabulary.files]
    read += [given.stats] if given.stats else []
    for path in (given.output, replacement_file(given.output)):
        check_file(path, read, force=given.force)
    stats = ChannelStats.load(given.stats) if given.stats else None
    documents = partial(documents_of, layout, text) if text.data else None
    influence = stats.block_influence if stats else None
    choice = choose_sizes(layout, cut, documents() if documents else None, influence)
    shown = documents() if documents else ()
    made = plan_choice(layout, choice, stats, documents=shown, output=given.to)
    if cut.channels.repair != "none":
        if stats is None or documents is None:
            raise Refusal(
                "--repair needs --stats and --data, to choose the channels and to refit on"
            )
        text = replace(text, samples=stats.info.samples, seq_len=stats.info.seq_len)
        made = repaired(made, layout, choice, text, compute, given.output)
    made.save(given.output)
    show_plan(made, layout, cut.sizes)
    show_engines(made, layout, every=given.engines)
    if made.complete:
        click.echo(apply_cost(made, layout, JOBS).line())
        there = () if given.to else ("-o", "DIR")
        show_written(str(given.output), "apply", given.output, *there)
    else:
        then = ("calibrate", model.model, "--data", "TEXT", *size_flags(cut.sizes))
        show_written(f"{given.output}, sizes only", *then)


def check_planned(cut: CutRequest, text: TextOptions, given: PlanSources) -> None:
    """Refuse options of ``plan`` that it would not look at."""
    if not text.data:
        refuse_idle("without --data", "field", "strict", "seed")
    if cut.channels.repair == "none":
        refuse_idle("without --repair", "device", "dtype", "spill")
    if given.stats is None:
        refuse_idle("without --stats", "min_expert_tokens")
        if cut.channels.criterion != RANDOM:
            refuse_idle("without --stats", "criterion")
    if not cut.sizes.removes_experts:
        refuse_idle("where no experts are removed", "expert_criterion")


def repaired(
    made: "Plan",
    layout: "Layout",
    choice: "SizeChoice",
    text: TextOptions,
    compute: ComputeOptions,
    output: Path,
) -> "Plan":
    """Return a plan with refitted weights, which stand in a file beside ``output``."""
    from calib.study.repair import open_repair, repair_plan

    with running() as progress:
        study = open_repair(layout, choice, text, compute)
        trains = choice.request.channels.repair == RECONSTRUCT
        return repair_plan(made, study, output, progress, trains=trains)


@click.command()
@click.argument("plan_path", metavar="PLAN", type=path_type)
@gathered(
    "options",
    ApplyOptions,
    click.option(
        "-o",
        "--output",
        type=path_type,
        metavar="DIR",
        help="Directory to write instead of the plan's.",
    ),
    click.option("--resume", is_flag=True, help="Continue an interrupted run of the same plan."),
    number_option("--jobs", default=JOBS, help="Shards to write at a time."),
    engine_option,
    click.option(
        "--checksum",
        is_flag=True,
        help="First compare each shard with its SHA-256, from SHA256SUMS or from the hub.",
    ),
)
@click.option("--source", metavar="MODEL", help="The plan's source, if it has moved.")
@push_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check what can be checked, predict time, memory and disk; write nothing.",
)
@json_option
def apply(
    plan_path: Path,
    options: ApplyOptions,
    source: str | None,
    push_to: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stream a plan's source into a new checkpoint directory."""
    from surgery.apply.output_directory import check_output_path
    from surgery.apply.run import apply_to, forecast_apply
    from surgery.hub.fetch import resolve_source
    from surgery.hub.upload import check_push, push
    from surgery.planning.plan import Plan

    if options.engine == "ray":
        refuse_idle("with --engine ray", "jobs")
    if dry_run:
        refuse_idle("with --dry-run", "push_to")
    loaded = Plan.load(plan_path)
    if loaded.output is None and options.output is None:
        raise Refusal(f"{plan_path}: names no output; give -o DIR")
    if push_to:
        check_push(push_to)
    path = resolve_source(loaded.source, source)
    output = options.output or Path(str(loaded.output))
    if not (options.resume and output.is_dir()):
        check_output_path(output, [path, plan_path])
    if dry_run:
        found = forecast_apply(loaded, path, options)
        text = f"{loaded.table()}\n\n{found.table()}\nnothing was written"
        print_text(json.dumps(found.facts()) if as_json else text)
        return
    with bars() as progress:
        made = apply_to(loaded, path, options, progress)
    if push_to:
        click.echo(push(made.output, push_to), err=as_json)
    if as_json:
        click.echo(json.dumps(made.facts()))
    else:
        what = f"{made.output}: {made.parameters:,} parameters, {made.nbytes:,} bytes"
        show_written(f"{what}, {spoken(made.seconds)}", "verify", made.output)


@dataclass(frozen=True)
class VerifyOptions:
    """What an output is checked against, and on which device."""

    plan: Path | None
    source: str | None
    forward: bool
    device: str
    engines: bool


@click.command()
@click.argument("directory", metavar="DIR", type=path_type)
@gathered(
    "options",
    VerifyOptions,
    click.option("--plan", type=path_type, help="The plan's file, if it is not beside DIR."),
    click.option(
        "--source",
        metavar="MODEL",
        help="The source model, if it has moved, or if only the plan within DIR names it.",
    ),
    click.option(
        "--forward",
        is_flag=True,
        help="Also compare logits, or an encoder's hidden states, with the masked dense model.",
    ),
    device_option,
    engines_option,
)
def verify(directory: Path, options: VerifyOptions) -> None:
    """Check an output against its plan and its source; exit status 1 on a fault."""
    from surgery.verify.files import origin_of, verify_files

    if not options.forward:
        refuse_idle("without --forward", "device")
    plan, source = origin_of(directory, options.plan, options.source)
    if options.forward and (plan is None or source is None):
        raise Refusal(f"{directory}: --forward needs the plan and its source")
    checks = verify_files(directory, plan, source)
    if checks.ok:
        from calib.streaming.empty_model import shape_faults
        from surgery.checkpoint.checkpoint import Checkpoint

        with running():
            made = Checkpoint.open(directory, plan.family if plan else None)
            shapes = {name: tensor.shape for name, tensor in made.tensors.items()}
            faults = shape_faults(made.config, shapes, made.family)
            checks.checks["transformers builds the same shapes"] = faults
    if options.forward and checks.ok and plan and source:
        add_logits(checks, plan, source, directory, options.device)
    print_text(checks.table(engines=options.engines))
    sys.exit(0 if checks.ok else 1)


@click.command()
@click.argument("directory", metavar="DIR", type=path_type)
@click.option(
    "-o", "--output", type=path_type, metavar="FILE.gguf", required=True, help="File to write."
)
@gathered(
    "options",
    ExportOptions,
    click.option(
        "--type",
        metavar="|".join(TYPES),
        help="What weights become.  [default: what most of them are]",
    ),
    click.option(
        "--pre",
        metavar="NAME",
        help="llama.cpp's name for the way the tokenizer splits text, where nobody knows it.",
    ),
    force_option,
)
@json_option
def export(directory: Path, output: Path, options: ExportOptions, as_json: bool) -> None:
    """Write a checkpoint as one GGUF file for llama.cpp (extra 'gguf')."""
    from surgery.api import open_layout
    from surgery.export.gguf_file import export_layout

    layout = open_layout(directory)
    with bars() as progress:
        made = export_layout(layout, output, options, progress)
    if as_json:
        click.echo(json.dumps(made.facts()))
        return
    for note in made.notes:
        print_text(f"note: {note}")
    click.echo(made.line())
