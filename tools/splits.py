"""Search a model's split, then hold it against others on text that the search did not see.

    python -m tools.splits MODEL --ratio R[,R…] --data TEXT --unseen OTHER [--repair]

Against channels alone, as much of the vocabulary as may go, and the rule of thumb. It also says
what the search took, in forwards: one is the dense model over both parts of TEXT. The rule in
``surgery/planning/sizes.py`` is fitted to the tables this prints.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from calib.streaming.settings import ComputeOptions
from calib.study.search import MOST, search_sizes, search_space
from calib.study.study import Candidate, Study, open_study
from calib.study.table import Row, table
from calib.study.text import WINDOW_BYTES
from calib.study.trial import Trial, Variant
from calib.text.windows import byte_windows
from surgery.api import open_layout
from surgery.cli.options import gathered
from surgery.cli.terminal import bars
from surgery.planning.request import CutRequest, SizeRequest
from surgery.planning.shapes import axis_lengths
from surgery.planning.sizes import Sizes, nearest_to_rule
from surgery.stats.channels import ChannelOptions
from surgery.text.documents import Source, TextOptions, read_documents


def forward_seconds(study: Study) -> float:
    """What the dense model takes over the calibration and the held-out text once."""
    layout = study.text.layout
    whole = Variant(study.text.ids(layout.vocab_size), axis_lengths(layout, layout.widths))
    encoded = study.text.encoded(layout.vocab_size)
    calibration_pass = study.text.calibration_pass(layout.vocab_size)
    start = time.perf_counter()
    study.bits([Trial(whole, encoded, calibration_pass)])
    return time.perf_counter() - start


def on_unseen(
    study: Study, texts: Sequence[str], pairs: dict[str, Sizes], repair: bool
) -> list[Row]:
    """Try ``pairs``, made smaller by the study's calibration text, on other windows."""
    other = Study(replace(study.text, heldout=texts), study.settings)
    return other.rows([Candidate(name, sizes, repair=repair) for name, sizes in pairs.items()])


@dataclass(frozen=True)
class SplitOptions:
    """How the splits are tried and shown."""

    most: int
    repair: bool
    as_json: bool


@click.command()
@click.argument("model")
@click.option("--ratio", "ratios", required=True, help="R[,R…]")
@click.option("--unseen", required=True, help="Text to judge on.")
@gathered(
    "text",
    TextOptions,
    click.option(
        "--data",
        required=True,
        callback=lambda _, __, given: (Source.parse(given),),
        help="Text to search on.",
    ),
    click.option("--samples", default=24, show_default=True),
    click.option("--seq-len", default=1024, show_default=True),
    click.option("--windows", default=24, show_default=True, help="Of each held-out text."),
)
@gathered(
    "options",
    SplitOptions,
    click.option("--most", default=MOST, show_default=True, help="Pairs in a pass."),
    click.option("--repair", is_flag=True, help="Refit what stays of each down_proj."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object per ratio."),
)
def main(model: str, ratios: str, unseen: str, text: TextOptions, options: SplitOptions) -> None:
    """Print the pairs tried and how they do on unseen windows."""
    layout, text = open_layout(model), replace(text, seed=0)
    texts = byte_windows(read_documents(unseen), text.windows, WINDOW_BYTES)
    for ratio in map(float, ratios.split(",")):
        channels = ChannelOptions(repair="least-squares" if options.repair else "none")
        asked = SizeRequest(ratio, only="vocabulary,channels")
        space = search_space(layout, CutRequest(asked, channels=channels))
        study = open_study(layout, space.choice, text, ComputeOptions())
        forward = forward_seconds(study)
        start = time.perf_counter()
        with bars() as progress:
            found = search_sizes(study, replace(space, most=options.most), progress)
        rows = found.rows
        took = time.perf_counter() - start
        named = {"search": found.best, "channels": space.sizes[-1], "vocabulary": space.sizes[0]}
        named["rule"] = nearest_to_rule(layout, ratio, space.sizes)
        judged = on_unseen(study, texts, named, options.repair)
        facts: dict[str, Any] = {
            "ratio": ratio,
            "pairs": len(rows),
            "search_seconds": took,
            "forward_seconds": forward,
            "forwards_per_pair": took / forward / len(rows),
        }
        if options.as_json:
            lists = {"tried": rows, "unseen": judged}
            facts |= {name: [row.facts() for row in each] for name, each in lists.items()}
            click.echo(json.dumps({"model": Path(model).name, **facts}))
            continue
        click.echo(f"{table(rows)}\n\non unseen windows\n{table(judged)}\n")
        click.echo("\n".join(f"{name:<20}{value:.3g}" for name, value in facts.items()) + "\n")


if __name__ == "__main__":
    main()
