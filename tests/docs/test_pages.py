"""The pages are true: examples run, links hold, generated parts are what the tool writes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.planning.plan import Plan, ProvenanceFile
from surgery.stats.channel_stats import StatsInfo
from tests.support import ROOT, tiny, tiny_encoders
from tools import demo
from tools import pages as generated
from tools.family_table import untested

FILES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(FILES)}
QUICK_START = "docs/quickstart.md"
FROM_NOTHING = {"README.md", QUICK_START}
"""Pages whose examples need a model and texts; those of others go on where the quick start ends."""
OF_OTHERS = {"--local-dir", "--help"}
"""Options of other programs that pages name."""


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Language and text of the fenced blocks of a page, but for those in comments."""
    shown = re.sub(r"<!--.*?-->", "", PAGES[page], flags=re.DOTALL)
    yield from re.findall(r"^```([\w{}-]+)\n(.*?)^```$", shown, re.DOTALL | re.MULTILINE)


def lines_of(text: str) -> list[list[str]]:
    """The words of each command of a block of shell, continued lines joined."""
    joined = text.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def commands(page: str, *languages: str) -> list[list[str]]:
    """The commands of this project in blocks of ``languages``; after a $ where a line has one."""
    texts = [
        "".join(re.findall(r"^\$ ((?:.*\\\n)*.*\n)", text, re.M))
        if language == "text" or re.search(r"^\$ ", text, re.M)
        else text
        for language, text in blocks(page)
        if language in languages
    ]
    lines = ([*takewhile(">".__ne__, line)] for text in texts for line in lines_of(text))
    return [line for line in lines if line[0] == "compact-surgery"]


def parse(command: click.Command, name: str, words: list[str]) -> None:
    """Parse a command with all its options, and run nothing."""
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        _, child, rest = command.resolve_command(context, words)
        assert child is not None
        parse(child, words[0], rest)
    else:
        command.make_context(name, list(words))


def run_examples(page: str) -> None:
    """Run the commands and the Python of a page in their order, in the current directory."""
    namespace: dict[str, Any] = {"__name__": page}
    for language, text in blocks(page):
        if language == "python" and page != "CONTRIBUTING.md":
            exec(compile(text, page, "exec"), namespace)
        for command in lines_of(text) if language == "sh" else ():
            if command[0] == "compact-surgery":
                result = CliRunner().invoke(main, command[1:])
                assert result.exit_code == 0, (page, command, result.output)


def save_material(folder: Path) -> Path:
    """What every page's examples begin with: a model and texts."""
    tiny.save(
        folder / "my-model", hidden_size=64, intermediate_size=512, vocab_size=1536, tied=True
    )
    tiny_encoders.save(folder / "my-encoder", "xlm-roberta")
    for name in ("text.txt", "heldout.txt"):
        (folder / name).write_text(tiny.prose(9_000), encoding="utf-8")
    for name in ("science.jsonl", "words.jsonl"):
        shutil.copy(ROOT / "tools" / "tasks" / name, folder)
    return folder


@pytest.fixture(scope="module")
def after_quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the quick start's examples have run; tests must not change it."""
    folder = save_material(tmp_path_factory.mktemp("quickstart"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_examples(QUICK_START)
    return folder


@pytest.fixture(scope="module")
def made_anew() -> dict[str, str]:
    """Pages with their generated parts made anew."""
    return generated.pages()


def test_the_quick_start_ends_with_a_smaller_model(after_quick_start: Path) -> None:
    for name in ("my-model-pruned", "smaller"):
        before, after = (
            (after_quick_start / model / "model.safetensors").stat().st_size
            for model in ("my-model", name)
        )
        assert after < 0.85 * before


@pytest.mark.parametrize("page", [page for page in PAGES if page != QUICK_START])
def test_examples_run(
    page: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {"sh", "python"} & {language for language, _ in blocks(page)}:
        return
    if page in FROM_NOTHING:
        folder = save_material(tmp_path)
    else:
        quick_start = request.getfixturevalue("after_quick_start")
        folder = Path(shutil.copytree(quick_start, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    run_examples(page)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_only_shown_are_valid(page: str) -> None:
    inline = re.findall(r"`(compact-surgery (?!COMMAND|\w*\[).*?)`", PAGES[page].replace("\n", " "))
    shown = [line for text in inline for line in lines_of(text) if len(line) > 2]
    for command in [*shown, *commands(page, "sh", "console", "text")]:
        assert not (len(command) > 2 and command[2].startswith("hub:")), command
        parse(main, command[0], command[1:])


def test_a_wrong_option_on_a_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "```console\n$ compact-surgery plan m \\\n    --ratoi 0.2\n```\n"
    monkeypatch.setitem(PAGES, "README.md", text)
    with pytest.raises(click.UsageError, match="ratoi"):
        test_commands_that_are_only_shown_are_valid("README.md")


def every_option(command: click.Command) -> set[str]:
    """The options of a command and of those below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*map(every_option, below))


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", prose)
    other = [span for span in spans if not re.match(r"(pip|hf|python -m) ", span)]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(other)))
    assert named <= every_option(main) | OF_OTHERS


def test_pages_show_every_command() -> None:
    shown = {command[1] for page in PAGES for command in commands(page, "sh")}
    assert shown == set(main.commands) == set(generated.READ_ON)


def test_pages_name_only_targets_and_tools_that_exist() -> None:
    every = "".join(PAGES.values())
    targets = set(re.findall(r"(?:^|`)make (\w+)", every, re.MULTILINE))
    assert {"demo", "test", "docs"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for tool in set(re.findall(r"python -m\s(tools[\w.]*)", every)):
        assert find_spec(tool), tool


@pytest.mark.parametrize("page", sorted({page for page, _ in generated.PARTS.values()}))
def test_generated_parts_are_what_the_tool_writes(page: str, made_anew: dict[str, str]) -> None:
    assert PAGES[page] == made_anew[page], "run python -m tools.pages"


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(click.ClickException, match="needs both lines"):
        generated.with_part("no marks", "commands", "text")


def test_the_list_of_modules_has_every_module(made_anew: dict[str, str]) -> None:
    listed = re.findall(r"^\| ([\w]+\.py) \|", made_anew["docs/architecture.md"], re.MULTILINE)
    found = [
        path.name
        for package in ("surgery", "calib", "tools")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(listed) == sorted(found)
    assert len(found) > 60


def test_readme_has_8_kb_at_most() -> None:
    assert len(PAGES["README.md"].encode()) <= 8 * 1024


def test_pages_show_the_demo_s_figures_alike() -> None:
    header = demo.comparison_table([])
    parts = [page.partition(f"```text\n{header}\n")[2] for page in PAGES.values() if header in page]
    assert len(parts) == 2
    assert len({tuple(part.splitlines()[:3]) for part in parts}) == 1
    stages = "\n".join(parts).partition(demo.stage_table({}).splitlines()[0])[2].splitlines()
    names = [line[:30].strip() for line in stages[1 : len(demo.stages(demo.Paths(ROOT, ROOT))) + 2]]
    assert names == [*demo.stages(demo.Paths(ROOT, ROOT)), "together"]


def test_architecture_has_a_line_for_every_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    assert section
    for name in re.findall(r'"([\w-]+)', section[1]):
        assert re.search(rf"^\| {name} \|", PAGES["docs/architecture.md"], re.MULTILINE), name


def test_examples_of_file_formats_are_read_as_such() -> None:
    page = "docs/file-formats.md"
    stats, plan, output = (text for language, text in blocks(page) if language == "json")
    msgspec.json.decode(stats, type=StatsInfo)
    assert msgspec.json.decode(plan, type=Plan).complete
    assert set(json.loads(plan)) == set(Plan.__struct_fields__)
    assert set(json.loads(stats)) == set(StatsInfo.__struct_fields__)
    assert set(json.loads(output)) == set(ProvenanceFile.__struct_fields__)
    table = PAGES[page].partition("| field |")[2]
    for field in set(Plan.__struct_fields__) - {"format"}:
        assert re.search(rf"^\| .*`{field}`.* \|.*\|$", table, re.MULTILINE), field


def kinds_of_error() -> set[str]:
    """The names of SurgeryError and of all classes below it, wherever they are."""
    sources = "".join(
        p.read_text("utf-8") for n in ("surgery", "calib") for p in (ROOT / n).rglob("*.py")
    )
    pairs = re.findall(r"^class (\w+)\((\w+)\):", sources, re.MULTILINE)
    kinds = {"SurgeryError"}
    while more := {name for name, base in pairs if base in kinds} - kinds:
        kinds |= more
    return kinds


def test_every_kind_of_error_is_explained() -> None:
    assert len(kinds_of_error()) > 10
    for page in ("docs/troubleshooting.md", "docs/python-api.md"):
        missing = {name for name in kinds_of_error() if not re.search(rf"\b{name}\b", PAGES[page])}
        assert not missing, page


def test_every_family_has_a_tiny_checkpoint_that_tests_use() -> None:
    assert untested() == set()


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    """The site as ``make docs`` builds it, with one link more."""
    for name in ("docs", "tools/tasks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    with open(tmp_path / "README.md", "a", encoding="utf-8") as readme:
        readme.write("\n[One page](docs/sizes.md#experts), [another](docs/sizes.md#nowhere).\n")
    made = re.search(r"-m sphinx (.*)", (ROOT / "Makefile").read_text())
    assert made
    command = [sys.executable, "-m", "sphinx", *made[1].split()]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode != 0
    (fault,) = re.findall(r"WARNING: (.*)", built.stderr)
    assert "nowhere" in fault
