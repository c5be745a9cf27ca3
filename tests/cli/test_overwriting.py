"""No command replaces what took time unasked, and each says last what it wrote."""

import os
import re
from pathlib import Path

import pytest

from calib import calibrate, compare, prune
from surgery import SurgeryError
from surgery.cli.main import main
from tests.support.command import Run, assert_refused
from tests.support.contents import digests

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


READ = "is one of the files that are read"
IN_MODEL = "is inside a directory that is only read"
EACH_OTHER = "inside each other"
STATS, TASKS, KEPT_WORDS = "stats.safetensors", "tasks.jsonl", "words.txt"
COMPARE = ("compare", "model", *TEXT, *RATIO, "--methods", "act2")
OWN_INPUTS = {
    "calibrate on its text": ("text.txt", READ, "calibrate", "model", *TEXT, "--force", "-o"),
    "calibrate on a file of its text's directory": (
        "texts/a.txt", READ, "calibrate", "model", "--data", "texts", "--force", "-o",
    ),
    "calibrate on its words": (
        KEPT_WORDS, READ, "calibrate", "model", *TEXT, "--keep-tokens", KEPT_WORDS, "--force", "-o",
    ),
    "plan on its statistics": (STATS, READ, "plan", "model", *SIZES, "--stats", STATS, "--force",
                               "-o"),
    "plan on its text": ("text.txt", READ, "plan", "model", *SIZES, *TEXT[:2], "--force", "-o"),
    "search on its text": ("text.txt", READ, "search", "model", *TEXT, *RATIO, "--force", "-o"),
    "search on its tasks": (
        TASKS, READ, "search", "model", *TEXT, *RATIO, "--tasks", TASKS, "--force", "-o",
    ),
    "search's picture": (
        "model/a.png", IN_MODEL, "search", "model", *TEXT, *RATIO, "--force", "--plot",
    ),
    "compare on its text": ("text.txt", READ, *COMPARE, "--keep"),
    "compare on its tasks": (TASKS, READ, *COMPARE, "--tasks", TASKS, "--keep"),
    "compare's picture": ("model/a.png", IN_MODEL, *COMPARE, "--force", "--plot"),
    "inspect's picture": ("model/a.png", IN_MODEL, "inspect", "model", "--force", "--plot"),
    "inspect on its statistics": (
        STATS, READ, "inspect", "model", "--stats", STATS, "--force", "--plot",
    ),
    "report on its plan": ("plan.json", READ, "report", "plan.json", "--source", "model", "--force",
                           "-o"),
    "report on its statistics": (
        STATS, READ, "report", "plan.json", "--source", "model", "--stats", STATS, "--force", "-o",
    ),
    "report on its results": (
        TASKS, READ, "report", "plan.json", "--source", "model", "--results", TASKS, "--force",
        "-o",
    ),
    "report in its model": ("model/a.html", IN_MODEL, "report", "model", "--stats", STATS, "-o"),
    "merge on its part": (STATS, READ, "stats", "merge", STATS, "--force", "-o"),
    "export in its model": ("model/config.json", IN_MODEL, "export", "model", "--force", "-o"),
    "apply around its plan": ("out", EACH_OTHER, "apply", "out.partial/plan.json", "--resume",
                              "-o"),
    "prune beside its text": (
        "new.stats.safetensors", READ, "prune", "model", "--data", "new.stats.safetensors", *SIZES,
        "--force", "-o", "new",
    ),
    "prune around its text": (
        "out", EACH_OTHER, "prune", "model", "--data", "out.partial/text.txt", *SIZES, "-o",
    ),
    "teach around its text": (
        "out", EACH_OTHER, "teach", "model", "--plan", "plan.json", "--data",
        "out.partial/text.txt", "--tokens", 64, "--resume", "-o",
    ),
    "recover beside its text": (
        "new.self-data.jsonl", READ, "recover", "model", "--data", "new.self-data.jsonl",
        "--method", "continue", "--tokens", 64, "-o", "new",
    ),
    "recover's picture": (
        "arguments.png", READ, "recover", "model", *TEXT[:2], "--tokens", 64, "--training-args",
        "arguments.png", "-o", "new", "--force", "--plot",
    ),
}  # fmt: skip
"""Case → the output, what is said of it, and the command; the output's name is its last word,
unless another one makes it."""


@pytest.fixture
def inputs(bench: Path) -> Path:
    """A directory to work in, with inputs of every kind."""
    for name in ("texts", "out.partial"):
        (bench / name).mkdir()
    for name in ("texts/a.txt", "out.partial/text.txt", "new.self-data.jsonl", KEPT_WORDS):
        (bench / name).write_text("the\n")
    (bench / "out.partial/plan.json").write_bytes((bench / "plan.json").read_bytes())
    (bench / "new.stats.safetensors").write_bytes((bench / "text.txt").read_bytes())
    (bench / TASKS).write_text('{"context": "a", "choices": [" b", " c"], "answer": 0}\n')
    (bench / "arguments.png").write_text("{}")
    return bench


@pytest.mark.parametrize("name", OWN_INPUTS)
def test_no_command_replaces_what_it_reads(
    name: str, inputs: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("refused after the work")

    monkeypatch.setattr("surgery.text.documents.local_rows", work)
    monkeypatch.setattr("surgery.stats.channel_stats.ChannelStats.load", work)
    output, words, *command = OWN_INPUTS[name]
    command += [output] if str(command[-1]).startswith("-") else []
    before = digests(inputs)
    assert_refused(run(*command), str(output), str(words), "; ")
    assert digests(inputs) == before


@pytest.mark.parametrize("other", ["./texts/../text.txt", "link"])
def test_an_input_is_known_by_any_name(other: str, inputs: Path, run: Run) -> None:
    (inputs / "link").symlink_to("text.txt")
    before = digests(inputs)
    for given, output in (("text.txt", other), (other, "text.txt")):
        command = ("calibrate", "model", "--data", given, "-o", output, "--force")
        assert_refused(run(*command), f"{Path(output)}: {READ}", f"found {Path(given)}", "name")
    assert digests(inputs) == before


@pytest.mark.parametrize("place", [".", "/", ""])
@pytest.mark.parametrize("name", ["calibrate", "plan", "search", "prune", "resumed", "teach"])
def test_an_output_without_a_name_is_refused(name: str, place: str, inputs: Path, run: Run) -> None:
    before = digests(inputs)
    more = {
        "resumed": (*CASES["prune"][:-2], "--resume", "-o"),
        "teach": ("teach", "model", *TEXT[:2], "--plan", "plan.json", "--tokens", 64, "-o"),
    }
    command = more[name] if name in more else CASES[name][:-1]
    words = ("is a directory", "exists already", "inside each other", "names a directory")
    refused = run(*command, place)
    assert refused.exit_code == 2
    assert "Error: " in refused.output
    assert any(each in refused.output for each in words)
    assert digests(inputs) == before


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("texts", "texts: is a directory; name a file"),
        ("model/rows.json", f"model/rows.json: {IN_MODEL}"),
        ("gone/rows.json", "gone/rows.json: its directory does not exist; create it"),
        ("plan.json", "plan.json: holds no rows of compare"),
        (KEPT_WORDS, f"{KEPT_WORDS}: holds no rows of compare"),
        ("rows.json", "rows.json: its directory is not writable; name another"),
    ],
)
def test_a_bad_place_for_the_rows_of_compare_is_refused_before_the_text_is_read(
    keep: str, words: str, inputs: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("refused after the text was read")

    monkeypatch.setattr("surgery.text.documents.local_rows", work)
    if "not writable" in words:
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    before = digests(inputs)
    assert_refused(run(*COMPARE, "--keep", keep), words)
    with pytest.raises(SurgeryError, match=re.escape(words.partition(";")[0])):
        compare("model", data="text.txt", ratio=0.2, methods=["act2"], keep=keep)
    assert digests(inputs) == before


def test_every_command_with_an_output_is_among_them() -> None:
    tried = {str(words[0]) for _, _, *words in OWN_INPUTS.values()}
    for name, command in main.commands.items():
        options = {option for each in command.params for option in each.opts}
        if options & {"--output", "--plot", "--keep"}:
            assert name in tried


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
