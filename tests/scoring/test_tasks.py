"""Answers to the items of task files: exactly those of the whole model."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import calib
import surgery
from calib.scoring.score import run_asked
from calib.scoring.tasks import AskedTasks, Task, read_tasks
from calib.streaming.settings import PassSettings
from surgery.errors import DataError
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import ROOT, tiny
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of, random_plan

FILES = [ROOT / "tools" / "tasks" / f"{name}.jsonl" for name in ("science", "physical", "words")]
SETTINGS = PassSettings(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [Task(task.name, task.items[:10]) for task in read_tasks(FILES)]


@pytest.fixture(scope="module")
def smaller(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with fewer tokens and channels, that is with another tokenizer."""
    output = tmp_path_factory.mktemp("smaller") / "model"
    surgery.apply_plan(random_plan(llama, 512, 40), output=output)
    return output


def full_load_bits(path: Path, tasks: list[Task], key: str = "llama") -> list[float]:
    """Σ −log2 p of each choice's tokens, by the whole model and its own tokenizer, one by one."""
    from transformers import AutoTokenizer

    model, tokenizer = tiny.load(path, key), AutoTokenizer.from_pretrained(path)
    found = []
    for item in (item for task in tasks for item in task.items):
        before = len(tokenizer(item.context)["input_ids"])
        for choice in item.choices:
            ids = torch.tensor([tokenizer(f"{item.context} {choice}")["input_ids"]])
            logs = tiny.logits_of(model, ids)[0].double().log_softmax(-1)
            tokens = logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
            found.append(float(-tokens[before - 1 :].sum()) / math.log(2))
    return found


def streamed_bits(path: Path, tasks: list[Task]) -> list[float]:
    layout = layout_of(path)
    asked = AskedTasks(layout, tasks, load_tokenizer(path))
    run_asked(layout, [asked], SETTINGS)
    return asked.bits()


@pytest.mark.parametrize("key", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("bos", [True, False])
def test_choices_take_the_bits_of_the_whole_model(
    key: str, bos: bool, tmp_path: Path, tasks: list[Task]
) -> None:
    path = tiny.save(tmp_path / "model", key, bos=bos)
    assert streamed_bits(path, tasks) == pytest.approx(full_load_bits(path, tasks, key), rel=1e-5)


def test_a_pruned_model_answers_through_its_own_tokenizer(
    llama: Path, smaller: Path, tasks: list[Task]
) -> None:
    assert streamed_bits(smaller, tasks) == pytest.approx(full_load_bits(smaller, tasks), rel=1e-5)
    found = calib.answer(smaller, tasks=FILES)
    bits = iter(full_load_bits(smaller, read_tasks(FILES)))
    for task, answers in zip(read_tasks(FILES), found.tasks, strict=True):
        for item, right, norm in zip(task.items, answers.right, answers.right_norm, strict=True):
            each = [next(bits) for _ in item.choices]
            per_byte = [b / len(c.encode()) for b, c in zip(each, item.choices, strict=True)]
            assert right == (min(each) == each[item.answer])
            assert norm == (min(per_byte) == per_byte[item.answer])


def test_what_a_model_has_no_positions_for_is_cut_from_the_left(
    tmp_path: Path, tasks: list[Task]
) -> None:
    path = tiny.save(tmp_path / "model", "gpt2", n_positions=24)
    long = [Task(t.name, tuple(i for i in t.items if len(i.context) > 60)) for t in tasks[:1]]
    layout, tokenizer = layout_of(path), load_tokenizer(path)
    asked = AskedTasks(layout, long, tokenizer)
    assert max(map(len, asked.stream.windows)) == 24
    run_asked(layout, [asked], SETTINGS)
    assert np.isfinite(asked.bits()).all()
    words = Task("words", (msgspec.structs.replace(long[0].items[0], choices=("a", "b " * 30)),))
    with pytest.raises(DataError, match="more tokens than the model has positions"):
        AskedTasks(layout, [words], tokenizer)


def test_one_pass_gives_bits_and_answers(llama: Path, smaller: Path, text: Path, run: Run) -> None:
    options = ("--window-bytes", 300, "--samples", 9)
    both = run("score", llama, smaller, "--data", text, *options, *tasks_options(), "--json")
    assert both.exit_code == 0, both.output
    rows = json.loads(both.stdout)
    alone = json.loads(run("score", smaller, "--data", text, *options, "--json").stdout)
    assert rows[1]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert "tasks" not in alone
    before, after = (calib.answer(model, tasks=FILES) for model in (llama, smaller))
    assert rows[0]["tasks"] == json.loads(json.dumps(before.facts()))
    assert rows[1]["tasks"] == json.loads(json.dumps(after.facts(before)))
    share = after.of_task("words").share_of(before.of_task("words"))
    assert rows[1]["tasks"]["words"]["share"] == share.share
    assert rows[1]["tasks"]["mean"]["acc_norm"] == after.accuracy

    table = run("score", llama, smaller, *tasks_options()).stdout.splitlines()
    heads = "acc_norm science physical words mean ± time of the first ±"
    assert table[0].split() == heads.split()
    assert [line.split()[0] for line in table[1:4]] == [str(llama), str(smaller), "chance"]
    assert table[3].split()[1:5] == ["25.0", "50.0", "25.0", "33.3"]
    assert "to 96 + 96 + 96 items" in table[4]
    single = run("score", llama, *tasks_options()[:2]).stdout.splitlines()
    assert single[0].split() == ["acc_norm", "science", "±", "time"]


def tasks_options() -> list[Any]:
    return [part for file in FILES for part in ("--tasks", file)]


ITEM = '{"context": "c", "choices": ["a", "b"], "answer": 1}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["has no item"]),
        ("{", ["line 1: is no item of a task", "choices"]),
        (f"{ITEM}\n[]", ["line 2: is no item of a task"]),
        ('{"context": "c", "choices": ["a", 3], "answer": 1}', ["line 1", "choices[1]"]),
        ('{"context": "c", "choices": ["a", "b"]}', ["line 1", "missing required field `answer`"]),
        (ITEM.replace("1}", "2}"), ["line 1: has an answer that is no index of its choices"]),
        (ITEM.replace("1}", "-1}"), ["line 1: has an answer that is no index of its choices"]),
        (ITEM.replace('"b"', '"a"'), ["line 1: has fewer than two choices, or one twice"]),
        (ITEM.replace('"b"', '" "'), ["line 1: has an empty choice"]),
        (ITEM.replace('"c"', '""'), ["line 1: has an empty context"]),
    ],
)
def test_a_bad_task_file_is_one_line(
    content: str, words: list[str], tmp_path: Path, llama: Path, run: Run
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(content, encoding="utf-8")
    assert_refused(run("score", llama, "--tasks", path), str(path), *words)


def test_strings_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    context = "x\u2028y\u0085z"
    line = ITEM.replace('"c"', f'"{context}"')
    path.write_bytes(f"{line}\r\n{ITEM}\n".encode())
    (task,) = read_tasks([path])
    assert [item.context for item in task.items] == [context, "c"]


def test_other_misuse_is_one_line(tmp_path: Path, llama: Path, run: Run) -> None:
    assert_refused(run("score", llama), "--data: is missing", "--tasks")
    words = "--samples: has no effect without --data"
    assert_refused(run("score", llama, "--tasks", FILES[0], "--samples", 3), words)
    twice = run("score", llama, "--tasks", FILES[0], "--tasks", FILES[0])
    assert_refused(twice, "has the name of another task file")
    mean = tmp_path / "mean.jsonl"
    mean.write_text(ITEM, encoding="utf-8")
    assert_refused(run("score", llama, "--tasks", mean), "has the name of the mean of all tasks")
    missing = tmp_path / "items.jsonl"
    assert_refused(run("score", llama, "--tasks", missing), str(missing), "cannot be read")
    missing.write_bytes(b"\xff")
    assert_refused(run("score", llama, "--tasks", missing), "not UTF-8")
    with pytest.raises(DataError, match="are none"):
        calib.answer(llama, tasks=[])
