"""No command replaces what took time unasked, and each says last what it wrote."""

from pathlib import Path

import pytest

from calib import calibrate, prune
from surgery import SurgeryError
from tests.support.command import Run, assert_refused

TEXT = ("--data", "text.txt", "--samples", 2, "--seq-len", 32)
SIZES = ("--vocab-size", 512, "--intermediate-size", 64)
RATIO = ("--ratio", 0.2, "--multiple-of", 8)
CASES = {
    "calibrate": ("calibrate", "model", *TEXT, "-o", "kept"),
    "plan": ("plan", "model", *SIZES, "-o", "kept"),
    "repair": ("plan", "model", *SIZES, "-o", "kept.repair.safetensors"),
    "search": ("search", "model", *TEXT, *RATIO, "-o", "kept"),
    "merge": ("stats", "merge", "stats.safetensors", "-o", "kept"),
    "inspect": ("inspect", "model", "--plot", "kept.png"),
    "vocabulary": ("inspect", "model", "--vocab", "--plot", "kept.png"),
    "picture of search": ("search", "model", *TEXT, *RATIO, "--plot", "kept.png"),
    "compare": ("compare", "model", *TEXT, *RATIO, "--methods", "act2", "--plot", "kept.png"),
    "prune": ("prune", "model", *SIZES, *TEXT, "-o", "out"),
}
KEPT = {"prune": "out.plan.json"}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_is_there_is_replaced_only_by_force(name: str, bench: Path, run: Run) -> None:
    command = CASES[name]
    kept = bench / KEPT.get(name, str(command[-1]))
    kept.write_text("hours of work")
    refused = run(*command)
    assert_refused(refused, f"{kept.name}: is there already", "replace it with --force")
    assert kept.read_text() == "hours of work"
    made = run(*command, "--force")
    assert made.exit_code == 0, made.output
    assert kept.read_bytes() != b"hours of work"


def test_the_statistics_beside_an_output_are_not_replaced(bench: Path, run: Run) -> None:
    stats = bench / "out.stats.safetensors"
    stats.write_text("hours of work")
    assert_refused(run(*CASES["prune"]), f"{stats.name}: is there already")
    with pytest.raises(SurgeryError, match="is there already"):
        prune("model", data="text.txt", vocab_size=512, output="out")
    with pytest.raises(SurgeryError, match="is there already"):
        calibrate("model", data="text.txt", samples=2, seq_len=32, output=stats)
    assert stats.read_text() == "hours of work"


def test_statistics_of_another_run_are_not_replaced_by_resuming(bench: Path, run: Run) -> None:
    take = ("calibrate", "model", *TEXT, "-o", "kept")
    assert run(*take).exit_code == 0
    before = (bench / "kept").read_bytes()
    assert run(*take, "--resume").exit_code == 0
    refused = run("calibrate", "model", *TEXT, "--seed", 1, "-o", "kept", "--resume")
    assert_refused(refused, "kept: is there already")
    assert (bench / "kept").read_bytes() == before
    assert not (bench / "kept.partial").exists()


def test_a_cluster_does_not_pass_over_an_interrupted_run(bench: Path, run: Run) -> None:
    (bench / "kept.partial").mkdir()
    refused = run("calibrate", "model", *TEXT, "-o", "kept", "--engine", "ray")
    assert_refused(refused, "kept.partial: is there from a run", "--resume")


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "model", "--force"),
        ("search", "model", *TEXT, *RATIO, "--force"),
        ("compare", "model", *TEXT, *RATIO, "--force"),
    ],
)
def test_force_without_a_file_is_refused(
    bench: Path, run: Run, command: tuple[object, ...]
) -> None:
    assert_refused(run(*command), "--force: has no effect")


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(
    bench: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("refused after the work")

    monkeypatch.setattr("calib.study.study.Study.rows", work)
    for name in ("picture of search", "compare"):
        command = (*CASES[name][:-1], "kept.foo")
        assert_refused(run(*command), "kept.foo", "unknown kind", ".png")
        (bench / "place").mkdir(exist_ok=True)
        assert_refused(run(*CASES[name][:-1], "place"), "is a directory")


@pytest.mark.parametrize(
    ("command", "last"),
    [
        (CASES["calibrate"], "wrote kept: 2 windows, "),
        (CASES["plan"], "wrote kept, sizes only; next: compact-surgery calibrate model --data"),
        (
            ("plan", "model", *SIZES, "--stats", "stats.safetensors", "-o", "kept", "--to", "out"),
            "wrote kept; next: compact-surgery apply kept",
        ),
        (("apply", "plan.json", "-o", "out"), "wrote out: "),
        (CASES["search"], "wrote kept; next: compact-surgery apply kept -o DIR"),
        (CASES["merge"], "wrote kept: "),
        (CASES["prune"], "wrote out and out.plan.json; next: compact-surgery score model out"),
    ],
)
def test_the_last_line_says_what_was_written(
    bench: Path, run: Run, command: tuple[object, ...], last: str
) -> None:
    made = run(*command)
    assert made.exit_code == 0, made.output
    assert last in made.stdout.splitlines()[-1]
