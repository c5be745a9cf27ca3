"""The files beside the weights: what an output has of them, and what it leaves out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from surgery.api import apply_plan, make_plan, verify_checkpoint
from surgery.apply.companions import files_left_out
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.planning.plan import Plan
from surgery.verify.files import SAME_BYTES, SAME_TEXT
from tests.support import fp8, tiny
from tests.support.command import Run
from tests.support.contents import snapshot
from tests.support.json_files import change
from tests.support.plans import random_plan

FOLDER = "additional_chat_templates"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


@pytest.mark.parametrize("vocab_size", [512, tiny.VOCAB_SIZE])
def test_chat_templates_with_names_are_carried(
    source: Path, tmp_path: Path, vocab_size: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "default", "tool_use": "<s>tools", "rag": "documents"}
    tokenizer.save_pretrained(source)
    (source / FOLDER / "notes.txt").write_text("not a template")
    plan, out = random_plan(source, vocab_size, 64), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.apply.run._provenance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply_plan(plan, source=source, output=out)
    apply_plan(plan, source=source, output=out, resume=True)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert files_left_out(Checkpoint.open(source), plan.ids()) == [f"{FOLDER}/notes.txt"]


def test_a_folder_of_templates_out_of_the_model_is_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("nobody's business")
    (source / FOLDER).symlink_to(tmp_path / "elsewhere")
    plan = random_plan(source, 512, 64)
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert not (tmp_path / "out" / FOLDER).exists()
    assert files_left_out(Checkpoint.open(source), plan.ids()) == [f"{FOLDER}/x.jinja"]


UNRELATED = {
    "trainer_state.json": b'{"log_history": [{"loss": NaN, "pad_token_id": 700}], "step": 3}',
    "results.json": b'{"a": 1}\n{"a": 2}\n',
    "deep.json": b"[" * 5_000,
    "latin.json": b'{"name": "\xe9"}',
    "params.json": b'{"hidden_dim": 96}',
    "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
}
"""Files of real repositories that are not the model's; their numbers and names are the source's."""


def strings(value: Any) -> Iterator[str]:
    """Every string in parsed JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from strings(child)


@pytest.mark.parametrize("vocab_size", [512, tiny.VOCAB_SIZE])
def test_files_that_are_not_the_model_s_are_left_out_unread(
    source: Path, tmp_path: Path, vocab_size: int
) -> None:
    plain = make_plan(source, vocab_size=vocab_size)
    apply_plan(plain, output=tmp_path / "plain")
    for name, content in UNRELATED.items():
        (source / name).write_bytes(content)
    (source / "configuration.json").write_text("{not read}")
    plan, out = make_plan(source, vocab_size=vocab_size), tmp_path / "out"
    apply_plan(plan, output=out)
    assert verify_checkpoint(out).ok
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"configuration.json"}
    assert (out / "configuration.json").read_text() == "{not read}"
    assert files_left_out(Checkpoint.open(source), plan.ids()) == sorted(UNRELATED)


def test_a_second_set_of_weights_is_named(source: Path, tmp_path: Path, run: Run) -> None:
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "consolidated.safetensors").write_bytes(b"second")
    (source / "pytorch_model.bin").write_bytes(b"third")
    shown = run("plan", source, "--vocab-size", 512, "-o", tmp_path / "plan.json")
    assert shown.exit_code == 0, shown.output
    assert "model.safetensors is read; model.safetensors.index.json beside it" in shown.output
    assert "left out of the output: consolidated.safetensors, pytorch_model.bin" in shown.output
    assert "names a second set of weights" in run("inspect", source).output


def test_a_quantization_config_over_unquantized_weights_is_named(
    source: Path, tmp_path: Path, run: Run
) -> None:
    change(source / "config.json", lambda data: data.update(quantization_config=fp8.section()))
    shown = run("plan", source, "--vocab-size", 512, "-o", tmp_path / "plan.json")
    assert shown.exit_code == 0, shown.output
    assert "has a quantization_config, but no tensor is F8_E4M3" in shown.output


def test_tokens_without_a_row_are_named(tmp_path: Path, run: Run) -> None:
    model = tiny.save(tmp_path / "model", vocab_size=tiny.TOKENS)
    change(model / "tokenizer_config.json", lambda data: data.update(pad_token="[PAD]"))
    shown = run("plan", model, "--vocab-size", 512, "-o", tmp_path / "plan.json")
    assert shown.exit_code == 0, shown.output
    assert "added tokens without a row in the embedding, before and after: 1;" in shown.output


def test_a_plan_says_that_an_adapter_is_no_part_of_it(source: Path) -> None:
    assert not any("adapter" in note for note in make_plan(source, vocab_size=512).provenance.notes)
    (source / "adapter_config.json").write_text("{}")
    assert any(
        "adapter_config.json" in note for note in make_plan(source, vocab_size=512).provenance.notes
    )


@pytest.mark.parametrize("vocab_size", [512, tiny.VOCAB_SIZE])
def test_every_file_that_the_output_names_is_there(
    source: Path, tmp_path: Path, vocab_size: int
) -> None:
    code = {
        "auto_map": {"AutoModel": "modeling_x.Model"},
        "custom_pipelines": {"chat": {"impl": "pipeline_x.Chat", "pt": ["AutoModel"]}},
    }
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        data = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(data | code))
    for name in ("modeling_x.py", "pipeline_x.py", "adapter_model.safetensors", "2_Dense"):
        (source / name).touch()
    (source / "adapter_config.json").write_bytes(UNRELATED["adapter_config.json"])
    (source / "modules.json").write_bytes(b'[{"path": "1_Pooling", "type": "Pooling"}]')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_bytes(b"{}")
    out = tmp_path / "out"
    apply_plan(make_plan(source, vocab_size=vocab_size), output=out)
    named = {
        text.partition(".")[0]
        for path in out.glob("*.json")
        if path.name != "tokenizer.json"
        for text in strings(json.loads(path.read_text()))
    }
    lost = {path.stem for path in source.iterdir() if not (out / path.name).exists()}
    assert {"modeling_x", "pipeline_x", "2_Dense", "adapter_model"} <= lost
    assert "1_Pooling" in named
    assert not named & lost


def test_the_same_plan_gives_the_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        (tmp_path / place / "mine").mkdir(parents=True)
        source = tiny.save(tmp_path / place / "model")
        out = tmp_path / place / "mine" / "out"
        random_plan(source, 512, 64).save(tmp_path / place / "plan.json")
        apply_plan(tmp_path / place / "plan.json", output=out)
        found.append(snapshot(out))
    assert found[0] == found[1]
    assert [name for name, raw in found[0].items() if str(tmp_path).encode() in raw] == []


def card_of(source: Path, output: Path, plan: Plan) -> str:
    apply_plan(plan, source=source, output=output)
    return (output / "README.md").read_text("utf-8")


def test_the_model_card_says_what_is_so(source: Path, tmp_path: Path) -> None:
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"_name_or_path": "models/llama"}))
    channels = card_of(source, tmp_path / "channels", random_plan(source, tiny.VOCAB_SIZE, 64))
    assert "act2 over 1 calibration tokens" in channels
    assert "rows" not in channels.partition("| bytes")[2]
    rows = make_plan(source, vocab_size=512)
    text = card_of(source, tmp_path / "rows", rows)
    assert "rarest by merge order" in text
    assert "calibration" not in text
    counted = make_plan(source, vocab_size=512, vocab_by="frequency", data=[tiny.prose()])
    assert "by their frequency" in card_of(source, tmp_path / "counted", counted)
    assert "models/llama" not in text
    assert "base_model" not in text
    assert "A smaller checkpoint of `model`" in text


@pytest.mark.parametrize(
    ("named", "base", "published"),
    [
        ("org/name@main", "org/name", "org/name@main"),
        (f"/c/models--org--na-me/snapshots/{'0' * 40}", "org/na-me", f"org/na-me@{'0' * 40}"),
        ("/home/me/models/mine", None, "mine"),
        ("C:\\models\\mine\\", None, "mine"),
    ],
)
def test_the_base_model_is_the_hub_s(
    source: Path, tmp_path: Path, named: str, base: str | None, published: str
) -> None:
    plan = msgspec.structs.replace(make_plan(source, vocab_size=512), source=named)
    card = card_of(source, tmp_path / "out", plan)
    assert (f'base_model: "{base}"' in card) == (base is not None)
    assert ("base_model" in card) == (base is not None)
    written = json.loads((tmp_path / "out" / "compact_surgery.json").read_text())
    assert written["plan"]["source"] == published
    assert plan.published().digest == plan.digest


def test_verify_finds_the_source_by_the_plan_beside_the_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "out", tmp_path / "any name"
    random_plan(source, 512, 64).save(plan)
    apply_plan(plan, output=out)
    monkeypatch.chdir(tmp_path)  # a directory of the source's name is not the source
    random_plan(source, 512, 48).save(tmp_path / "other.plan.json")
    (tmp_path / "broken.plan.json").write_text("{")
    assert not verify_checkpoint(out).skipped
    plan.unlink()
    report = verify_checkpoint(out)
    assert report.ok
    assert set(report.skipped) == {SAME_BYTES, SAME_TEXT}
    assert not verify_checkpoint(out, source=source).skipped
    change(out / "compact_surgery.json", lambda data: data["plan"].update(source=str(source)))
    report = verify_checkpoint(out)  # a path that only the output names is not opened
    assert set(report.skipped) == {SAME_BYTES, SAME_TEXT}
