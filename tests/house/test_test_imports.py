"""Rules for the tests' own folders."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT


def imported(path: Path) -> Iterator[str]:
    """Modules that ``path`` imports anywhere, with the names taken from them as submodules."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_test_module(module: str) -> bool:
    parts = module.split(".")
    return parts[0] in ("", "tests") and any(part.startswith("test_") for part in parts)


def test_what_counts_as_an_import_of_a_test_module(tmp_path: Path) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(
        "import tests.apply.test_two\n"
        "from tests import test_three\n"
        "from tests.support import tiny\n"
        "def late():\n    from .test_four import name\n",
        "utf-8",
    )
    found = [module for module in imported(path) if is_test_module(module)]
    assert found == [
        "tests.apply.test_two",
        "tests.test_three",
        ".test_four",
        ".test_four.name",
    ]


def test_no_test_module_is_imported() -> None:
    """What several tests need lies in tests/support, where none of them owns it."""
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert Path(__file__) in paths
    assert sum(path.name.startswith("test_") for path in paths) > 50
    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sorted(paths)
        for module in imported(path)
        if is_test_module(module)
    ]
    assert found == []
