"""The commands that try several cuts: search, compare."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from surgery.options import (
    ChannelOptions,
    Refusal,
    VocabularyOptions,
    calibration_options,
    channel_options,
    family_option,
    json_option,
    model_argument,
    path_type,
    spill_option,
    vocabulary_options,
    windows_option,
)
from surgery.size_options import Target, ratio_options, step_options


@click.command()
@model_argument
@family_option
@ratio_options
@calibration_options
@windows_option
@spill_option
@click.option(
    "--candidates",
    metavar="V:I,V:I,…",
    help="Pairs to try in one pass, instead of those that meet the ratio, coarse to fine.",
)
@vocabulary_options
@channel_options
@click.option("--plan", "plan_path", type=path_type, metavar="FILE", help="Plan the best pair.")
@click.option("--plot", type=path_type, metavar="FILE.png", help="Write a picture (extra 'plot').")
@json_option
def search(
    model: str,
    target: Target,
    candidates: str | None,
    vocabulary: VocabularyOptions,
    channels: ChannelOptions,
    plan_path: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the split between V' and I' that loses least, by trying several.

    All are tried together, each layer's weights read once, on every fourth block of TEXT; the
    rest of TEXT chooses their channels.
    """
    from surgery.choices import choose_sizes
    from surgery.comparison import plot_pairs, table
    from surgery.preview import plan_table
    from surgery.steps import documents_of, open_model
    from surgery.studies import calibrated_plan, open_study, search_pairs
    from surgery.writer import check_file

    layout, source = open_model(model, options.pop("family"))
    if plan_path is not None and plan_path.absolute().parent.is_dir():  # else it is made
        check_file(plan_path, layout.checkpoint.path)
    if plot is not None:
        check_file(plot)
    chosen = choose_sizes(layout, target, vocabulary, documents_of(layout, options["data"]))
    study = open_study(layout, chosen, **options)
    rows, best = search_pairs(study, chosen, target, candidates, channels)
    click.echo(json.dumps([row.facts() for row in rows]) if as_json else table(rows))
    if plot is not None:
        plot_pairs(rows, plot)
    if plan_path is not None:
        made = calibrated_plan(
            layout,
            source,
            chosen._replace(sizes=best),
            plan_path,
            channels=channels,
            ratio=target.ratio,
            vocab_by=vocabulary.vocab_by,
            **options,
        )
        click.echo(plan_table(made, layout.checkpoint.path), err=as_json)


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        """Return the numbers, ascending, each once."""
        try:
            found = sorted({self._kind(part) for part in str(value).split(",")})
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 4,16", param, ctx)
        if not all(0 < number < 1e6 for number in found):
            self.fail(f"{value!r} has a number that is not above 0", param, ctx)
        return found


@click.command()
@model_argument
@family_option
@click.option(
    "--ratio",
    "ratios",
    type=Numbers(float),
    metavar="R[,R…]",
    required=True,
    help="Shares of all parameters to remove.",
)
@calibration_options
@windows_option
@spill_option
@step_options
@click.option(
    "--methods",
    metavar="NAME,…",
    help="Some of: random, abs-act, act2, wanda, l2 (channels alone), shortgpt, laco (layers), "
    "vocabulary (alone), compact (the paper's), search (this tool's).  [default: all]",
)
@click.option(
    "--by-samples",
    "counts",
    type=Numbers(int),
    metavar="N,N,…",
    help="Instead, try the paper's method with so many windows of calibration text.",
)
@vocabulary_options
@click.option("--plot", type=path_type, metavar="FILE.png", help="Write a picture (extra 'plot').")
@json_option
def compare(
    model: str,
    ratios: list[float],
    target: Target,
    methods: str | None,
    counts: list[int] | None,
    vocabulary: VocabularyOptions,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare methods at the same ratios, on the same text and the same held-out windows."""
    from surgery.choices import choose_sizes
    from surgery.comparison import METHODS, plot_methods, plot_samples, table
    from surgery.steps import documents_of, open_model
    from surgery.studies import compare_methods, compare_samples, open_study, usable_methods
    from surgery.writer import check_file

    if plot is not None:
        check_file(plot)
    layout, _ = open_model(model, options.pop("family"))
    documents = documents_of(layout, options["data"])
    chosen = choose_sizes(layout, replace(target, ratio=ratios[0]), vocabulary, documents)
    names = methods.split(",") if methods else usable_methods(layout)
    if unknown := [name for name in names if name not in METHODS]:
        raise Refusal(f"--methods: no method {unknown[0]}; there are {', '.join(METHODS)}")
    study = open_study(layout, chosen, **options)
    if counts:
        by_count = compare_samples(study, ratios[0], target, counts)
        found = {ratios[0]: list(by_count.values())}
    else:
        found = compare_methods(study, ratios, target, names)
    facts = {str(ratio): [row.facts() for row in rows] for ratio, rows in found.items()}
    texts = [f"{ratio:.0%} of the parameters\n{table(rows)}" for ratio, rows in found.items()]
    click.echo(json.dumps(facts) if as_json else "\n\n".join(texts))
    if plot is not None and counts:
        plot_samples(by_count, plot)
    elif plot is not None:
        plot_methods(found, plot)
