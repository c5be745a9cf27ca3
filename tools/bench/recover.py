"""What an hour of training buys a pruned model: tokens, bits and right answers, by method."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.plot import saved_figure
from tools.bench.child import compact_surgery, measure

Facts = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """How long each method trains, and what the results are measured by."""

    data: Sequence[Path]
    """Texts to train on."""
    unseen: Path
    """Text to score on."""
    tasks: Sequence[Path]
    """Task files; none measures bits alone."""
    minutes: float
    seq_len: int
    windows: int
    """Most windows of ``data`` that each run holds out, to measure its curve on."""
    samples: int
    """Most windows of ``unseen`` to score on."""
    work: Path
    """Directory for the checkpoints."""


def bench_methods(
    model: str, pruned: Path, methods: Sequence[str], beside: Sequence[Path], how: Training
) -> list[Facts]:
    """Train ``pruned`` by each method for equal time; measure all models in one call of score.

    Args:
        model: The dense model.
        pruned: What is trained.
        methods: Of ``recover``.
        beside: More models to measure, such as a repaired one.
        how: For how long, and what the results are measured by.

    Returns:
        Facts of each model, the dense one first: those of ``score``, with ``name``, and of trained
        ones ``tokens``, ``minutes``, ``cpu_minutes``, ``written`` and ``curve``.
    """
    how.work.mkdir(parents=True, exist_ok=True)
    trained = {method: _train(pruned, method, how) for method in methods}
    paths: dict[str, str | Path] = {"dense": model, "pruned": pruned}
    paths |= {path.name: path for path in beside}
    paths |= {name: how.work / name for name, made in trained.items() if made["output"]}
    tasks = [part for path in how.tasks for part in ("--tasks", path)]
    unseen = ("--data", how.unseen, "--samples", str(how.samples))
    scored = measure(compact_surgery("score", *paths.values(), *unseen, *tasks, "--json"))
    found = [
        {"name": name, **facts}
        for name, facts in zip(paths, json.loads(scored.output), strict=True)
    ]
    for facts in found:
        made = trained.get(facts["name"])
        if made is not None:
            facts |= {"tokens": made["tokens"], "minutes": made["seconds"] / 60}
            facts |= {"cpu_minutes": made["cpu_minutes"], "written": made["writing_seconds"] / 60}
            facts["curve"] = [[0, made["before"]], *made["curve"]]
    return found


def _train(pruned: Path, method: str, how: Training) -> Facts:
    """Train into ``how.work``, unless that was done before; return what ``recover`` says of it."""
    record = how.work / f"{method}.json"
    if not record.exists():
        data = [part for path in how.data for part in ("--data", path)]
        sizes = ("--seq-len", str(how.seq_len), "--windows", str(how.windows), "--seed", "0")
        train = (*data, "--minutes", str(how.minutes), "--method", method, *sizes)
        output = ("-o", how.work / method, "--json")
        used = measure(compact_surgery("recover", pruned, *train, *output))
        minutes = (used.user_seconds + used.system_seconds) / 60
        made = {**json.loads(used.output), "cpu_minutes": minutes}
        record.write_text(json.dumps(made), encoding="utf-8")
    found: Facts = json.loads(record.read_text(encoding="utf-8"))
    return found


def table(found: Sequence[Facts]) -> str:
    """Return a row for each model."""
    heads = ("tokens", "minutes", "of CPU", "bits/byte", "loss", "answers", "of dense", "±")
    lines = [f"{'':<12}" + "".join(f"{head:>12}" for head in heads)]
    for facts in found:
        change, answers = facts.get("change"), facts.get("tasks", {}).get("mean", {})
        cells = [
            f"{facts['tokens']:,}" if "tokens" in facts else "",
            f"{facts['minutes']:.1f}" if "minutes" in facts else "",
            f"{facts['cpu_minutes']:.1f}" if "minutes" in facts else "",
            f"{facts['bits_per_byte']:.4f}",
            f"{change['share']:+.1%}" if change else "",
            f"{answers['acc_norm']:.1%}" if answers else "",
            f"{answers['share']:.1%}" if answers.get("share") else "",
            f"{answers['share_margin']:.1%}" if answers.get("share_margin") else "",
        ]
        lines.append(f"{facts['name']:<12}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def draw(found: Sequence[Facts], path: Path) -> None:
    """Draw the bits of the run's held-out text against the time, a line for each method.

    A line begins where the teacher has written the text.
    """
    with saved_figure(path, 7, 4.2) as figure:
        axes = figure.subplots()
        for facts in found:
            if "curve" in facts:
                tokens, bits = zip(*facts["curve"], strict=True)
                begin = facts["written"]
                pace = (facts["minutes"] - begin) / max(tokens[-1], 1)
                minutes = [begin + pace * each for each in tokens]
                axes.plot(minutes, bits, marker="o", label=facts["name"])
        axes.set_xlabel("minutes")
        axes.set_ylabel("bits per byte of held-out text")
        axes.legend()
