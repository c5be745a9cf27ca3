"""Write the generated parts of README.md and of the pages in docs/.

python -m tools.pages
"""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import click

from surgery.cli.main import main as compact_surgery
from tools.family_table import family_table
from tools.predictions import prediction_table

ROOT = Path(__file__).parent.parent
PACKAGES = ("surgery", "calib", "tools")

READ_ON = {
    "prune": "quickstart.md#in-one-command",
    "inspect": "quickstart.md#step-by-step",
    "calibrate": "large-models.md",
    "plan": "sizes.md",
    "apply": "large-models.md#memory-of-apply",
    "verify": "quickstart.md#step-by-step",
    "export": "llama-cpp.md",
    "score": "evaluation.md#bits-per-byte",
    "search": "search-repair-compare.md#search",
    "compare": "search-repair-compare.md#compare",
    "recover": "train-it-back.md",
    "teach": "train-it-back.md#a-teacher-that-does-not-fit",
    "stats": "large-models.md#several-machines",
    "report": "see-before-you-cut.md",
}
"""Command → the page that explains it, in the order in which pages name the commands."""


def summary(command: click.Command) -> str:
    """The first sentence of a command's help."""
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def command_table() -> str:
    """One row for each command, for README.md."""
    rows = ["| command | what it does | more |", "|---|---|---|"]
    for name, page in READ_ON.items():
        does = summary(compact_surgery.commands[name])
        rows.append(f"| [`{name}`](docs/cli.md#{name}) | {does} | [read on](docs/{page}) |")
    return "\n".join(rows)


def command_pages() -> str:
    """Usage, help and options of every command, for docs/cli.md."""
    settings = compact_surgery.context_settings
    group = click.Context(compact_surgery, info_name="compact-surgery", **settings)
    sections = (section(compact_surgery.commands[name], name, group) for name in READ_ON)
    return "\n\n".join(sections)


def section(command: click.Command, name: str, parent: click.Context) -> str:
    """The section of a command and, below it, of its own commands."""
    context = click.Context(command, info_name=name, parent=parent)
    path = context.command_path.removeprefix("compact-surgery ")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", inspect.cleandoc(command.help or ""), f"```text\n{usage}\n```"]
    if page := READ_ON.get(path):
        parts.append(f"Read on: [{title(page.partition('#')[0])}]({page}).")
    if isinstance(command, click.Group):
        parts += [section(each, child, context) for child, each in sorted(command.commands.items())]
    else:
        parts.append(option_table(command, context))
    return "\n\n".join(parts)


def title(page: str) -> str:
    """The heading of a page in docs/."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def option_table(command: click.Command, context: click.Context) -> str:
    """One row for each option, as ``--help`` shows it."""
    rows = ["| option | meaning |", "|---|---|"]
    options = (each for each in command.params if isinstance(each, click.Option))
    for record in (each.get_help_record(context) for each in options):
        if record:
            option, meaning = (text.replace("|", "\\|") for text in record)
            rows.append(f"| `{option}` | {meaning} |")
    return "\n".join(rows)


def module_lists() -> str:
    """One line for each module, by folder, for docs/architecture.md; nothing is imported."""
    folders = sorted(
        {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")},
        key=lambda folder: (PACKAGES.index(folder.relative_to(ROOT).parts[0]), folder),
    )
    return "\n\n".join(module_list(folder) for folder in folders)


def module_list(folder: Path) -> str:
    """What a folder is for, and one row for each module directly in it."""
    parts = [f"### {folder.relative_to(ROOT).as_posix()}/"]
    modules = sorted(folder.glob("*.py"))
    if (package := folder / "__init__.py") in modules:
        modules.remove(package)
        parts.append(first_line(package))
    rows = [f"| {path.name} | {first_line(path)} |" for path in modules]
    if rows:
        parts.append("\n".join(["| module | what it holds |", "|---|---|", *rows]))
    return "\n\n".join(part for part in parts if part)


def first_line(path: Path) -> str:
    """The first line of a module's docstring; empty where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "table of commands": ("README.md", command_table),
    "commands": ("docs/cli.md", command_pages),
    "table of families": ("docs/models.md", family_table),
    "table of predictions": ("docs/large-models.md", prediction_table),
    "modules": ("docs/architecture.md", module_lists),
}
"""Name of a part → the page that holds it, and what makes it."""


def with_part(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the two comments that name the part.

    Raises:
        click.ClickException: they are not there, each once and in order.
    """
    begin, end = f"<!-- {name}: made by python -m tools.pages -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise click.ClickException(f"a page needs both lines once, in order: {begin} {end}")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def pages() -> dict[str, str]:
    """Each page that holds a generated part → its text, all parts made anew."""
    made: dict[str, str] = {}
    for name, (page, make) in PARTS.items():
        text = made.get(page) or (ROOT / page).read_text(encoding="utf-8")
        made[page] = with_part(text, name, make())
    return made


@click.command()
def main() -> None:
    """Write the generated parts of the pages, and name the pages that change."""
    for page, text in pages().items():
        path = ROOT / page
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            click.echo(page)


if __name__ == "__main__":
    main()
