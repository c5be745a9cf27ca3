"""The commands that try several sizes or methods: search and compare."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calib.streaming.settings import ComputeOptions
from surgery.cli.cut_options import search_cut_options, step_cut_options
from surgery.cli.options import (
    ModelOptions,
    Numbers,
    Refusal,
    ShowOptions,
    gathered,
    model_options,
    path_type,
    refuse_idle,
    share,
    show_options,
    spilling_options,
    study_text_options,
    tasks_option,
)
from surgery.cli.terminal import print_text, running, show_written
from surgery.planning.layers import format_layers
from surgery.planning.request import CutRequest, SizeRequest
from surgery.planning.sizes import Sizes
from surgery.process import spoken, spoken_stages
from surgery.stats.channels import ChannelOptions
from surgery.text.documents import TextOptions
from surgery.vocabulary.order import VocabularyOptions

if TYPE_CHECKING:
    from calib.study.table import Row


@dataclass(frozen=True)
class SearchOptions:
    """The sizes to try, and the file that the best ones are planned to."""

    candidates: str | None
    output: Path | None
    tasks: tuple[Path, ...]


@click.command()
@model_options
@study_text_options
@spilling_options
@search_cut_options
@gathered(
    "options",
    SearchOptions,
    click.option(
        "--candidates",
        metavar="V:I,V:I,…",
        help="Sizes to try in one pass instead of those that meet the ratio, coarse to fine; of a "
        "mixture also V:E:I.",
    ),
    click.option(
        "-o",
        "--output",
        type=path_type,
        metavar="PLAN",
        help="File to write a plan of the best sizes to.",
    ),
    tasks_option,
)
@show_options
def search(
    model: ModelOptions,
    text: TextOptions,
    compute: ComputeOptions,
    cut: CutRequest,
    options: SearchOptions,
    show: ShowOptions,
) -> None:
    """Find the split between V', I' and experts that loses least, by trying several.

    All sizes of a pass are tried together, so that each layer's weights are read once. Every fourth
    block of TEXT scores them; the rest of TEXT chooses their channels and experts.
    """
    from calib.pipeline import PlanFiles, calibrated_plan
    from calib.scoring.tasks import read_tasks
    from calib.study.search import search_sizes, search_space
    from calib.study.study import open_study
    from calib.text.chat import documents_of

    read = [*text.files, *options.tasks, *cut.vocabulary.files]
    show.check(model.model, *read)
    check_apart(show.plot, options.output, "--output")
    start, layout = time.perf_counter(), model.layout()
    if options.output is None and show.plot is None:
        refuse_idle("without --output and --plot", "force")
    files = PlanFiles(options.output, force=show.force) if options.output is not None else None
    if files is not None:
        files.check([layout.checkpoint.path, *read])
    if options.candidates:
        refuse_idle("with --candidates", "multiple_of", "target")
    if not layout.experts:
        refuse_idle("for a model without routed experts", "expert_criterion")
    tasks = read_tasks(options.tasks)
    space = search_space(layout, cut, options.candidates, documents_of(layout, text))
    with running() as progress:
        study = open_study(layout, space.choice, text, compute, tasks)
        found = search_sizes(study, space, progress)
    rows = json.dumps([row.facts(found.dense) for row in found.rows])
    took = f"took {spoken(time.perf_counter() - start)}"
    click.echo(rows if show.as_json else f"{found.table()}\n{took}")
    if show.plot is not None:
        found.plot(show.plot, model.model)
    if files is not None:
        best = replace(space.choice, sizes=found.best)
        if found.best.layers:  # named, they need no statistics
            named = SizeRequest(layers=format_layers(found.best.layers))
            best = replace(best, request=replace(cut, sizes=named))
        with running() as progress:
            made, stages = calibrated_plan(layout, best, text, compute, files, progress)
        print_text(f"{made.table()}\n{spoken_stages(stages)}", err=show.as_json)
    if show.as_json:
        return
    if files is not None:
        show_written(str(files.plan), "apply", files.plan, "-o", "DIR")
        return
    click.echo(f"best: {shlex.join(_prune_to(model.model, found.best, cut))}")


def check_apart(plot: Path | None, other: Path | None, name: str) -> None:
    """Refuse a picture that would be one file with what the option ``name`` writes."""
    if plot is not None and other is not None and plot.resolve() == other.resolve():
        raise Refusal(f"--plot: names the same file as {name}: {plot}; name another one")


def _prune_to(model: str, sizes: Sizes, cut: CutRequest) -> list[str]:
    """Return the command that prunes to ``sizes`` as ``cut`` chooses tokens, channels, experts."""
    given = [f"--vocab-size={sizes.vocab_size}"]
    given += [f"--layers={format_layers(sizes.layers)}"] * bool(sizes.layers)
    given += [f"--num-experts={sizes.experts}"] * bool(sizes.experts)
    given += [f"--width={key}={size}" for key, size in sizes.widths.items()]
    given += ["--dequantize"] * sizes.dequantize
    given += [*_given(cut.channels, ChannelOptions()), *_given(cut.vocabulary, VocabularyOptions())]
    return ["compact-surgery", "prune", model, "--data", "TEXT", *given, "-o", "DIR"]


def _given(options: ChannelOptions | VocabularyOptions, usual: object) -> list[str]:
    """Return the words for those of ``options`` that differ from the ``usual`` ones."""
    words = list[str]()
    for name, value in asdict(options).items():
        if value == getattr(usual, name):
            continue
        option = name.replace("_scripts", "_script")  # given once for each
        flag = f"--{option.replace('_', '-')}"
        if isinstance(value, tuple):
            words += [f"{flag}={each}" for each in value]
        else:
            words.append(flag if value is True else f"{flag}={value}")
    return words


@dataclass(frozen=True)
class CompareOptions:
    """The ratios, and the methods or amounts of text to compare."""

    ratios: list[float]
    methods: str | None
    counts: list[int] | None
    tries: int
    keep: Path | None
    tasks: tuple[Path, ...]


@click.command()
@model_options
@study_text_options
@spilling_options
@step_cut_options
@gathered(
    "options",
    CompareOptions,
    click.option(
        "--ratio",
        "ratios",
        type=Numbers(share),
        metavar="R[,R…]",
        required=True,
        help="Shares of all parameters to remove.",
    ),
    click.option(
        "--methods",
        metavar="NAME,…",
        help="Some of: random, abs-act, act2, wanda, l2 (channels alone), shortgpt, laco (layers), "
        "slicegpt (columns of the residual stream), 2ssp (channels and attentions), "
        "vocabulary (alone), compact (the paper's), prune (what prune --ratio makes), search (the "
        "best split, repaired).  [default: these]  Also rotate, hidden (columns of the residual "
        "stream) and, of a mixture, reap, man, msan, frequency, gate, aimer, random-experts.",
    ),
    click.option(
        "--by-samples",
        "counts",
        type=Numbers(int),
        metavar="N,N,…",
        help="Instead try the paper's method with these numbers of calibration windows.",
    ),
    click.option(
        "--tries",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="N",
        help="Most pairs of V' and I' that compact and search try at a ratio; 1 is the rule of "
        "thumb's.",
    ),
    click.option(
        "--keep",
        type=path_type,
        metavar="FILE",
        help="Keep the rows in FILE as they are made. A later run makes only those that it lacks.",
    ),
    tasks_option,
)
@show_options
def compare(
    model: ModelOptions,
    text: TextOptions,
    compute: ComputeOptions,
    cut: CutRequest,
    options: CompareOptions,
    show: ShowOptions,
) -> None:
    """Compare methods at the same ratios, on the same text and the same held-out windows.

    The row "dense" is the model itself. The row "prune" is what prune --ratio makes by default.
    With --tasks, all answer the same items, and the picture shows the share of right answers.
    """
    from calib.scoring.tasks import read_tasks
    from calib.study.compare import (
        Comparison,
        check_methods,
        check_ratios,
        compare_methods,
        compare_samples,
        usable_methods,
    )
    from calib.study.kept_rows import check_kept
    from calib.study.study import open_study
    from calib.text.chat import documents_of
    from surgery.planning.choice import choose_vocabulary
    from surgery.planning.request import allowed_steps

    if show.plot is None:
        refuse_idle("without --plot", "force")
    read = [*text.files, *options.tasks, *cut.vocabulary.files]
    show.check(model.model, *read)
    check_apart(show.plot, options.keep, "--keep")
    if options.counts:
        refuse_idle("with --by-samples", "methods", "tasks", "tries", "keep")
        if len(options.ratios) > 1:
            raise Refusal("--ratio: takes one share with --by-samples; leave out the others")
    check_ratios(options.ratios)
    tasks = read_tasks(options.tasks)
    start = time.perf_counter()
    layout, ratios = model.layout(), options.ratios
    check_kept(options.keep, [layout.checkpoint.path, *read])
    names = options.methods.split(",") if options.methods else usable_methods(layout)
    check_methods(layout, names)
    cut = replace(cut, sizes=replace(cut.sizes, ratio=ratios[0]))
    choice = choose_vocabulary(layout, cut, documents=documents_of(layout, text))
    steps = allowed_steps(layout, cut.sizes)
    with running() as progress:
        study = open_study(layout, choice, text, compute, tasks)
        if options.counts:
            rows = compare_samples(study, steps, ratios[0], options.counts, progress)
            found = {ratios[0]: rows}
        else:
            asked = Comparison(ratios, names, options.tries, options.keep)
            found = compare_methods(study, steps, asked, progress)
    if show.as_json:
        facts = {str(r): [row.facts(rows[0]) for row in rows] for r, rows in found.items()}
        click.echo(json.dumps(facts))
    else:
        tables = compared(found, timed=not options.counts)
        click.echo(f"{tables}\ntook {spoken(time.perf_counter() - start)}")
    if show.plot is not None:
        draw_compared(found, show.plot, model.model, options)


def compared(found: Mapping[float, Sequence["Row"]], *, timed: bool) -> str:
    """Return a table for each ratio, and what the user should know of them."""
    from calib.study.table import legend, missed, notes, table

    tables = [
        f"{100 * ratio:g}% of the parameters\n{table(rows, ratio)}" for ratio, rows in found.items()
    ]
    marked = any(missed(row, ratio) for ratio, rows in found.items() for row in rows)
    dense, *others = next(iter(found.values()))
    described = [legend(dense, marked=marked, timed=timed), *notes(row.name for row in others)]
    return "\n\n".join([*tables, "\n".join(described)])


def draw_compared(
    found: Mapping[float, Sequence["Row"]], path: Path, model: str, options: CompareOptions
) -> None:
    """Draw the picture of what was compared."""
    from calib.study.table import plot_answers, plot_methods, plot_samples

    if options.counts:
        plot_samples(next(iter(found.values())), path, model)
    elif options.tasks:
        plot_answers(found, path, model)
    else:
        plot_methods(found, path, model)
