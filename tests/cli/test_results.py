"""A command ends with its result: notes and what engines do come before it."""

import re
from itertools import groupby
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.verify.engines import Effect
from surgery.verify.files import VerifyReport
from tests.support.command import Run

QUICK = ("--samples", 4, "--seq-len", 32)
CUT = ("--vocab-size", 500, "--intermediate-size", 60)


@pytest.fixture(scope="module")
def pruned(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of ``prune``, and what the command printed."""
    out = tmp_path_factory.mktemp("results") / "out"
    words = ("prune", llama, "--data", text, *QUICK, *CUT, "-o", out)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return out, result.stdout


def assert_ordered(lines: list[str], result: str) -> None:
    """Notes come first, then a line for each engine and effect, by engine, then the result."""
    assert lines[-1].startswith(result)
    (heading,) = (n for n, line in enumerate(lines) if line.startswith("engines"))
    notes = [n for n, line in enumerate(lines) if line.startswith("note")]
    assert all(n < heading for n in notes)
    listed = [line.strip() for line in lines[heading + 1 :] if line.startswith("  ")]
    engines, effects, _ = zip(*(line.split(": ", 2) for line in listed), strict=True)
    assert {*effects} <= {effect.value for effect in Effect}
    assert len(set(zip(engines, effects, strict=True))) == len(listed) > 0
    together = [engine for engine, _ in groupby(engines)]
    assert len(together) == len(set(together))


def test_prune_ends_with_what_it_made(pruned: tuple[Path, str]) -> None:
    out, printed = pruned
    assert_ordered(printed.splitlines(), f"wrote {out} and {out}.plan.json; next: ")
    assert "ok: 6 checks passed" in printed.splitlines()


def test_plan_ends_with_what_it_wrote(llama: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "plan.json"
    for options in ((), ("--engines",)):
        result = run("plan", llama, *CUT, "-o", path, "--force", *options)
        assert_ordered(result.stdout.splitlines(), f"wrote {path}, sizes only; next: ")
    assert "engines:" in result.stdout.splitlines()
    none = run("plan", llama, "--layers", "0-1", "-o", path, "--force").stdout
    assert "engines" not in none


def test_verify_ends_with_its_checks_and_measures(pruned: tuple[Path, str], run: Run) -> None:
    out, _ = pruned
    lines = run("verify", out, "--forward").stdout.splitlines()
    assert_ordered(lines, "ok: 8 checks passed")
    (logits,) = (line for line in lines if "logits equal" in line)
    assert re.fullmatch(
        r"ok {7}logits equal the masked dense model's: largest difference \d[\d.e-]* of the "
        r"largest logit, at most 1e-04 allowed, over 256 tokens",
        logits,
    )
    few, every = (run("verify", out, *more).stdout for more in ((), ("--engines",)))
    assert len(every.splitlines()) >= len(few.splitlines())


def test_a_report_counts_its_checks() -> None:
    report = VerifyReport({"a": [], "b": ["x", "y"], "c": []}, {"d": "no plan"}, {"a": "0.5 of 1"})
    assert report.table().splitlines() == [
        "ok       a: 0.5 of 1",
        "ok       c",
        "skipped  d: no plan",
        "FAULT    b: x",
        "FAULT    b: y",
        "FAULT: 1 of 3 checks failed, 1 skipped",
    ]
