"""Errors by their parts; the library names parameters, the command line flags."""

import ast
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from surgery.cli.main import Commands, main
from surgery.cli.terminal import PARAMETER, all_flags
from surgery.errors import BudgetError, SurgeryError, UnknownTypeError

Run = Callable[..., Result]

ROOT = Path(__file__).parents[2]
OF_CLICK = {"options.py", "terminal.py"}
"""Modules that define options, beside those of the command line."""
FLAG = re.compile(r"(?<![\w-])--?[a-z]")
SOURCE_FILE = re.compile(r"\b(surgery|calib)/[\w/]*\.py")


def literals(path: Path) -> Iterator[str]:
    """Every text in a module but its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in docstrings and type(node.value) is str:
            yield node.value


MODULES = sorted(path for folder in ("surgery", "calib") for path in (ROOT / folder).rglob("*.py"))
SHOW_COMMANDS = ("surgery/report/choices.py", "surgery/report/page.py")
"""The page of report has commands to copy; it is read in a browser, not raised or logged."""
LIBRARY = [
    path
    for path in MODULES
    if path.name not in OF_CLICK
    and path.relative_to(ROOT).as_posix() not in SHOW_COMMANDS
    and not path.relative_to(ROOT).as_posix().startswith("surgery/cli")
]


def test_modules_are_seen() -> None:
    assert len(MODULES) > len(LIBRARY) > 50


def test_the_library_names_no_flags() -> None:
    found = [(path.name, text) for path in LIBRARY for text in literals(path) if FLAG.search(text)]
    assert found == []


def test_messages_name_no_source_files() -> None:
    found = [(p.name, text) for p in MODULES for text in literals(p) if SOURCE_FILE.search(text)]
    assert found == []


def test_every_parameter_that_a_message_names_has_a_flag() -> None:
    named = {name for p in MODULES for text in literals(p) for name in PARAMETER.findall(text)}
    assert {"ratio", "vocab_size", "widths", "target", "keep_scripts", "resume"} <= named
    assert named - all_flags(main).keys() == set()


def every_command(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from every_command(inner)
    else:
        yield command


@pytest.mark.parametrize("command", list(every_command(main)), ids=lambda command: command.name)
def test_flags_are_those_of_the_command(command: click.Command) -> None:
    opts = {opt for param in command.params for opt in param.opts}
    assert set(all_flags(command).values()) <= opts


def speaker(text: str) -> click.Group:
    """A command line with one command that fails so, and another one beside it."""
    group = Commands()

    @group.command()
    @click.option("--width", "widths", multiple=True)
    @click.option("-o", "output")
    @click.option("--all", is_flag=True)
    def cut(**options: object) -> None:
        raise BudgetError(text, "fails", fix="stop")

    @group.command()
    @click.option("--output")
    @click.option("--keep-rows", "rows")
    def other(**options: object) -> None:
        pass

    return group


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`widths` a", "--width a"),
        ("`width`", "--width"),
        ("`output`", "-o"),
        ("`keep_rows` and `rows`", "--keep-rows and --keep-rows"),
        ("`nothing`", "`nothing`"),
        ("`cut --all`", "`cut --all`"),
        ("output", "output"),
    ],
)
def test_the_command_line_adds_the_flag(text: str, shown: str) -> None:
    result = CliRunner().invoke(speaker(text), ["cut"])
    assert result.exit_code == 2
    assert result.stderr == f"Error: {shown}: fails; stop\n"


def test_what_was_found_is_quoted_as_it_is() -> None:
    group = Commands()

    @group.command()
    @click.option("--width")
    def cut(width: str | None) -> None:
        raise BudgetError("file", "fails", expected="`width`", found="a `width`", fix="stop")

    result = CliRunner().invoke(group, ["cut"])
    assert result.stderr == "Error: file: fails: expected --width, found a `width`; stop\n"


def test_notes_and_tables_have_flags(llama: Path, tmp_path: Path, run: Run) -> None:
    sizes = ("--vocab-size", 512, "--intermediate-size", 64)
    result = run("plan", llama, *sizes, "-o", tmp_path / "plan.json")
    assert "note: --data shows how much longer text becomes" in result.stdout
    assert "note: sizes only; give --stats to choose what to keep" in result.stdout


def test_an_error_has_its_parts() -> None:
    error = BudgetError("`ratio`", "is no share", expected="below 1", found=2, fix="choose one")
    assert (error.where, error.problem, error.fix) == ("`ratio`", "is no share", "choose one")
    assert (error.expected, error.found) == ("below 1", "2")
    assert str(error) == "`ratio`: is no share: expected below 1, found 2; choose one"


def test_parts_that_are_left_out_are_none() -> None:
    error = SurgeryError(Path("a/b"), "is damaged", fix="delete it")
    assert (error.where, error.expected, error.found) == ("a/b", None, None)
    assert str(error) == "a/b: is damaged; delete it"


def test_parts_stay_as_they_are_where_the_message_is_cut() -> None:
    error = SurgeryError("a\x1b", "is long", found="x" * 5000, fix="stop")
    assert error.where == "a\x1b"
    assert error.found == "x" * 5000
    assert len(str(error)) < 2000
    assert str(error).startswith("a\\u001b: is long")


ERRORS = (
    BudgetError("`ratio`", "is no share", expected="below 1", found=ValueError("2"), fix="stop"),
    UnknownTypeError("config.json", ["odd"], code=True),
)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_the_same_in_another_process(error: SurgeryError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert back.problem


@pytest.mark.parametrize("error", ERRORS)
def test_inside_puts_the_file_in_front(error: SurgeryError) -> None:
    inner = error.inside("plan.json")
    assert type(inner) is type(error)
    assert str(inner) == f"plan.json: {error}"
    assert vars(inner) == vars(error) | {"where": f"plan.json: {error.where}"}
    assert not error.where.startswith("plan.json")


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("score", "--seq-len", "--window-bytes"),
        ("calibrate", "--column", "--field"),
        ("calibrate", "--max-length", "--seq-len"),
        ("apply", "--output-dir", "--output"),
        ("plan", "--overwrite", "--force"),
        ("prune", "--sparsity", "--ratio"),
    ],
)
def test_an_option_of_another_name_is_named(run: Run, command: str, given: str, meant: str) -> None:
    result = run(command, "model", given, 5)
    assert result.exit_code == 2
    assert f"No such option '{given}'." in result.stderr
    assert f"'{meant}'" in result.stderr.splitlines()[-1]
