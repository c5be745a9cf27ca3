"""The commands that show a model, or what a plan removes and keeps of one: inspect and report."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.options import (
    ModelOptions,
    ShowOptions,
    data_options,
    device_option,
    force_option,
    gathered,
    model_options,
    path_type,
    refuse_idle,
    show_options,
)
from surgery.cli.terminal import print_text, running
from surgery.probe.probe import Proposal
from surgery.text.documents import TextOptions

if TYPE_CHECKING:
    from surgery.planning.plan import Plan
    from surgery.report.page import ReportSubject
    from surgery.verify.files import VerifyReport


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


@click.command()
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

    check_shown(model.model, shown, show)
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


def check_shown(model: str, shown: Shown, show: ShowOptions) -> None:
    """Refuse options of ``inspect`` that what it shows does not look at."""
    if show.plot is None:
        refuse_idle("without --plot", "force")
    show.check(model, shown.stats)
    if not shown.removed:
        refuse_idle("without --removed", "script", "limit", "data", "field", "strict")
    if shown.predict_serving:
        names = ("vocab", "probe", "removed", "channels", "stats", "plot")
        refuse_idle("with --predict-serving", *names)
    elif not shown.removed:
        refuse_idle("without --removed or --predict-serving", "source")


def show_serving(model: ModelOptions, source: str | None, as_json: bool) -> None:
    """Print what a model takes where it is served; of a plan or an output, before and after."""
    from surgery.planning.serving import serving_of, serving_table
    from surgery.planning.shapes import sizes_of
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
class ReportOptions:
    """What a page is made from, and its file."""

    stats: Path | None
    results: tuple[Path, ...]
    source: str | None
    forward: bool
    device: str
    output: Path
    force: bool


@click.command()
@click.argument("subject", metavar="SOURCE")
@gathered(
    "options",
    ReportOptions,
    click.option(
        "--stats",
        type=path_type,
        help="From calibrate: shows the layers, and makes the sliders of What if.",
    ),
    click.option(
        "--results",
        type=path_type,
        multiple=True,
        metavar="FILE",
        help="What score, search or compare printed with --json. May be given several times.",
    ),
    click.option("--source", metavar="MODEL", help="The plan's model, if it has moved."),
    click.option(
        "--forward", is_flag=True, help="Also compare an output's logits, as verify --forward does."
    ),
    device_option,
    click.option(
        "-o",
        "--output",
        type=path_type,
        default="report.html",
        show_default=True,
        help="File that the page is written to.",
    ),
    force_option,
)
@gathered("text", TextOptions, data_options(required=False, use="Text to show before and after. "))
def report(subject: str, options: ReportOptions, text: TextOptions) -> None:
    """Make one HTML page that shows what a cut keeps and loses.

    The quick way takes seconds: compact-surgery plan MODEL --ratio 0.2 -o plan.json, then
    compact-surgery report plan.json.

    SOURCE is a plan's file, an output's directory, or a model with --stats, which calibrate makes.
    Of a model, the rule of thumb removes a fifth, and the sliders of the page choose other sizes.
    """
    from calib.text.chat import documents_of
    from surgery.api import report_subject
    from surgery.files.atomic import check_file
    from surgery.report.page import ReportSources, report_on
    from surgery.report.passages import read_texts
    from surgery.report.proof import read_results
    from surgery.stats.channel_stats import ChannelStats

    if not text.data:
        refuse_idle("without --data", "field", "strict")
    if not options.forward:
        refuse_idle("without --forward", "device")
    names = (subject, options.source, options.stats, *options.results, *text.files)
    read = [Path(each) for each in names if each is not None]
    check_file(options.output, read, force=options.force)
    stats = ChannelStats.load(options.stats) if options.stats else None
    opened = report_subject(subject, stats, options.source)
    if opened.output is None:
        refuse_idle("where no output is given", "forward")
    check_file(options.output, [opened.layout.checkpoint.path], force=options.force)
    results = read_results(options.results)
    texts = read_texts(text, partial(documents_of, opened.layout))
    checks = checks_of(opened, options)
    made = report_on(opened, ReportSources(stats, options.stats, texts, checks, results))
    made.save(options.output)
    size = options.output.stat().st_size
    click.echo(f"wrote {options.output}: {size:,} bytes; open it in a browser")


def checks_of(opened: "ReportSubject", options: ReportOptions) -> "VerifyReport | None":
    """Return what verify says of an output; None where there is none."""
    from surgery.verify.files import verify_files

    if opened.output is None:
        return None
    source = opened.layout.checkpoint.path
    found = verify_files(opened.output, opened.plan, source, download=False)
    if options.forward and found.ok:
        add_logits(found, opened.plan, source, opened.output, options.device)
    return found


def add_logits(
    report: "VerifyReport", plan: "Plan", source: Path, output: Path, device: str
) -> None:
    """Add to a report how far an output's logits are from the masked dense model's."""
    from calib.scoring.logits import compare_logits

    if plan.replaced is not None and plan.replaced.trained:
        report.skipped["logits equal the masked dense model's"] = "the weights were trained since"
        return
    with running():
        found = compare_logits(plan, source, output, device)
    report.checks[found.check] = found.faults()
    report.details[found.check] = found.line()
