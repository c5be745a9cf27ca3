"""Ten wishes of a new user, each by the first command that the README or --help suggests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT, tiny
from tests.support.command import Run, assert_refused
from tests.support.contents import snapshot
from tests.support.json_files import change
from tests.support.plans import layout_of

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
INTERRUPTED = """
import os, signal, sys
from calib.statistics.calibrate import _StatsAccumulator as layers
from surgery.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
real, calls = layers._finish, []
def finish(self, layer):
    real(self, layer)
    calls.append(layer)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
layers._finish = finish
main(prog_name="compact-surgery")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a new user has: a model that chats, some text, and chats."""
    home = tmp_path_factory.mktemp("home")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 512, "vocab_size": 1536}
    tiny.save(home / "my-model", tied=True, num_hidden_layers=6, **sizes)
    change(home / "my-model" / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    prose = tiny.prose(12_000)
    (home / "text.txt").write_text(prose[:8_000], encoding="utf-8")
    (home / "heldout.txt").write_text(prose[8_000:], encoding="utf-8")
    paragraphs = prose.split("\n\n")
    chats = [[{"role": "user", "content": text}] for text in paragraphs]
    for field in ("messages", "conversations"):
        rows = "".join(json.dumps({field: chat}) + "\n" for chat in chats)
        (home / f"{field}.jsonl").write_text(rows, encoding="utf-8")
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the home, which is the working directory."""
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    monkeypatch.chdir(copy)
    return copy


def typed(run: Run, line: str) -> str:
    """Run a command as it is typed; return what it prints."""
    result = run(*shlex.split(line)[1:])
    assert result.exit_code == 0, (line, result.output)
    return result.stdout


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file below ``directory``."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("here")
def test_how_many_parameters(run: Run) -> None:
    shown = typed(run, "compact-surgery inspect my-model")
    assert {"vocabulary", "ffn", "parameters"} <= {line.split()[0] for line in shown.splitlines()}


def test_a_fifth_smaller_and_it_chats(here: Path, run: Run) -> None:
    typed(run, "compact-surgery prune my-model --data text.txt --ratio 0.2 -o my-model-pruned")
    removed = [layout_of(here / name) for name in ("my-model", "my-model-pruned")]
    before, after = (m.parameters(m.vocab_size, m.widths) for m in removed)
    assert after / before == pytest.approx(0.8, abs=0.01)
    tokenizer: Any = AutoTokenizer.from_pretrained("my-model-pruned")
    model: Any = AutoModelForCausalLM.from_pretrained("my-model-pruned")
    chat = [{"role": "user", "content": "Who are you?"}]
    asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > asked["input_ids"].shape[1]


@pytest.mark.usefixtures("here")
def test_what_was_lost(run: Run) -> None:
    sizes = "--vocab-size 512 --intermediate-size 384"
    typed(run, f"compact-surgery prune my-model --data text.txt {sizes} -o smaller")
    removed = typed(run, "compact-surgery inspect smaller --removed")
    assert "Latin" in removed
    channels = typed(run, "compact-surgery inspect smaller --channels")
    assert re.search(r"\d\d\.\d+%", channels)


def test_the_vocabulary_alone_with_one_script_kept(here: Path, run: Run) -> None:
    ratio = "--ratio 0.1 --only vocabulary --keep-script Latin"
    refused = run(*shlex.split(f"prune my-model {ratio} -o smaller"))
    assert refused.exit_code == 2  # Latin is nearly all of this vocabulary
    assert "--ratio: cannot be met" in refused.stderr
    ratio = ratio.replace("Latin", "Cyrillic")
    typed(run, f"compact-surgery prune my-model {ratio} -o smaller")
    before, after = layout_of(here / "my-model"), layout_of(here / "smaller")
    assert after.widths == before.widths
    assert after.vocab_size < before.vocab_size


def test_the_steps_and_the_one_command_give_the_same(here: Path, run: Run) -> None:
    for line in (
        "compact-surgery prune my-model --data text.txt --ratio 0.2 -o my-model-pruned",
        "compact-surgery calibrate my-model --data text.txt --ratio 0.2",
        "compact-surgery plan my-model --stats stats.safetensors --ratio 0.2 --to smaller",
        "compact-surgery apply plan.json",
        "compact-surgery verify smaller --forward",
    ):
        typed(run, line)
    weights = [
        (here / name / "model.safetensors").read_bytes() for name in ("my-model-pruned", "smaller")
    ]
    assert weights[0] == weights[1]


def test_interrupted_and_continued(here: Path, run: Run) -> None:
    line = "compact-surgery prune my-model --data text.txt --ratio 0.2 -o my-model-pruned"
    typed(run, line.replace("-o my-model-pruned", "-o whole"))
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *shlex.split(line)[1:]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130, ended.stderr
    again = ended.stderr.splitlines()[-1].removeprefix("interrupted; continue with: ")
    assert again == f"{line} --resume"
    continued = run(*shlex.split(again)[1:])
    assert continued.exit_code == 0, continued.output
    assert "of 6 layers finished before" in continued.stderr
    assert snapshot(here / "my-model-pruned") == snapshot(here / "whole")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "data", ["--data messages.jsonl", "--data conversations.jsonl --field conversations"]
)
def test_chats_and_a_field_of_another_name(run: Run, data: str) -> None:
    typed(run, f"compact-surgery prune my-model {data} --ratio 0.2 -o smaller")


def test_chats_in_the_form_of_sharegpt(here: Path, run: Run) -> None:
    rows = [json.loads(line) for line in (here / "conversations.jsonl").read_text().splitlines()]
    for row in rows:
        row["conversations"] = [
            {"from": "human", "value": m["content"]} for m in row["conversations"]
        ]
    (here / "sharegpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sharegpt", "conversations"):
        data = f"--data {name}.jsonl --field conversations"
        typed(run, f"compact-surgery calibrate my-model {data} --ratio 0.2 -o {name}.stats")
    assert (here / "sharegpt.stats").read_bytes() == (here / "conversations.stats").read_bytes()


@pytest.mark.usefixtures("here")
def test_a_field_of_another_name_is_named(run: Run) -> None:
    line = "prune my-model --data conversations.jsonl --ratio 0.2 -o smaller"
    refused = run(*shlex.split(line))
    assert refused.exit_code == 2
    assert "conversations" in refused.stderr
    assert "--field" in refused.stderr


def test_a_larger_cut_without_writing(here: Path, run: Run) -> None:
    before = contents(here)
    line = "compact-surgery prune my-model --data text.txt --ratio 0.35 --dry-run"
    shown = typed(run, line)
    assert contents(here) == before
    for word in ("parameters", "35.", "memory", "windows", "nothing was written"):
        assert word in shown


def test_four_layers_gone(here: Path, run: Run) -> None:
    line = "compact-surgery prune my-model --data text.txt --num-hidden-layers 2 -o smaller"
    typed(run, line)
    before, after = layout_of(here / "my-model"), layout_of(here / "smaller")
    assert (before.num_hidden_layers, after.num_hidden_layers) == (6, 2)
    assert (after.vocab_size, after.widths) == (before.vocab_size, before.widths)


@pytest.mark.usefixtures("here")
def test_scores_and_a_comparison(run: Run) -> None:
    typed(run, "compact-surgery prune my-model --data text.txt --ratio 0.2 -o smaller")
    scores = typed(run, "compact-surgery score my-model smaller --data heldout.txt")
    assert {"my-model", "smaller"} <= {line.split()[0] for line in scores.splitlines() if line}
    line = "compact-surgery compare my-model --data text.txt --ratio 0.2 --methods act2,prune"
    rows = typed(run, f"{line} --seq-len 256 --windows 4")
    assert {"dense", "act2", "prune"} <= {line.split()[0] for line in rows.splitlines() if line}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("inspect model.gguf", ("model.gguf: is a file", "GGUF files are not read")),
        ("inspect ggufs", ("ggufs", "has no config.json", "GGUF, which is not read")),
        ("inspect my-model/tokenizer.json", ("is a file", "name my-model")),
        ("inspect plan.json", ("is a file", "--removed or --channels")),
        ("inspect texts", ("texts: is no Hugging Face checkpoint",)),
        ("prune my-model --data text.txt --ratio 0.2", ("--output: is missing", "-o smaller")),
        ("verify my-modle", ("is not a directory", "did you mean my-model?")),
        (
            "plan my-model --vocab-size 400 --keep-tokens keep -o new.json",
            ("keep: cannot be read", "--keep-tokens"),
        ),
        (
            "plan my-model --ratio 0.2 --keep-script Russian -o new.json",
            ("is not a script", "name a script, not a language"),
        ),
    ],
)
def test_mistakes_of_a_beginner(here: Path, run: Run, line: str, words: tuple[str, ...]) -> None:
    for name in ("ggufs", "texts"):
        (here / name).mkdir()
    for name in ("model.gguf", "ggufs/model.gguf", "plan.json"):
        (here / name).write_bytes(b"{}")
    before = contents(here)
    assert_refused(run(*shlex.split(line)), *words)
    assert contents(here) == before


def test_the_next_command_can_be_pasted(here: Path, run: Run) -> None:
    made = typed(run, "compact-surgery plan my-model --vocab-size 600 -o 'my plan.json'")
    then = made.splitlines()[-1].partition("; next: ")[2]
    assert shlex.split(then) == ["compact-surgery", "apply", "my plan.json", "-o", "DIR"]
    applied = typed(run, then.replace("DIR", "'my output'"))
    typed(run, applied.splitlines()[-1].partition("; next: ")[2])
