"""Accuracy of checkpoints on the task files in tools/tasks, by kind, through lm-evaluation-harness.

python -m tools.task_scores MODEL_DIR... [--json]
"""

import json
import time
from pathlib import Path
from typing import Any

import click

from tools import harness
from tools.tasks.records import FOLDER, KINDS

GROUP = "compact_surgery"
METRICS = {"acc": "acc,none", "acc_norm": "acc_norm,none"}
MEAN = "mean"
Scores = dict[str, dict[str, float]]
"""By kind and for the mean over kinds: accuracy by metric."""


def task_scores(directory: Path, tasks: Any) -> Scores:
    """Score one checkpoint on every kind."""
    results = harness.evaluate(directory, {GROUP: 0}, tasks)
    names = {kind: f"{GROUP}_{kind}" for kind in KINDS} | {MEAN: GROUP}
    return {
        kind: {metric: float(results[name][key]) for metric, key in METRICS.items()}
        for kind, name in names.items()
    }


def table(scores: dict[str, Scores], metric: str) -> str:
    """One line per checkpoint, in per cent."""
    width = max(map(len, scores)) + 2
    kinds = (*KINDS, MEAN)
    lines = [f"{metric:<{width}}" + "".join(f"{kind:>14}" for kind in kinds)]
    for name, by_kind in scores.items():
        figures = "".join(f"{100 * by_kind[kind][metric]:>14.1f}" for kind in kinds)
        lines.append(f"{name:<{width}}{figures}")
    return "\n".join(lines)


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(directories: tuple[Path, ...], as_json: bool) -> None:
    """Score checkpoints on the local task files."""
    tasks = harness.task_manager(FOLDER)
    scores = {}
    for directory in directories:
        start = time.perf_counter()
        scores[str(directory)] = task_scores(directory, tasks)
        click.echo(f"{directory}: {time.perf_counter() - start:.0f} s", err=True)
    if as_json:
        click.echo(json.dumps(scores, indent=1))
        return
    click.echo("\n\n".join(table(scores, metric) for metric in METRICS))


if __name__ == "__main__":
    main()
