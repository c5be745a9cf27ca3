"""The commands that try several cuts: search, compare."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from surgery.options import (
    ChannelOptions,
    Target,
    VocabularyOptions,
    calibration_options,
    channel_options,
    family_option,
    json_option,
    model_argument,
    path_type,
    ratio_options,
    vocabulary_options,
    windows_option,
)


@click.command()
@model_argument
@family_option
@ratio_options
@calibration_options
@windows_option
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
    from calib.documents import read_documents
    from surgery.choices import choose_sizes
    from surgery.comparison import plot_pairs, table
    from surgery.preview import plan_table
    from surgery.steps import open_model
    from surgery.studies import open_study, plan_best, search_pairs

    layout, source = open_model(model, options.pop("family"))
    chosen = choose_sizes(layout, target, vocabulary, read_documents(options["data"]))
    study = open_study(layout, chosen, **options)
    rows, best = search_pairs(study, chosen, target, candidates, channels)
    facts = [asdict(row) | {"score": row.score} for row in rows]
    click.echo(json.dumps(facts) if as_json else table(rows))
    if plot is not None:
        plot_pairs(rows, plot)
    if plan_path is not None:
        del options["windows"]
        made = plan_best(
            layout,
            source,
            chosen._replace(sizes=best),
            plan_path,
            channels=channels,
            ratio=target.ratio,
            vocab_by=vocabulary.vocab_by,
            **options,
        )
        made.save(plan_path)
        click.echo(plan_table(made, layout.checkpoint.path), err=as_json)
