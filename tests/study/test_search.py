"""search, compare and --repair as commands."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calib
from calib.study.study import Candidate, Study
from calib.study.table import LAYER_METHODS, METHODS, Row
from calib.text.heldout import split_documents
from calib.text.windows import byte_windows
from surgery.files.atomic import FileLock
from surgery.planning.layers import format_layers
from surgery.planning.plan import Plan
from surgery.text.documents import read_documents
from tests.support import tiny
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of
from tools.tasks.records import FOLDER

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "vocab_size": 1536,
    "tied": True,
}
TEXT = ("--seq-len", 128, "--samples", 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("search") / "model", **SIZES)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.prose(24_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own_words(model: Path) -> str:
    """Text that the model itself is likely to say, so that a better copy of it shows."""
    from surgery.tokenizer.tokenizer_file import load_tokenizer

    dense: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dense.get_input_embeddings().weight.data *= 8  # else all tokens are about as likely
    torch.manual_seed(0)
    with torch.no_grad():
        ids = dense.generate(
            torch.tensor([[1]] * 40), min_new_tokens=150, max_new_tokens=150, do_sample=True
        )
    dense.save_pretrained(model)
    tokenizer = load_tokenizer(model)
    lines = (tokenizer.decode(row.tolist()).replace("\n", " ") for row in ids)
    return "\n".join(lines)


def test_search_prints_the_table_plots_and_plans(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    options = ("--ratio", 0.2, "--data", prose, *TEXT, "--multiple-of", 32)
    best = tmp_path / "best.json"
    result = run("search", model, *options, "-o", best, "--plot", tmp_path / "p.png", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[0])
    assert len(rows) >= 3
    winner = min(rows, key=lambda row: row["loss"])
    plan = Plan.load(best)
    assert plan.after.vocab_size == winner["vocab_size"]
    assert plan.after.widths == winner["widths"]
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert run("apply", best, "-o", tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path / "out", "--forward").exit_code == 0
    shown = run("search", model, *options)
    assert shown.stderr.count("to rank them well: give more text, or more --samples") == 1
    text = shown.stdout.splitlines()
    assert len([line for line in text if line.endswith("best")]) == 1
    assert text[1].split()[0] == "dense"
    assert any(line.startswith("held out: ") for line in text)
    assert text[-2].startswith("took ")
    words = shlex.split(text[-1].removeprefix("best: ").replace("TEXT", str(prose)))
    words[-1] = str(tmp_path / "pruned")
    made = run(*words[1:], *TEXT)
    assert made.exit_code == 0, made.output
    assert Plan.load(tmp_path / "pruned.plan.json").after == plan.after


def test_the_command_to_go_on_with_chooses_tokens_as_the_search_did(
    model: Path, prose: Path, run: Run
) -> None:
    chosen = ("--vocab-by=frequency", "--drop-reserved", "--keep-script=Greek")
    candidates = ("--candidates", "600:512,560:512", "--data", prose, *TEXT)
    shown = run("search", model, *candidates, *chosen)
    assert shown.exit_code == 0, shown.output
    assert set(chosen) < set(shlex.split(shown.stdout.splitlines()[-1]))


def test_a_picture_and_what_is_written_beside_it_are_two_files(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    for command, option in (("search", "--output"), ("compare", "--keep")):
        given = ("--ratio", 0.2, "--data", prose, *TEXT, option, tmp_path / "p.png")
        refused = run(command, model, *given, "--plot", tmp_path / ".." / tmp_path.name / "p.png")
        assert_refused(refused, "p.png", option)


def test_candidates_are_tried_as_they_are(model: Path, prose: Path, run: Run) -> None:
    options = ("--data", prose, *TEXT, "--candidates", "450:512,1536:100")
    rows = json.loads(run("search", model, *options, "--json").stdout)
    assert [(row["vocab_size"], *row["widths"].values()) for row in rows] == [
        (450, 512),
        (1536, 100),
    ]


def test_the_best_sizes_take_the_fewest_bits_over_all_bytes(
    model: Path, own_words: str, tmp_path: Path, run: Run
) -> None:
    """Even beside a smaller vocabulary that takes fewer bits for the words it does not split."""
    text = tmp_path / "own.txt"
    text.write_text(own_words, encoding="utf-8")
    options = ("--candidates", "544:480,1536:480", "--data", text, *TEXT)
    rows = json.loads(run("search", model, *options, "--json").stdout)
    lines = run("search", model, *options).stdout.splitlines()
    (best,) = [line.split()[0] for line in lines if line.endswith("  best")]
    assert best == min(rows, key=lambda row: row["bits_per_byte"])["name"] == "1536:480"
    assert "--vocab-size=1536" in lines[-1]


@pytest.mark.parametrize("repair", ["least-squares", "reconstruct"])
def test_repair_is_used_where_it_helps_and_survives_apply(
    model: Path, own_words: str, tmp_path: Path, run: Run, repair: str
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(own_words, encoding="utf-8")
    sizes = ("--vocab-size", 1536, "--intermediate-size", 192)
    options = ("--data", text, *TEXT, *sizes, "--repair", repair)
    result = run("prune", model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "matrices refitted by least squares" in result.output
    assert ("FFNs trained" in result.output) == (repair == "reconstruct")
    plan = Plan.load(tmp_path / "out.plan.json")
    assert plan.replaced is not None
    assert Path(plan.replaced.file) == tmp_path / "out.plan.repair.safetensors"
    assert run("verify", tmp_path / "out", "--forward").exit_code == 0
    plain = run("prune", model, *options[:-1], "none", "-o", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    scores = [
        json.loads(run("score", tmp_path / name, "--data", text, "--json").stdout)["bits_per_byte"]
        for name in ("plain", "out")
    ]
    assert scores[1] < scores[0]


def test_repair_that_does_not_help_is_left_out(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    rng = np.random.default_rng(0)
    noise = tmp_path / "noise.txt"
    noise.write_text("".join(map(chr, rng.integers(97, 123, 24_000))), encoding="utf-8")
    sizes = ("--vocab-size", 1536, "--intermediate-size", 500)
    stats, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    assert run("calibrate", model, "--data", prose, *TEXT, "-o", stats).exit_code == 0
    options = ("--stats", stats, *sizes, "--data", noise, "--repair", "least-squares")
    result = run("plan", model, *options, "-o", plan)
    assert result.exit_code == 0, result.output
    used = Plan.load(plan).replaced is not None
    assert used == (tmp_path / "plan.repair.safetensors").exists()
    assert used != ("not repaired, for it does not help" in result.output)


def test_compare_has_a_row_for_each_method_and_ratio(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    options = ("--ratio", "0.2,0.3", "--data", prose, *TEXT, "--multiple-of", 64, "--windows", 4)
    picture = tmp_path / "methods.png"
    result = run("compare", model, *options, "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["0.2", "0.3"]
    _, held = split_documents(read_documents(str(prose)))
    windows = byte_windows(held, 4, 2048)
    size = len(windows), sum(len(window.encode()) for window in windows)
    for ratio, rows in found.items():
        assert [row["name"] for row in rows] == ["dense", *METHODS]
        dense, *others = rows
        assert (dense["removed"], dense["loss"]) == (0, 0)
        assert {(row["heldout_windows"], row["heldout_bytes"]) for row in rows} == {size}
        for row in others:
            more = sum(row["window_bits"]) / sum(dense["window_bits"]) - 1
            assert row["loss"] == pytest.approx(more)
            whole_layers = row["name"] in ("shortgpt", "laco")
            if row["name"] == "slicegpt":  # the ratio is of columns, and matrices are added
                continue
            assert row["removed"] == pytest.approx(
                float(ratio), abs=0.12 if whole_layers else 0.006
            )
            assert (row["num_hidden_layers"] < tiny.LAYERS) == whole_layers
    assert picture.stat().st_size > 5000
    some = run("compare", model, *options, "--methods", "act2,shortgpt").output
    lines = {line.split()[0]: line for line in some.splitlines() if line}
    assert "laco" not in lines
    assert "0.0%" in lines["dense"]
    assert "best" not in lines["dense"]
    assert "%*" in lines["shortgpt"]  # one of three layers is not 30 %
    assert "%*" not in lines["act2"]
    assert lines["held"].startswith("held out: {:,} windows, {:,} bytes".format(*size))
    assert {"loss:", "*:", "took"} <= lines.keys()


def test_compared_methods_answer_the_same_items(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    options = ("--ratio", "0.2,0.3", "--data", prose, *TEXT, "--multiple-of", 64, "--windows", 4)
    asked = ("--tasks", FOLDER / "words.jsonl", "--methods", "act2,shortgpt,compact")
    picture = tmp_path / "answers.svg"
    plain = json.loads(run("compare", model, *options, *asked[2:], "--json").stdout)
    shown = run("compare", model, *options, *asked, "--plot", picture, "--json").stdout
    found = json.loads(shown)
    dense = calib.answer(model, tasks=FOLDER / "words.jsonl")
    for ratio, rows in found.items():
        assert rows[0]["tasks"]["words"]["acc_norm"] == dense.accuracy
        for row, bits in zip(rows, plain[ratio], strict=True):
            answers = row.pop("tasks")["mean"]
            assert answers["share"] == pytest.approx(answers["acc_norm"] / dense.accuracy)
            assert (row["name"], row["widths"]) == (bits["name"], bits["widths"])
            for figure in ("bits_per_byte", "loss"):
                assert row[figure] == pytest.approx(bits[figure], rel=1e-5)
    assert "guessing" in picture.read_text(encoding="utf-8")
    lines = run("compare", model, *options, *asked, "--ratio", "0.2").stdout.splitlines()
    assert lines[1].split()[-5:] == ["acc_norm", "of", "dense", "±", "time"]
    (legend,) = [line for line in lines if line.startswith("acc_norm:")]
    assert "to 96 words items" in legend


def test_compare_goes_on_where_a_killed_run_stopped(
    model: Path, prose: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    options = ("--data", prose, *TEXT, "--multiple-of", 64, "--windows", 4, "--tries", 2, "--json")
    asked = ("--ratio", "0.3", "--keep", file)
    first = run("compare", model, *options, *asked, "--methods", "random,compact")
    dense, random, compact = json.loads(first.stdout)["0.3"]
    assert len(dense["window_bits"]) == dense["heldout_windows"]
    assert (dense["seconds"], random["seconds"] < compact["seconds"]) == (0, True)
    tried: list[list[str]] = []
    rows = Study.rows

    def noted(study: Study, candidates: Sequence[Candidate], *more: Any, **named: Any) -> list[Row]:
        tried.append([candidate.name for candidate in candidates])
        return rows(study, candidates, *more, **named)

    monkeypatch.setattr(Study, "rows", noted)
    again = run("compare", model, *options, *asked, "--methods", "compact,act2,random")
    found = json.loads(again.stdout)["0.3"]
    assert tried == [["act2"]]
    assert [row["name"] for row in found] == ["dense", "compact", "act2", "random"]
    assert (found[1], found[3]) == (compact, random)
    others = ("--ratio", "0.3", "--keep", file, "--tries", 3)
    assert_refused(run("compare", model, *options, *others), "holds rows of another comparison")
    other = shutil.copytree(model, tmp_path / "trained")  # the same headers, other weights
    name = next(other.glob("*.safetensors"))
    save_file({k: v * 1.5 for k, v in load_file(name).items()}, name, {"format": "pt"})
    changes = ((other, ()), (model, ("--vocab-by", "frequency")))
    for source, order in changes:
        refused = run("compare", source, *options, *asked, *order)
        assert_refused(refused, "holds rows of another comparison")
    nowhere = ("--ratio", "0.3", "--keep", tmp_path / "gone/rows.json")
    assert_refused(run("compare", model, *options, *nowhere), "its directory does not exist")
    lock = file.with_name("rows.json.lock")
    assert not lock.exists()
    with FileLock(lock):  # as another run does
        refused = run("compare", model, *options, *asked)
    assert_refused(refused, f"{file}: is being written by another run; wait for it, or name")
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "version": 1}))  # its best rows were chosen otherwise
    assert_refused(run("compare", model, *options, *asked), "holds rows of another comparison")
    del kept["rows"]["0.3"]["dense"]
    for damaged in (json.dumps(kept), "{}"):
        file.write_text(damaged)
        assert_refused(run("compare", model, *options, *asked), "holds no rows of compare")


def test_search_lets_all_sizes_answer(model: Path, prose: Path, run: Run) -> None:
    sizes = ("--candidates", "640:64,512:96", "--data", prose, *TEXT, "--windows", 4)
    asked = ("--tasks", FOLDER / "words.jsonl")
    plain = json.loads(run("search", model, *sizes, "--json").stdout)
    shown = run("search", model, *sizes, *asked, "--json")
    for row, answered in zip(plain, json.loads(shown.stdout), strict=True):
        right = answered.pop("tasks")["words"]
        assert len(right["right_norm"]) == right["items"] == 96
        assert sum(right["right_norm"]) / 96 == pytest.approx(right["acc_norm"])
        assert answered == row


def test_compare_has_the_plan_that_prune_would_make(
    model: Path, prose: Path, tmp_path: Path, run: Run
) -> None:
    """Of the same text, without what compare holds out."""
    ratio = ("--ratio", 0.3, "--multiple-of", 64)
    options = ("--data", prose, *TEXT, *ratio, "--windows", 4, "--methods", "prune", "--json")
    (_, found) = json.loads(run("compare", model, *options).stdout)["0.3"]
    kept, held = split_documents(read_documents(str(prose)))
    out = tmp_path / "out"
    calibration = tmp_path / "kept.jsonl"
    calibration.write_text("".join(json.dumps({"text": part}) + "\n" for part in kept), "utf-8")
    heldout = calibration.with_name("held.jsonl")
    heldout.write_text("".join(json.dumps({"text": part}) + "\n" for part in held), "utf-8")
    made = run("prune", model, "--data", calibration, *TEXT, *ratio, "-o", out)
    assert made.exit_code == 0, made.output
    plan = Plan.load(tmp_path / "out.plan.json")
    assert (plan.after.vocab_size, plan.after.widths) == (found["vocab_size"], found["widths"])
    assert plan.after.parameters == found["parameters"]
    score = json.loads(run("score", out, "--data", heldout, "--samples", 4, "--json").stdout)
    assert score["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)


def test_compare_by_amount_of_text(model: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    options = ("--ratio", 0.2, "--data", prose, *TEXT, "--multiple-of", 64, "--windows", 4)
    picture = tmp_path / "samples.png"
    result = run("compare", model, *options, "--by-samples", "2,8", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "no standard checkpoint" not in result.output  # of methods that it does not try
    assert [line.split()[0] for line in result.stdout.splitlines()[2:5]] == ["dense", "2", "8"]
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--ratio", 0), "--ratio: is no share of the parameters"),
        (("search", "--ratio", 0.97), "--ratio: cannot be met by sizes in steps of"),
        (("search",), "--ratio: is not given; give one, such as 0.2, or --candidates"),
        (("search", "--ratio", 0.2, "--candidates", "450:512"), "and --candidates exclude each"),
        (("search", "--multiple-of", 8, "--candidates", "450:512"), "--multiple-of: has no effect"),
        (
            ("search", "--ratio", 0.2, "--expert-criterion", "man"),
            "--expert-criterion: has no effect for a model without routed experts",
        ),
        (("search", "--candidates", "1"), "--candidates: are no pairs of sizes"),
        (("search", "--candidates", "9:9"), "--vocab-size: is out of reach"),
        (("search", "--candidates", "1536:9999"), "is out of reach"),
        (("search", "--ratio", 0.2, "--plot", "no/p.png"), "no/p.png: its directory"),
        (("compare", "--ratio", 0.2, "--plot", "no/p.png"), "its directory does not exist"),
        (("compare", "--ratio", "x"), "is no list of numbers"),
        (("compare", "--ratio", "0.2,-1"), "is not between 0 and 1,000,000"),
        (("compare", "--ratio", "0.2", "--methods", "magic"), "--methods: no method magic"),
        (
            ("plan", "--ratio", 0.2, "--repair", "least-squares"),
            "--repair needs --stats and --data",
        ),
    ],
)
def test_bad_requests_are_one_line(
    model: Path, prose: Path, run: Run, arguments: tuple[object, ...], message: str
) -> None:
    command, *options = arguments
    text = () if command == "plan" else ("--data", prose, *TEXT)
    result = run(command, model, *options, *text)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_text_that_cannot_be_divided_is_refused(model: Path, tmp_path: Path, run: Run) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abc", encoding="utf-8")
    result = run("search", model, "--ratio", 0.2, "--data", short, *TEXT)
    assert result.exit_code == 2
    assert "--data" in result.output


def test_compare_removes_no_layer_where_the_ratio_is_small(
    model: Path, prose: Path, run: Run
) -> None:
    """Then every channel stays as well, and nothing else would measure the layers' influence."""
    options = ("--ratio", 0.004, "--data", prose, *TEXT, "--multiple-of", 8, "--json")
    for methods in ("shortgpt", "laco,shortgpt", "vocabulary,shortgpt,act2"):
        result = run("compare", model, *options, "--methods", methods)
        assert result.exit_code == 0, result.output
        rows = {row["name"]: row for row in json.loads(result.stdout)["0.004"]}
        assert set(rows) == {"dense", *methods.split(",")}
        assert rows["shortgpt"]["num_hidden_layers"] == tiny.LAYERS
        assert rows["shortgpt"]["loss"] == 0


def test_compare_of_one_layer_leaves_out_what_removes_layers(
    tmp_path: Path, prose: Path, run: Run
) -> None:
    one = tiny.save(tmp_path / "one", **SIZES, num_hidden_layers=1)
    options = ("--ratio", 0.1, "--data", prose, *TEXT, "--multiple-of", 8)
    result = run("compare", one, *options, "--json")
    assert result.exit_code == 0, result.output
    assert "without shortgpt and laco" in result.stderr
    names = {row["name"] for row in json.loads(result.stdout)["0.1"]}
    assert names == {"dense", *METHODS} - {*LAYER_METHODS}
    for method in LAYER_METHODS:
        refused = run("compare", one, *options, "--methods", method)
        assert_refused(refused, "has one layer", "--methods")


@pytest.mark.parametrize("command", ["search", "search -o", "compare", "plan", "calibrate"])
def test_spilled_states_are_never_in_memory(
    model: Path,
    prose: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    stats, spill = tmp_path / "stats.safetensors", tmp_path / "spill"
    text = ("--data", prose, *TEXT)
    spill.mkdir()
    assert run("calibrate", model, *text, "-o", stats).exit_code == 0
    name, *rest = command.split()
    ratio = ("--ratio", 0.2, "--multiple-of", 32)
    more = {
        "search": (*text, *ratio, "--repair", "least-squares"),
        "compare": (*text, *ratio, "--methods", "compact,shortgpt,search"),
        "plan": ("--data", prose, *ratio, "--stats", stats, "--repair", "least-squares"),
        "calibrate": (*text, "-o", tmp_path / "again"),
    }

    def allocate(*_: object) -> None:
        raise AssertionError("hidden states in memory")

    monkeypatch.setattr("calib.streaming.hidden_states.HiddenStates.allocate", allocate)
    planned = [tmp_path / "best.json" for _ in rest]
    output = ("-o", tmp_path / "plan.json") if name == "plan" else ()
    result = run(name, model, *more[name], *rest, *planned, *output, "--spill", spill)
    assert result.exit_code == 0, (result.output, result.exception)
    assert not list(spill.iterdir())


def test_experts_are_compared_where_they_are_named(tmp_path: Path, run: Run) -> None:
    source, text = tiny.save(tmp_path / "model", "qwen3_moe", num_experts=8), tmp_path / "t.txt"
    text.write_text(tiny.prose(20_000))
    take: list[Any] = ["--data", text, "--samples", 4, "--seq-len", 32, "--windows", 2]
    take += ["--ratio", 0.2, "--multiple-of", 4]
    names = "reap,man,msan,frequency,gate,aimer,random-experts"
    found = run("compare", source, *take, "--methods", names, "--json")
    assert found.exit_code == 0, found.output
    rows = next(iter(json.loads(found.stdout).values()))
    assert [row["name"] for row in rows] == ["dense", *names.split(",")]
    assert [row["experts"] for row in rows] == [8] + [5] * 7
    shown = run("compare", source, *take, "--methods", "reap,act2,search")
    lines = {line.split()[0]: line.split() for line in shown.output.splitlines() if line}
    column = lines["cut"].index("experts")
    assert lines["act2"][column] == "8"
    assert lines["search"][column] in [str(count) for count in range(2, 9)]
    dense = run("compare", tiny.save(tmp_path / "llama"), *take, "--methods", "reap")
    assert dense.exit_code == 2
    assert "no routed experts" in dense.output


TAKE = ("--samples", 12, "--seq-len", 64, "--min-expert-tokens", 0)


def test_search_of_a_mixture_varies_experts_and_plans_the_best(
    tmp_path: Path, prose: Path, run: Run
) -> None:
    source = tiny.save(tmp_path / "model", "qwen3_moe", num_experts=8)
    options = ("--ratio", 0.3, "--data", prose, *TAKE, "--windows", 3, "--multiple-of", 8)
    best, picture = tmp_path / "best.json", tmp_path / "p.png"
    result = run("search", source, *options, "-o", best, "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[0])
    assert len({row["experts"] for row in rows}) > 2
    assert [row["experts"] for row in rows] == sorted(row["experts"] for row in rows)
    assert all(row["removed"] == pytest.approx(0.3, abs=0.0051) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    winner = min(rows, key=lambda row: row["loss"])
    plan = Plan.load(best)
    for key in ("vocab_size", "experts", "widths", "parameters"):
        assert getattr(plan.after, key) == winner[key]
    assert picture.stat().st_size > 5000
    shown = run("search", source, *options, "--expert-criterion", "man").stdout.splitlines()
    assert "experts" in shown[0]
    words = shlex.split(shown[-1].removeprefix("best: ").replace("TEXT", str(prose)))
    words[-1] = str(tmp_path / "pruned")
    made = run(*words[1:], *TAKE[:4])
    assert made.exit_code == 0, made.output
    plan = Plan.load(tmp_path / "pruned.plan.json")
    (marked,) = [line.split() for line in shown if line.endswith("best")]
    sizes = (plan.after.vocab_size, plan.after.experts, *plan.after.widths.values())
    assert marked[0] == ":".join(map(str, sizes))
    assert plan.provenance.expert_criterion in ("man", None)
    assert run("verify", tmp_path / "pruned", "--forward").exit_code == 0


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("qwen3_moe", "640:5:24,500:6:32"),
        ("deepseek_v3", "640:6:24"),
    ],
)
def test_a_triple_is_what_plan_and_score_make_of_it(
    tmp_path: Path, prose: Path, run: Run, key: str, sizes: str
) -> None:
    """Of the same text, without what search holds out."""
    source = tiny.save(tmp_path / "model", key, num_local_experts=8)
    options = ("--data", prose, *TAKE, "--windows", 3, "--candidates", sizes)
    result = run("search", source, *options, "--json")
    assert result.exit_code == 0, result.output
    kept, held = split_documents(read_documents(str(prose)))
    texts = {"kept": kept, "held": held}
    for name, parts in texts.items():
        lines = "".join(json.dumps({"text": part}) + "\n" for part in parts)
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
    for number, row in enumerate(json.loads(result.stdout)):
        out = tmp_path / str(number)
        widths = [f"--width={name}={size}" for name, size in row["widths"].items()]
        made = run(
            *("prune", source, "--data", tmp_path / "kept.jsonl", *TAKE, "-o", out, *widths),
            *("--vocab-size", row["vocab_size"], "--num-experts", row["experts"]),
        )
        assert made.exit_code == 0, made.output
        assert Plan.load(tmp_path / f"{number}.plan.json").after.parameters == row["parameters"]
        held_out = ("--data", tmp_path / "held.jsonl", "--samples", 3, "--json")
        score = json.loads(run("score", out, *held_out).stdout)
        assert score["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-5)


def test_layers_that_keep_the_pattern_are_preferred(tmp_path: Path, prose: Path, run: Run) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]  # Gemma's own period is 6
    given: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": kinds}
    source = tiny.save(tmp_path / "model", "gemma3_text", **given)
    options = ("--data", prose, *TAKE, "--windows", 2, "--only", "layers", "--ratio", 0.1)
    plan = tmp_path / "plan.json"
    result = run("search", source, *options, "-o", plan, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[0])
    assert {row["num_hidden_layers"] for row in rows} == {3}
    assert rows[-1]["name"] == "0-2"  # no full attention: that is what an engine would count
    chosen = min(rows, key=lambda row: row["loss"])
    if rows[-1]["loss"] <= chosen["loss"] + 0.01:
        chosen = rows[-1]
    found = Plan.load(plan)
    assert format_layers(found.layers) == chosen["name"]
    assert run("apply", plan, "-o", tmp_path / "out").exit_code == 0
    shown = run("search", source, *options)
    assert f"--layers={chosen['name']}" in shown.stdout.splitlines()[-1]


def test_a_first_layer_that_stays_is_in_all_rows(tmp_path: Path, prose: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "model", "modernbert-decoder", num_hidden_layers=4)
    options = ("--data", prose, *TAKE, "--windows", 2, "--only", "layers", "--ratio", 0.2)
    result = run("search", source, *options, "-o", tmp_path / "plan.json", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[0])
    assert all(row["name"].startswith("0") for row in rows)
    assert Plan.load(tmp_path / "plan.json").layers[0] == [0]


@pytest.mark.parametrize("key", ["modernbert-decoder", "qwen2_moe", "deepseek_v3", "qwen3_next"])
def test_layers_of_several_shapes_are_removed_but_not_merged(
    tmp_path: Path, prose: Path, run: Run, key: str
) -> None:
    source = tiny.save(tmp_path / "model", key)
    sizes = ("--ratio", 0.3, "--multiple-of", 8)
    options = ("--data", prose, "--samples", 4, "--seq-len", 64, "--windows", 2, *sizes)
    assert_refused(run("compare", source, *options, "--methods", "laco"), "cannot be merged")
    result = run("compare", source, *options, "--methods", "shortgpt", "--json")
    assert result.exit_code == 0, result.output


def test_only_limits_the_axes_of_a_search(tmp_path: Path, prose: Path, run: Run) -> None:
    source = tiny.save(tmp_path / "model", "qwen3_moe", num_experts=8)
    options = ("--data", prose, *TAKE, "--windows", 2, "--multiple-of", 2, "--ratio", 0.3, "--json")
    layout = layout_of(source)
    full = {"vocab_size": 640, "experts": 8, "widths": dict(layout.widths)}
    keys = {"vocabulary": "vocab_size", "experts": "experts", "channels": "widths"}
    for only in ("vocabulary,channels", "experts,channels", "experts"):
        result = run("search", source, *options, "--only", only)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        changed = {part for part, key in keys.items() if any(row[key] != full[key] for row in rows)}
        assert changed == {*only.split(",")}
    for only, words in (
        ("layers", "--multiple-of: has no effect where layers are searched"),
        ("rows", "found 'rows'"),
    ):
        assert_refused(run("search", source, *options, "--only", only), words)
    dense = tiny.save(tmp_path / "dense", intermediate_size=96)
    refused = run("search", dense, *options, "--only", "experts,vocabulary")
    assert_refused(refused, "no routed experts")
