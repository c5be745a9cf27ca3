"""The paper's seven tasks with the settings of its Table 7, as a table like its Table 2.

    python -m tools.paper_tasks DIR [DIR...] [--limit N] [--json]

Avg% is relative to the first checkpoint, so name the dense one first. The data come from the hub:
run it where that can be reached, or where its cache holds them. CUDA is used where there is one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click

from tools import harness


@dataclass(frozen=True)
class Benchmark:
    """A column of Table 2 with its line of Table 7."""

    column: str
    task: str
    """Task or group of lm-evaluation-harness."""
    metric: str
    shots: int = 0
    filter: str = "none"
    """What takes the answer out of a generated text."""

    @property
    def key(self) -> str:
        """Where the harness puts the metric."""
        return f"{self.metric},{self.filter}"


TABLE_7 = (
    Benchmark("MMLU", "mmlu", "acc"),
    Benchmark("HeSw", "hellaswag", "acc_norm"),
    Benchmark("WiGr", "winogrande", "acc"),
    Benchmark("ARC-C", "arc_challenge", "acc_norm"),
    Benchmark("ARC-E", "arc_easy", "acc_norm"),
    Benchmark("PIQA", "piqa", "acc_norm"),
    Benchmark("GSM8K", "gsm8k", "exact_match", shots=5, filter="strict-match"),
)
COLUMNS = tuple(benchmark.column for benchmark in TABLE_7)
SHOTS = {benchmark.task: benchmark.shots for benchmark in TABLE_7}
AVERAGE, RELATIVE = "Avg", "Avg%"
Row = dict[str, float]
"""Per cent by column."""


def row(results: harness.Results) -> Row:
    """Pick Table 7's metrics out of a checkpoint's results, in per cent."""
    return {b.column: 100 * float(results[b.task][b.key]) for b in TABLE_7}


def averaged(rows: Sequence[Row]) -> list[Row]:
    """Add each row's average over the tasks, and that in per cent of the first row's."""
    averages = [mean(row[column] for column in COLUMNS) for row in rows]
    return [
        {**row, AVERAGE: average, RELATIVE: 100 * average / averages[0] if averages[0] else 0.0}
        for row, average in zip(rows, averages, strict=True)
    ]


def table(rows: Mapping[str, Row]) -> str:
    """Format rows by name as the paper does, with one digit."""
    width = max(map(len, rows)) + 2
    columns = (*COLUMNS, AVERAGE, RELATIVE)
    lines = ["".join([" " * width, *(f"{column:>8}" for column in columns)])]
    for name, found in rows.items():
        lines.append("".join([f"{name:<{width}}", *(f"{found[c]:>8.1f}" for c in columns)]))
    return "\n".join(lines)


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N items of each task.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(directories: tuple[Path, ...], limit: int | None, as_json: bool) -> None:
    """Evaluate checkpoints on the paper's seven tasks; name the dense one first."""
    tasks = harness.task_manager()
    found = [row(harness.evaluate(directory, SHOTS, tasks, limit)) for directory in directories]
    rows = dict(zip(map(str, directories), averaged(found), strict=True))
    click.echo(json.dumps(rows, indent=1) if as_json else table(rows))


if __name__ == "__main__":
    main()
