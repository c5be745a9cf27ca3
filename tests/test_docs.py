"""The README's commands run, its tree is the repository's, its formats are the code's."""

import re
import shlex
from pathlib import Path

import pytest

from surgery.cli import main
from tests.support import ROOT, tiny
from tests.support.command import Run
from tools import predictions
from tools.family_table import BEGIN, END, family_table, untested

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [line for line in words if line and line[0] == "compact-surgery"]


def test_readme_commands_run_in_order(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(
        tmp_path / "my-model", hidden_size=64, intermediate_size=512, vocab_size=1536, tied=True
    )
    for name in ("text.txt", "heldout.txt"):
        (tmp_path / name).write_text(tiny.prose(9_000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in commands():
        result = run(*command[1:])
        assert result.exit_code == 0, (command, result.output)


def test_readme_shows_every_command() -> None:
    shown = {command[1] for command in commands()}
    assert shown == set(main.commands)


def test_readme_names_only_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "".join(blocks("sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_readme_tree_is_the_repository() -> None:
    tree = re.search(r"```\n(surgery/.*?)```", README, re.DOTALL)
    assert tree
    listed: dict[str, set[str]] = {}
    package = ""
    for line in tree[1].splitlines():
        if match := re.match(r"(\w+)/", line):
            package = match[1]
        elif match := re.match(r"  (\w+\.py)", line):
            listed.setdefault(package, set()).add(match[1])
    for package in ("surgery", "calib", "tools"):
        found = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        assert listed[package] == found


def test_readme_has_a_line_for_every_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert section
    for name in re.findall(r'"([\w-]+)', section[1]):
        assert re.search(rf"^\| {name} \|", README, re.MULTILINE), name


def test_readme_table_of_families_is_the_code_s() -> None:
    assert f"{BEGIN}{family_table()}{END}" in README


def test_readme_table_of_predictions_is_the_tool_s() -> None:
    assert f"{predictions.BEGIN}{predictions.prediction_table()}{predictions.END}" in README


def test_every_family_has_a_tiny_checkpoint_that_tests_use() -> None:
    assert untested() == set()
