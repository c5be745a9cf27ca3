"""A stored lm_head that differs from the embedding counts, whatever config.json says."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib import score
from surgery import apply_plan, make_plan, open_model, verify_checkpoint
from surgery.files.strict_json import dump_json, read_json
from tests.support import tiny
from tests.support.command import Run

TEXT = ["the quick brown fox jumps over the lazy dog " * 40]
FILE = "model.safetensors"


def merged(path: Path, key: str, *, same: bool) -> Path:
    """Save a checkpoint as an old merge leaves it: config.json ties, and both are stored."""
    tiny.save(path, key, tied=False)
    tensors = load_file(path / FILE)
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    if same:
        tensors[head] = tensors[embedding].clone()
    save_file(tensors, path / FILE, {"format": "pt"})
    config = read_json(path / "config.json")
    section = config.get("text_config")
    if section:
        config["text_config"] = {**section, "tie_word_embeddings": True}
    (path / "config.json").write_bytes(dump_json({**config, "tie_word_embeddings": True}))
    return path


def untied(path: Path, source: Path) -> Path:
    """Copy ``source`` to ``path``, with a config.json that does not tie."""
    shutil.copytree(source, path)
    config = read_json(path / "config.json") | {"tie_word_embeddings": False}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    (path / "config.json").write_bytes(dump_json(config))
    return path


@pytest.mark.parametrize("key", ["llama", "gemma3"])
def test_an_own_head_counts_and_is_scored_and_pruned(tmp_path: Path, key: str) -> None:
    model = merged(tmp_path / "model", key, same=False)
    truth = untied(tmp_path / "truth", model)
    assert open_model(model).layout.tied is False
    size = open_model(truth).layout.vocab_size
    whole, other = open_model(truth).layout, open_model(model).layout
    assert whole.parameters(size, whole.widths) == other.parameters(size, other.widths)
    bits = {score(path, data=TEXT, samples=2, window_bytes=64).bits for path in (model, truth)}
    assert len(bits) == 1

    plans = [make_plan(path, vocab_size=size - 8) for path in (model, truth)]
    assert plans[0].after == plans[1].after
    for plan, name in zip(plans, ("out", "true_out"), strict=True):
        apply_plan(plan, output=tmp_path / name)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "true_out" / FILE).read_bytes()
    config = read_json(tmp_path / "out" / "config.json")
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {}).get("tie_word_embeddings", False) is False
    assert verify_checkpoint(tmp_path / "out", plan=plans[0]).ok
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    model = merged(tmp_path / "model", "llama", same=True)
    assert open_model(model).layout.tied
    plan = make_plan(model, vocab_size=open_model(model).layout.vocab_size - 8)
    apply_plan(plan, output=tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True


def test_one_value_is_enough_and_the_commands_say_so(tmp_path: Path, run: Run) -> None:
    model = merged(tmp_path / "model", "llama", same=True)
    tensors = load_file(model / FILE)
    row = len(tensors["lm_head.weight"]) - 1
    tensors["lm_head.weight"][row, -1] = 0.5
    save_file(tensors, model / FILE, {"format": "pt"})
    assert "lm_head differs from the embedding" in run("inspect", model).output
    plan = tmp_path / "plan.json"
    output = run(
        "plan", model, "--vocab-size", open_model(model).layout.vocab_size - 8, "-o", plan
    ).output
    assert "lm_head differs from the embedding" in output
