"""The command line: a command parses, calls one library function, prints."""

import errno
import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from calib.streaming.settings import ComputeOptions
from surgery.apply.run import JOBS, ApplyOptions
from surgery.cli.models import calibrate, prune, score, stats
from surgery.cli.options import (
    ModelOptions,
    Refusal,
    ShowOptions,
    cut_options,
    data_options,
    device_option,
    engine_option,
    engines_option,
    force_option,
    gathered,
    io_option,
    json_option,
    model_options,
    path_type,
    plan_text_options,
    push_option,
    refuse_idle,
    show_options,
    spilling_options,
)
from surgery.cli.studies import add_logits, compare, report, search
from surgery.cli.terminal import (
    bars,
    print_text,
    running,
    show_engines,
    show_logs,
    show_plan,
    show_written,
    with_flags,
)
from surgery.cli.training import recover, teach
from surgery.errors import SurgeryError, is_panic, printable, shortened
from surgery.export.gguf_file import ExportOptions
from surgery.export.tensors import TYPES
from surgery.files.shard_file import IO
from surgery.planning.aims import QUALITY
from surgery.planning.request import CutRequest
from surgery.probe.probe import Proposal
from surgery.process import spoken
from surgery.stats.channels import RANDOM, RECONSTRUCT
from surgery.text.documents import TextOptions
from surgery.version import __version__

FIXES = {
    errno.ENOSPC: "; free space, or name another path",
    errno.EDQUOT: "; free space, or name another path",
    errno.EROFS: "; name another path",
    errno.EACCES: "; change its permissions, or name another path",
    errno.ENOENT: "; check the name, and create its directory",
}
"""What to do about an error of the file system."""


HINTS = {
    "--seq-len": "--window-bytes",
    "--max-length": "--seq-len",
    "--text": "--data",
    "--dataset": "--data",
    "--column": "--field",
    "--text-field": "--field",
    "--output-dir": "--output",
    "--out": "--output",
    "--overwrite": "--force",
    "--sparsity": "--ratio",
    "--num-samples": "--samples",
    "--nsamples": "--samples",
}
"""Options of other tools and commands → what they are called here."""


class Commands(click.Group):
    """Turns library errors and errors of the file system into one line and exit status 2."""

    arguments: Sequence[str] = ()
    """The words of the command line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line as a program."""
        given = kwargs.get("args") or (args[0] if args else None) or sys.argv[1:]
        self.arguments = [str(argument) for argument in given]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
                # A Windows console may lack a character; then it shows the number.
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and report its errors."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise _interrupted(command, self.arguments) or error from error
        except click.NoSuchOption as error:
            raise _hinted(error) from error
        except SurgeryError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise Refusal(error.message(partial(with_flags, command=command))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has ended: click ends quietly
                raise
            reason = f"{error.filename or 'input or output'}: {error.strerror or error}"
            fix = FIXES.get(error.errno or 0, "")
            raise Refusal(printable(reason + fix)) from error
        except UnicodeEncodeError as error:
            reason = (
                f"{shortened(ascii(error.object))}: is no UTF-8, so it cannot be written to a file"
            )
            raise Refusal(f"{reason}; rename it") from error
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = f"tokenizer.json: the tokenizers library failed on it: {error}"
            fix = "check that transformers' AutoTokenizer loads it"
            raise Refusal(printable(f"{reason}; {fix}")) from error


def _interrupted(
    command: click.Command | None, arguments: Sequence[str]
) -> click.exceptions.Exit | None:
    """Name the command that continues, and return the end of this one; None where none does."""
    if command is None or "resume" not in {option.name for option in command.params}:
        return None
    again = shlex.join([*arguments, *({"--resume"} - {*arguments})])
    click.echo(f"interrupted; continue with: compact-surgery {again}", err=True)
    return click.exceptions.Exit(130)


def _hinted(error: click.NoSuchOption) -> click.NoSuchOption:
    """Name the option of the command that another tool, or another command, calls like this."""
    hint = HINTS.get(error.option_name)
    options = error.ctx.command.params if error.ctx else []
    if hint is None or all(hint not in option.opts for option in options):
        return error
    text = f"No such option '{error.option_name}'. (Did you mean '{hint}'?)"
    return click.NoSuchOption(error.option_name, text, ctx=error.ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Make a published LLM checkpoint smaller without ever loading the model.

    MODEL is a local directory or a hub id org/name[@revision].
    """
    show_logs()


@dataclass(frozen=True)
class Shown:
    """What ``inspect`` shows instead of the parameters."""

    vocab: bool
    probe: bool
    removed: bool
    channels: bool
    predict_serving: bool
    stats: Path | None


@dataclass(frozen=True)
class RemovedOptions:
    """Which removed tokens ``inspect`` lists."""

    script: str | None
    limit: int | None
    source: str | None


LISTED = 20
"""Removed tokens of each script that are listed where neither a script nor a limit is given."""


@main.command()
@model_options
@gathered(
    "shown",
    Shown,
    click.option("--vocab", is_flag=True, help="Show what the vocabulary's rows are spent on."),
    click.option("--probe", is_flag=True, help="Show which families fit, and propose an entry."),
    click.option("--removed", is_flag=True, help="List the tokens that a plan removes, by script."),
    click.option(
        "--stats", type=path_type, metavar="FILE", help="Show how evenly routers use their experts."
    ),
    click.option(
        "--channels",
        is_flag=True,
        help="Show the channels that a plan keeps, and their share of the statistics, by layer.",
    ),
    click.option(
        "--predict-serving",
        is_flag=True,
        help="Show the bytes of weights, cache and logits; of a plan, before and after it.",
    ),
)
@gathered(
    "listed",
    RemovedOptions,
    click.option(
        "--script", metavar="NAME", help="The only script of --removed, such as Cyrillic."
    ),
    click.option(
        "--limit",
        type=click.IntRange(1),
        help=f"Most tokens of a script to list.  [default: {LISTED}, or all with --script]",
    ),
    click.option("--source", metavar="MODEL", help="The plan's model, if it has moved."),
)
@gathered(
    "text",
    TextOptions,
    data_options(required=False, use="Text to count the removed tokens in. "),
)
@show_options
def inspect(
    model: ModelOptions,
    shown: Shown,
    listed: RemovedOptions,
    text: TextOptions,
    show: ShowOptions,
) -> None:
    """Show where the parameters are; reads headers only.

    With --removed or --channels, MODEL is an output's directory or a plan's file.
    """
    from surgery.api import Model, probe_model
    from surgery.layout.census import plot_census, plot_routing
    from surgery.vocabulary.census import plot_vocab_census

    check_shown(shown, show)
    if shown.predict_serving:
        show_serving(model, listed.source, show.as_json)
        return
    if shown.removed or shown.channels:
        show_plan_of(model.model, shown, listed, text, show.as_json)
        return
    if shown.probe:
        refuse_idle("with --probe", "family", "vocab", "stats", "plot")
        proposal = _that_load(probe_model(model.model), model.model)
        print_text(json.dumps(asdict(proposal)) if show.as_json else proposal.table())
        return
    opened = Model(model.layout(), model.model)
    if shown.stats is not None:
        refuse_idle("with --stats", "vocab")
        routing = opened.routing(shown.stats)
        print_text(json.dumps(asdict(routing)) if show.as_json else routing.table())
        if show.plot is not None:
            plot_routing(routing, show.plot)
        return
    if shown.vocab:
        tokens = opened.vocabulary()
        click.echo(json.dumps(asdict(tokens)) if show.as_json else tokens.table())
        if show.plot is not None:
            plot_vocab_census(tokens, show.plot, opened.name)
        return
    census = opened.census()
    click.echo(json.dumps(asdict(census)) if show.as_json else census.table())
    if show.plot is not None:
        plot_census(census, show.plot)


def check_shown(shown: Shown, show: ShowOptions) -> None:
    """Refuse options of ``inspect`` that what it shows does not look at."""
    if show.plot is None:
        refuse_idle("without --plot", "force")
    show.check()
    if not shown.removed:
        refuse_idle("without --removed", "script", "limit", "data", "field", "strict")
    if shown.predict_serving:
        names = ("vocab", "probe", "removed", "channels", "stats", "plot")
        refuse_idle("with --predict-serving", *names)
    elif not shown.removed:
        refuse_idle("without --removed or --predict-serving", "source")


def show_serving(model: ModelOptions, source: str | None, as_json: bool) -> None:
    """Print what a model takes where it is served; of a plan or an output, before and after."""
    from surgery.planning.shapes import serving_of, serving_table, sizes_of
    from surgery.planning.sizes import whole
    from surgery.verify.files import plan_and_source, plan_within

    path = Path(model.model)
    if path.is_file() or (path.is_dir() and plan_within(path) is not None):
        refuse_idle("where MODEL is a plan or an output", "family")
        plan, layout = plan_and_source(path, source)
        before, after = serving_of(layout, whole(layout)), serving_of(layout, sizes_of(plan))
        facts = {"before": asdict(before), "after": asdict(after)}
        click.echo(json.dumps(facts) if as_json else serving_table(before, after))
        return
    refuse_idle("where MODEL is no plan and no output", "source")
    layout = model.layout()
    found = serving_of(layout, whole(layout))
    click.echo(json.dumps(asdict(found)) if as_json else serving_table(found))


def _that_load(proposal: Proposal, model: Path | str) -> Proposal:
    """Return a proposal without families as which transformers would not load the model."""
    from calib.streaming.empty_model import shape_faults
    from surgery.checkpoint.checkpoint import Checkpoint
    from surgery.hub.fetch import resolve_model

    made = Checkpoint.open(resolve_model(str(model))[0])
    shapes = {name: tensor.shape for name, tensor in made.tensors.items()}
    loaded = (name for name in proposal.families if not shape_faults(made.config, shapes, name))
    return replace(proposal, families=tuple(loaded))


def show_plan_of(
    path: str, shown: Shown, listed: RemovedOptions, text: TextOptions, as_json: bool
) -> None:
    """Print what the plan of an output, or a plan's file, removes of the vocabulary, or keeps."""
    from calib.text.chat import documents_of
    from surgery.api import removed_by
    from surgery.verify.files import plan_and_source, plan_at

    option = "--removed" if shown.removed else "--channels"
    refuse_idle(f"with {option}", "family", "vocab", "probe", "plot")
    if not shown.removed:
        plan = plan_at(path)
        click.echo(json.dumps(plan.channel_facts()) if as_json else plan.channel_table())
        return
    refuse_idle("with --removed", "channels")
    if not text.data:
        refuse_idle("without --data", "field", "strict")
    limit = listed.limit or (LISTED if listed.script is None else None)
    plan, layout = plan_and_source(path, listed.source)
    found = removed_by(plan, layout, documents_of(layout, text) if text.data else None)
    if as_json:
        click.echo(json.dumps(found.facts(limit, listed.script)))
    else:
        click.echo(found.table(limit, listed.script))


@dataclass(frozen=True)
class PlanSources:
    """The statistics that a plan is made from, and the paths it names and is written to."""

    stats: Path | None
    to: Path | None
    output: Path
    force: bool
    engines: bool


@main.command()
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
    layout = model.layout()
    for path in (given.output, replacement_file(given.output)):
        check_file(path, layout.checkpoint.path, force=given.force)
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
        from calib.study.repair import open_repair, repair_plan

        repair_text = replace(text, samples=stats.info.samples, seq_len=stats.info.seq_len)
        with running() as progress:
            study = open_repair(layout, choice, repair_text, compute)
            trains = cut.channels.repair == RECONSTRUCT
            made = repair_plan(made, study, given.output, progress, trains=trains)
    made.save(given.output)
    show_plan(made, layout, cut.sizes)
    show_engines(made, layout, every=given.engines)
    if made.complete:
        click.echo(apply_cost(made, layout, JOBS).line())
        there = () if given.to else ("-o", "DIR")
        show_written(str(given.output), "apply", given.output, *there)
    else:
        ratio = cut.sizes.ratio
        sizes = ("SIZES",) if ratio is None else ("--ratio", f"{ratio:g}")
        aim = ("--for", cut.sizes.aim) if cut.sizes.aim != QUALITY else ()
        then = ("calibrate", model.model, "--data", "TEXT", *sizes, *aim)
        show_written(f"{given.output}, sizes only", *then)


@main.command()
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
    click.option(
        "--jobs",
        default=JOBS,
        show_default=True,
        type=click.IntRange(1),
        help="Shards to write at a time.",
    ),
    engine_option,
    io_option,
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
    io: IO
    engines: bool


@main.command()
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
    io_option,
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
    checks = verify_files(directory, plan, source, io=options.io)
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


@main.command()
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


for command in (calibrate, score, prune, search, compare, stats, report, recover, teach):
    main.add_command(command)
