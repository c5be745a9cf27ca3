"""Tests of the demo's parts that run no model."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from surgery.cli.main import main as compact_surgery
from tools import demo

PATHS = demo.Paths(Path("build/smollm2"), Path("build"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The sea is deep. It is cold.", "The sea is deep."),
        ("It is 3.5 km deep, e.g. there! And", "It is 3.5 km deep, e.g. there!"),
        ('He said, "Go." Then he went.', 'He said, "Go."'),
        ("Two\nlines and\n\nno end", "Two lines and no end"),
        ("An end.\n", "An end."),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert demo.first_sentence(text) == sentence


def test_stages_are_valid_commands_in_order() -> None:
    commands = demo.stages(PATHS)
    assert [command[1] for command in commands.values()][:7] == [
        *("inspect", "calibrate", "plan", "apply", "verify", "score", "score")
    ]
    for program, name, *arguments in commands.values():
        if program == "compact-surgery":
            command = compact_surgery.commands[name]
            command.make_context(name, arguments)


def test_everything_is_written_under_output() -> None:
    for path in (PATHS.pruned, PATHS.plot, PATHS.stats, PATHS.plan):
        assert path.parent == PATHS.output
        assert path != PATHS.model


def test_remove_old_keeps_the_model(tmp_path: Path) -> None:
    paths = demo.Paths(tmp_path / "model", tmp_path)
    for directory in (paths.model, paths.pruned):
        directory.mkdir()
        (directory / "config.json").touch()
    paths.plan.touch()
    partial = paths.stats.with_name(f"{paths.stats.name}.partial")  # of a demo that was interrupted
    partial.mkdir()
    partial.with_name(f"{partial.name}.lock").touch()
    paths.remove_old()
    assert list(tmp_path.iterdir()) == [paths.model]


def test_comparison_table() -> None:
    rows = [demo.Comparison("bytes", 2_000, 1_500), demo.Comparison("bits", 1.0, 1.25, ".4f")]
    _, first, second = demo.comparison_table(rows).splitlines()
    assert first.split() == ["bytes", "2,000", "1,500", "-25.0", "%"]
    assert second.split() == ["bits", "1.0000", "1.2500", "+25.0", "%"]


def test_stage_table_sums_seconds() -> None:
    finished = {"a": demo.Finished(1.0, 80_000_000, ""), "b": demo.Finished(2.5, 1, "")}
    lines = demo.stage_table(finished).splitlines()
    assert lines[1].split() == ["a", "1.0", "80", "MB"]
    assert lines[-1].split() == ["together", "3.5"]


def test_a_stage_is_measured_and_its_output_shown(capsys: pytest.CaptureFixture[str]) -> None:
    program = Path(sys.executable).name
    finished = demo.run_stage("hello", [program, "-c", "print('hello')"])
    assert finished.output == "hello\n"
    assert finished.peak_rss_bytes
    assert finished.peak_rss_bytes > 1_000_000
    assert "    hello\n" in capsys.readouterr().out


def test_a_failed_stage_gives_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    program = Path(sys.executable).name
    with pytest.raises(click.exceptions.Exit) as caught:
        demo.run_stage("bad", [program, "-c", "raise SystemExit(3)"])
    assert caught.value.exit_code == 3
    assert capsys.readouterr().err == "demo: stage 'bad' failed with exit status 3\n"


def test_usage_names_what_is_missing() -> None:
    result = CliRunner().invoke(demo.main, ["--model", "x"])
    assert result.exit_code == 2
    assert "--output" in result.output
