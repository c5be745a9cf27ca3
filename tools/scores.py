"""Which score of bits predicts right answers: rank correlations over cuts of several models.

    python -m tools.scores FILE [FILE…] [--check FILE]

Each FILE is what compare or search printed of one model with --tasks and --json, without repeating
a cut. A score weights the loss over all bytes against that on words that both vocabularies tokenize
alike. Half of the items choose the weight, the other half judge it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np

from calib.scoring.score import CHANCE, SEED
from calib.study.table import DENSE

WEIGHTS = {
    "all bytes": 1.0,
    "five parts all, one alike": 5 / 6,
    "two parts all, one alike": 2 / 3,
    "half and half": 1 / 2,
    "one part all, two alike": 1 / 3,
    "words tokenized alike": 0.0,
}
"""Name of a score → the weight of the loss over all bytes."""

PLAIN = "all bytes"
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Cuts:
    """The cuts of one model."""

    losses: np.ndarray
    """``(cuts, 2)``: the loss over all bytes, and on words tokenized alike."""
    right: Sequence[np.ndarray]
    """Per task, bool ``(cuts, items)``."""

    def accuracies(self, drawn: Sequence[np.ndarray]) -> np.ndarray:
        """Return the mean accuracy over the tasks, on the items ``drawn`` of each."""
        found = [of[:, items].mean(axis=1) for of, items in zip(self.right, drawn, strict=True)]
        return np.asarray(np.mean(found, axis=0))

    def scores(self, weight: float) -> np.ndarray:
        """Return the score of each cut."""
        return np.asarray(self.losses @ [weight, 1 - weight])


def read_cuts(path: Path) -> Cuts:
    """Read the rows of ``compare`` or ``search``, without that of the dense model.

    Raises:
        click.ClickException: the file has no rows with answers.
    """
    try:
        found: Any = json.loads(path.read_text("utf-8"))
        rows = (
            found if isinstance(found, list) else [row for rows in found.values() for row in rows]
        )
        rows = [row for row in rows if row["name"] != DENSE]
        tasks = [name for name in rows[0]["tasks"] if name != "mean"]
        right = [np.array([row["tasks"][t]["right_norm"] for row in rows], bool) for t in tasks]
        return Cuts(np.array([[row["loss"], row["alike_loss"]] for row in rows]), right)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{path}: has no answers of cuts; print it by compare --tasks FILE --json"
        raise click.ClickException(message) from error


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's: the correlation of the ranks, of equals their mean; 0 if all are equal."""
    ranks = [_ranks(each) - (len(each) - 1) / 2 for each in (first, second)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return np.asarray(below + (equal - 1) / 2)


def predicts(models: Sequence[Cuts], items: Sequence[Sequence[np.ndarray]], weight: float) -> float:
    """Return the rank correlation of −score with accuracy, the mean over the models."""
    return mean(
        rank_correlation(-cuts.scores(weight), cuts.accuracies(drawn))
        for cuts, drawn in zip(models, items, strict=True)
    )


def halves(models: Sequence[Cuts]) -> list[list[list[np.ndarray]]]:
    """Return two halves of the items of each task of each model."""
    shuffles = [
        [np.random.default_rng(SEED).permutation(of.shape[1]) for of in cuts.right]
        for cuts in models
    ]
    return [[[each[half::2] for each in of] for of in shuffles] for half in (0, 1)]


def resampled(models: Sequence[Cuts], items: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return ``(RESAMPLES, weights)``: rank correlations of cuts and items drawn anew."""
    draws, found = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        chosen, drawn = [], []
        for cuts, of in zip(models, items, strict=True):
            rows = draws.integers(0, len(cuts.losses), len(cuts.losses))
            chosen.append(Cuts(cuts.losses[rows], [each[rows] for each in cuts.right]))
            drawn.append([draws.choice(each, len(each)) for each in of])
        found.append([predicts(chosen, drawn, weight) for weight in WEIGHTS.values()])
    return np.array(found)


def table(models: Sequence[Cuts], items: Sequence[Sequence[np.ndarray]]) -> list[str]:
    """Return a line for each score: its rank correlation, and how much more that is than plain."""
    plain, again = list(WEIGHTS).index(PLAIN), resampled(models, items)
    lines = [
        f"{'score':<28}{'rank corr.':>11}{'interval':>18}{'over all bytes':>17}{'interval':>18}"
    ]
    first = predicts(models, items, WEIGHTS[PLAIN])
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        found = predicts(models, items, weight)
        more = again[:, number] - again[:, plain]
        lines.append(
            f"{name:<28}{found:>11.3f}{_interval(again[:, number]):>18}"
            f"{found - first:>+17.3f}{_interval(more):>18}"
        )
    return lines


def _interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, (CHANCE / 2, 100 - CHANCE / 2))
    return f"{low:+.3f} … {high:+.3f}"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Cuts that answered other tasks; they choose nothing.",
)
def main(files: tuple[Path, ...], check: tuple[Path, ...]) -> None:
    """Print how well each score predicts answers, and the one that half of the items choose."""
    models = [read_cuts(path) for path in files]
    cuts = " + ".join(str(len(each.losses)) for each in models)
    click.echo(f"{cuts} cuts; 95 of 100 draws of cuts and items lie within an interval\n")
    choosing, judging = halves(models)
    chosen = max(WEIGHTS, key=lambda name: predicts(models, choosing, WEIGHTS[name]))
    parts = [("half of the items, to choose", models, choosing)]
    parts += [("the other half, to judge", models, judging)]
    parts += [
        (str(path), [of], [[np.arange(each.shape[1]) for each in of.right]])
        for path, of in zip(check, map(read_cuts, check), strict=True)
    ]
    for title, each, items in parts:
        click.echo("\n".join([title, *table(each, items), ""]))
    click.echo(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
