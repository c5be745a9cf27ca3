"""GLiNER: an encoder within a model of another library loses tokens and channels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from surgery.api import apply_plan, make_plan, verify_checkpoint
from surgery.errors import SurgeryError
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import tiny_encoders
from tests.support.command import Run
from tests.support.plans import layout_of, random_plan

INSIDE = "token_rep_layer.bert_layer.model."
MARKS = ["<<ENT>>", "<<SEP>>"]
HEADS = {
    "rnn.lstm.weight_ih_l0": (64, 32),
    "span_rep_layer.span_rep_layer.project_start.0.weight": (8, 32),
    "prompt_rep_layer.0.weight": (8, 32),
    "token_rep_layer.projection.weight": (32, 32),
}


def save(path: Path, key: str = "deberta-v2", **changes: Any) -> Path:
    """A directory as the package gliner saves it, with an encoder of this type."""
    tiny_encoders.save(path, key, "base")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.save_pretrained(path)
    encoder = AutoModel.from_pretrained(path, dtype=torch.float32)
    encoder.resize_token_embeddings(len(tokenizer))
    tensors = {INSIDE + name: value.clone() for name, value in encoder.state_dict().items()}
    made = torch.Generator().manual_seed(0)
    tensors |= {name: torch.randn(shape, generator=made) for name, shape in HEADS.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").unlink()
    config = {
        "model_name": "org/encoder",
        "model_type": "gliner_uni_encoder_span",
        "vocab_size": len(tokenizer),
        "class_token_index": tokenizer.convert_tokens_to_ids(MARKS[0]),
        "embed_ent_token": True,
        "ent_token": MARKS[0],
        "sep_token": MARKS[1],
        "hidden_size": 32,
        "labels_encoder": None,
        "encoder_config": encoder.config.to_dict(),
        **changes,
    }
    (path / "gliner_config.json").write_text(json.dumps(config), "utf-8")
    return path


def config_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "gliner_config.json").read_text("utf-8")))


def states(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """What the encoder within makes of ids."""
    encoder = AutoModel.from_config(AutoConfig.for_model(**config_of(path)["encoder_config"]))
    tensors = load_file(path / "model.safetensors").items()
    inside = {n.removeprefix(INSIDE): tensor for n, tensor in tensors if n.startswith(INSIDE)}
    encoder.load_state_dict(inside)
    with torch.no_grad():
        made: torch.Tensor = encoder.eval()(input_ids=ids).last_hidden_state
    return made


@pytest.mark.parametrize("key", ["deberta-v2", "modernbert", "bert"])
def test_the_encoder_within_loses_tokens(tmp_path: Path, key: str) -> None:
    source, out = save(tmp_path / "source", key), tmp_path / "out"
    plan = make_plan(source, vocab_size=400)
    apply_plan(plan, source=source, output=out)
    assert verify_checkpoint(out, plan=plan, source=source).ok
    made, tokenizer = config_of(out), load_tokenizer(out)
    assert made["vocab_size"] == made["encoder_config"]["vocab_size"] == 400
    assert [tokenizer.token_to_id(token) for token in MARKS] == [398, 399]
    assert made["class_token_index"] == 398
    kept = torch.from_numpy(plan.ids().kept)
    before, after = config_of(source)["encoder_config"], made["encoder_config"]
    for name in (name for name in before if name.endswith("_token_id")):
        assert before[name] is None or kept[after[name]] == before[name]
    new = torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    assert torch.equal(states(out, new), states(source, kept[new]))
    tensors = load_file(out / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        rows = kept if len(tensor) == config_of(source)["vocab_size"] else slice(None)
        assert torch.equal(tensors[name], tensor[rows])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(MARKS[1]) == 399
    card = (out / "README.md").read_text("utf-8")
    assert "library_name: gliner\npipeline_tag: token-classification" in card
    assert not (out / "config.json").exists()


def test_all_steps_by_command(tmp_path: Path, text: Path, run: Run) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    sizes = ("--vocab-size", 400, "--intermediate-size", 48, "--seq-len", 32, "--samples", 8)
    made = run("prune", source, "--data", text, *sizes, "-o", out)
    assert made.exit_code == 0, made.output
    verified = run("verify", out, "--forward")
    assert verified.exit_code == 0, verified.output
    assert config_of(out)["encoder_config"]["intermediate_size"] == 48
    assert "treated as" not in run("plan", source, "--vocab-size", 400, "--json").output
    assert "gliner" in run("inspect", out).output


def test_a_whole_vocabulary_copies_every_byte(tmp_path: Path) -> None:
    source, out = save(tmp_path / "source"), tmp_path / "out"
    layout = layout_of(source)
    apply_plan(
        random_plan(source, layout.vocab_size, dict(layout.widths)), source=source, output=out
    )
    for name in ("gliner_config.json", "model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_config": None}, "encoder_config: is missing"),
        ({"labels_encoder": "org/other"}, "labels_encoder: names a second model of text"),
        ({"vocab_size": -1}, "vocab_size: is not the size of the vocabulary"),
        ({"class_token_index": 9999}, "class_token_index"),
        ({"encoder_config": {"model_type": "llama"}}, "is not an encoder"),
    ],
)
def test_others_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    source = save(tmp_path / "source", **changes)
    with pytest.raises(SurgeryError, match=said):
        make_plan(source, vocab_size=400)


def test_files_that_are_missing(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    (source / "tokenizer_config.json").rename(tmp_path / "settings")
    with pytest.raises(SurgeryError, match=r"reads the tokenizer of another model.*org/encoder"):
        make_plan(source, vocab_size=400)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(SurgeryError, match=r"pickled.*the package gliner"):
        make_plan(source, vocab_size=400)
