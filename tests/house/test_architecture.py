"""The house itself: how many modules and packages there are, and which imports which."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import ROOT

TOPS = ("surgery", "calib")
MOST_AT_THE_TOP = 8
MOST_MODULES = 182
MOST_PACKAGES = 40
MOST_LEVELS = 14

Edges = Mapping[str, set[str]]


def module_paths() -> dict[str, Path]:
    """Dotted name → file; a package is its ``__init__.py``."""
    found = {}
    for path in sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_paths()


def imports(module: str) -> Iterator[str]:
    """Modules of the house that ``module`` imports anywhere, in functions and for types, too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield full
                elif node.module in MODULES:
                    yield node.module


def edges(*, of_packages: bool) -> Edges:
    """Who imports whom: module by module, or by the first two parts of their names."""
    parts = 2 if of_packages else None
    found: dict[str, set[str]] = {}
    for module in MODULES:
        user = ".".join(module.split(".")[:parts])
        used = {".".join(other.split(".")[:parts]) for other in imports(module)}
        found.setdefault(user, set()).update(used - {user})
    return found


def levels(graph: Edges) -> dict[str, int]:
    """Node → length of the longest way down; those on a circle, or above one, are left out."""
    found: dict[str, int] = {}
    while ready := [n for n in graph if n not in found and graph[n] <= found.keys()]:
        found |= {node: 1 + max((found[n] for n in graph[node]), default=0) for node in ready}
    return found


def test_levels_leave_out_circles() -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"b", "d"}, "d": {"c"}, "e": {"a", "b"}}
    assert levels(graph) == {"a": 1, "b": 2, "e": 3}


@pytest.mark.parametrize("of_packages", [False, True])
def test_no_circles(of_packages: bool) -> None:
    graph = edges(of_packages=of_packages)
    assert sum(map(len, graph.values())) > 50
    assert graph.keys() - levels(graph).keys() == set()


def test_few_levels() -> None:
    assert max(levels(edges(of_packages=True)).values()) <= MOST_LEVELS


@pytest.mark.parametrize("top", TOPS)
def test_few_modules_at_the_top(top: str) -> None:
    assert 1 <= len(list((ROOT / top).glob("*.py"))) <= MOST_AT_THE_TOP


def test_few_modules_and_packages() -> None:
    packages = [path for path in MODULES.values() if path.name == "__init__.py"]
    assert len(MODULES) <= MOST_MODULES
    assert len(packages) <= MOST_PACKAGES
    folders = {path.parent for path in MODULES.values()}
    assert {path.parent for path in packages} == folders
