"""The table of engines: a row for each, with its reason where it cannot run a model."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from surgery.vocabulary.scripts import script_of
from tests.support import tiny
from tools.engines import __main__ as engines
from tools.engines import environments, ids
from tools.engines.comparison import compare, compare_embeddings
from tools.engines.environments import ENGINES, Engine
from tools.engines.jobs import Jobs, best


def result(*texts: list[tuple[int, float]], second: float = -3.0) -> Jobs:
    """Greedy ids with their log-probabilities; id 9 is the second everywhere."""
    return {
        "completions": [[id_ for id_, _ in text] for text in texts],
        "top": [[[(id_, value), (9, second)] for id_, value in text] for text in texts],
    }


def test_texts_are_compared_up_to_where_they_part() -> None:
    wanted = result([(1, -0.1), (2, -0.2)], [(3, -0.3), (4, -0.4)])
    same = compare(wanted, result([(1, -0.1), (2, -0.2)], [(3, -0.35), (4, -0.4)]), ends=())
    assert (same.equal, same.ties, same.right, same.cell) == (2, (), True, "2 of 2")
    assert same.difference == "0.05000"
    other = compare(wanted, result([(1, -0.1), (7, -0.2)], [(3, -0.3), (4, -0.4)]), ends=())
    assert (other.equal, other.right, other.cell) == (1, False, "1 of 2")
    unseen = {**wanted, "top": [[[], []], [[], []]]}
    assert compare(wanted, unseen, ends=()).difference == "not given"


def test_a_tie_is_counted_apart() -> None:
    wanted = result([(1, -0.1), (2, -0.2)], second=-0.2004)
    tied = compare(wanted, result([(1, -0.1), (9, -0.2)]), ends=())
    assert (tied.equal, tied.right, tied.cell) == (0, True, "0 of 1, 1 at a tie of 0.00040")
    wanted = result([(1, -0.1), (2, -0.2)], second=-0.21)
    assert not compare(wanted, result([(1, -0.1), (9, -0.2)]), ends=()).right


def test_texts_end_at_an_end_of_text_token() -> None:
    wanted = result([(1, -0.1), (2, -0.2), (3, -0.3)])
    for found in ([(1, -0.1)], [(1, -0.1), (5, -9.0)]):
        assert compare(wanted, result(found), ends=(2, 5)).right
    assert not compare(wanted, result([(1, -0.1)]), ends=()).right


def test_embeddings_are_compared_by_their_cosine() -> None:
    wanted = {"embeddings": [[1.0, 0.0], [0.6, 0.8]]}
    near = compare_embeddings(wanted, {"embeddings": [[1.0, 1e-4], [0.8, 0.6]]})
    assert (near.texts, near.equal, near.right) == (2, 1, False)
    assert near.difference == "0.20000"


def test_log_probabilities_are_of_the_likeliest_ids() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 0.5])
    found = best(logits.numpy())
    assert [id_ for id_, _ in found] == [1, 3, 2, 5, 0]
    wanted = logits.log_softmax(0)
    assert [value for _, value in found] == pytest.approx([wanted[id_].item() for id_, _ in found])


def test_a_row_for_each_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and, where it is installed, llama.cpp run a model; the others say why not."""
    model, work = tiny.save(tmp_path / "model"), tmp_path / "work"
    monkeypatch.setattr("surgery.export.gguf_file.recorded_pre_tokenizer", lambda _: "gpt-2")
    monkeypatch.setattr(engines, "DENSE_VARIANTS", {})
    broken = Engine("broken", "torch", "no_such_script")
    missing = Engine("missing", "torch", "x", ("no such requirement",), required=True)
    llama = Engine("llama.cpp", "xllamacpp", "llama_cpp", gguf=True)
    work.mkdir()
    monkeypatch.setattr(environments.venv, "create", lambda *_, **__: None)
    rows, faults = engines.rows_of(model, work, [ENGINES[0], broken, missing, llama])
    first, second, third, fourth = rows
    assert first.startswith("| transformers 5 | ")
    assert first.endswith("model, dense | yes | compared with | |")
    assert "model, dense | no: " in second
    assert "no_such_script" in second
    assert third.startswith("| missing |  | model | is not installed: ")
    assert faults == [third]
    if environments.version_of(Path(sys.executable), "xllamacpp"):
        found = re.search(r"model, dense \| yes \| (\d+) of 20(?:, (\d+) at a tie)?", fourth)
        assert found, fourth
        assert sum(int(number or 0) for number in found.groups()) == 20
    else:
        assert "model, dense | no: " in fourth
    shutil.rmtree(model)  # what is kept is not run again
    monkeypatch.setattr(engines, "variants_of", lambda *_: {"dense": model})
    monkeypatch.setattr(engines, "ends_of", lambda _: set())
    assert engines.rows_of(model, work, [ENGINES[0]]) == ([first], [])


def row(engine: str, model: str, found: str) -> str:
    return f"| {engine} | 1 | {model} | yes | {found} | |"


def test_rows_of_other_engines_and_models_stay() -> None:
    old = [
        row("transformers 5", "small, dense", "old"),
        row("vLLM", "small, dense", "old"),
        row("vLLM", "small, both", "old"),
        row("MLX", "small, dense", "old"),
        row("transformers 5", "other, dense", "old"),
    ]
    new = [
        row("transformers 5", "small, dense", "new"),
        row("CTranslate2", "small, dense", "new"),
        row("vLLM", "small, dense", "new"),
        row("transformers 5", "third, dense", "new"),
    ]
    assert engines.merged(old, new) == [*new[:1], new[2], new[1], old[3], old[4], new[3]]
    assert engines.merged([], old) == old


def test_the_page_keeps_what_is_around_its_table(tmp_path: Path) -> None:
    page, first, second = tmp_path / "page.md", row("MLX", "a, b", "x"), row("vLLM", "a, b", "y")
    page.write_text(f"before\n{engines.MARKS[0]}\n\n{engines.MARKS[1]}\nafter\n", "utf-8")
    engines.write_page(page, [first], keep=False)
    engines.write_page(page, [second], keep=True)
    table = "\n".join([*engines.HEAD, second, first])
    wanted = f"before\n{engines.MARKS[0]}\n\n{table}\n\n{engines.MARKS[1]}\nafter\n"
    assert page.read_text("utf-8") == wanted
    engines.write_page(page, [second], keep=False)
    assert first not in page.read_text("utf-8")


def test_the_command_is_red_where_a_required_engine_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is written all the same; a green run says so in its last line."""
    page, model = tmp_path / "page.md", tiny.save(tmp_path / "model")
    page.write_text("\n".join(engines.MARKS), "utf-8")
    monkeypatch.setattr(engines, "PAGE", page)
    options = ["--model", str(model), "--work", str(tmp_path / "work"), "--engine", "vLLM"]
    wrong = row("vLLM", "model, dense", "19 of 20")
    monkeypatch.setattr(engines, "rows_of", lambda *_: ([wrong], [wrong]))
    red = CliRunner().invoke(engines.main, options)
    assert red.exit_code == 1
    assert red.output.endswith(f"Error: these have to be right:\n{wrong}\n")
    assert wrong in page.read_text("utf-8")
    monkeypatch.setattr(engines, "rows_of", lambda *_: ([wrong], []))
    green = CliRunner().invoke(engines.main, options)
    assert green.exit_code == 0
    assert "what has to be right is right: " in green.output.splitlines()[-1]

    def fails(*_: object) -> None:
        raise environments.Failure("no room")

    monkeypatch.setattr(engines, "rows_of", fails)
    stopped = CliRunner().invoke(engines.main, options)
    assert stopped.output == f"Error: {model} cannot be pruned: no room\n"


def test_the_texts_for_ids_are_of_all_scripts_and_the_same_each_time() -> None:
    found = ids.texts()
    assert found == ids.texts()
    assert len(found) == len(set(found)) > 2000
    names = {script_of(character) for text in found for character in text}
    assert len(names - {"Common", "Inherited"}) >= 14
    assert any("\x00" in text for text in found)


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp, llama.cpp as a prebuilt wheel, is not installed",
)
@pytest.mark.parametrize(("pre", "equal"), [("gpt-2", True), ("qwen2", False)])
def test_ids_of_llama_cpp_beside_those_of_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: str, equal: bool
) -> None:
    """A name that is not the tokenizer's is seen: it splits numbers otherwise."""
    model, some = tiny.save(tmp_path / "model"), ids.texts()[3::10]
    monkeypatch.setattr(ids, "python_of", lambda *_: Path(sys.executable))
    monkeypatch.setattr(ids, "texts", lambda: some)
    options = [str(model), "--work", str(tmp_path / "work"), "--pre", pre]
    said = CliRunner().invoke(ids.main, options)
    assert said.exit_code == (0 if equal else 1), said.output
    number = re.search(rf"\| model \| (\d+) of {len(some)} \|", said.output)
    assert number is not None
    assert (int(number[1]) == len(some)) == equal


def test_a_large_model_is_tried_in_fewer_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save(tmp_path / "model")
    assert engines.engines_for(model) == ENGINES
    monkeypatch.setattr(engines, "LARGE_BYTES", 1)
    names = [engine.name for engine in engines.engines_for(model)]
    assert names == ["transformers 5", "llama.cpp"]
    monkeypatch.setattr(engines, "call", lambda *_: None)
    assert list(engines.variants_of(model, tmp_path)) == ["dense", "both", "both, −33 %"]


def test_the_prompts_are_twenty() -> None:
    assert len(engines.PROMPTS.read_text("utf-8").splitlines()) == 20
