"""Search a model's split, then hold it against others on text that the search did not see.

    python -m tools.splits MODEL --ratio R[,R…] --data TEXT --unseen OTHER [--repair]

Against channels alone, as much of the vocabulary as may go, and the rule of thumb. It also says
what the search took, in forwards: one is the dense model over both parts of TEXT. The rule in
``surgery/budget.py`` is fitted to the tables this prints.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from calib.corpus import byte_windows
from calib.documents import read_documents
from calib.material import WINDOW_BYTES
from calib.search import search
from calib.study import Recipe, Study
from calib.trial import Cut, Trial
from surgery.budget import Sizes, pairs_at
from surgery.candidates import MOST
from surgery.channels import DEFAULT_CRITERION
from surgery.choices import allowed_steps, choose_sizes
from surgery.comparison import Row, table
from surgery.options import VocabularyOptions
from surgery.predict import axis_lengths
from surgery.size_options import Target
from surgery.steps import open_model
from surgery.studies import open_study, passes


def forward_seconds(study: Study) -> float:
    """What the dense model takes over the calibration and the held-out text once."""
    layout = study.material.layout
    whole = Cut(study.material.ids(layout.vocab_size), axis_lengths(layout, layout.widths))
    encoded = study.material.encoded(layout.vocab_size)
    reading = study.material.reading(layout.vocab_size)
    start = time.perf_counter()
    study.bits([Trial(whole, encoded, reading)], lambda windows: None)
    return time.perf_counter() - start


def on_unseen(
    study: Study, texts: Sequence[str], pairs: dict[str, Sizes], repair: bool
) -> list[Row]:
    """Try ``pairs``, made smaller by the study's calibration text, on other windows."""
    other = Study(replace(study.material, heldout=texts), study.device, study.dtype)
    return other.rows([Recipe(name, sizes, repair=repair) for name, sizes in pairs.items()])


@click.command()
@click.argument("model")
@click.option("--ratio", "ratios", required=True, help="R[,R…]")
@click.option("--data", required=True, help="Text to search on.")
@click.option("--unseen", required=True, help="Text to judge on.")
@click.option("--samples", default=24, show_default=True)
@click.option("--seq-len", default=1024, show_default=True)
@click.option("--windows", default=24, show_default=True, help="Of each held-out text.")
@click.option("--most", default=MOST, show_default=True, help="Pairs in a pass.")
@click.option("--repair", is_flag=True, help="Refit what stays of each down_proj.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per ratio.")
def main(
    model: str,
    ratios: str,
    data: str,
    unseen: str,
    most: int,
    repair: bool,
    as_json: bool,
    **text: Any,
) -> None:
    """Print the pairs tried and how they do on unseen windows."""
    layout, _ = open_model(model)
    texts = byte_windows(read_documents(unseen), text["windows"], WINDOW_BYTES)
    text |= {"data": data, "seed": 0, "device": "auto", "dtype": "auto"}
    for ratio in map(float, ratios.split(",")):
        target = Target(ratio=ratio)
        chosen = choose_sizes(layout, target, VocabularyOptions())
        pairs = pairs_at(layout, ratio, chosen.rarity.must_keep, allowed_steps(layout, target))
        study = open_study(layout, chosen, **text)
        forward = forward_seconds(study)
        start = time.perf_counter()
        rows, best = search(
            study,
            pairs,
            chosen.sizes,
            most=most,
            criterion=DEFAULT_CRITERION,
            repair=repair,
            progress=passes("search"),
        )
        took = time.perf_counter() - start
        named = {"search": best, "channels": pairs[-1], "vocabulary": pairs[0]}
        named["rule"] = chosen.sizes
        judged = on_unseen(study, texts, named, repair)
        facts: dict[str, Any] = {
            "ratio": ratio,
            "pairs": len(rows),
            "search_seconds": took,
            "forward_seconds": forward,
            "forwards_per_pair": took / forward / len(rows),
        }
        if as_json:
            lists = {"tried": rows, "unseen": judged}
            facts |= {name: [row.facts() for row in each] for name, each in lists.items()}
            click.echo(json.dumps({"model": Path(model).name, **facts}))
            continue
        click.echo(f"{table(rows)}\n\non unseen windows\n{table(judged)}\n")
        click.echo("\n".join(f"{name:<20}{value:.3g}" for name, value in facts.items()) + "\n")


if __name__ == "__main__":
    main()
