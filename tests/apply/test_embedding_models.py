"""Embedding models: decoders saved without a head, and directories of sentence-transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from surgery.api import apply_plan, make_plan
from surgery.apply.companions import files_left_out
from surgery.errors import CheckpointError, FamilyError, TokenizerError
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import tiny, tiny_encoders
from tests.support.command import Run
from tests.support.plans import layout_of, masked_dense, random_plan

PROMPT = "Instruct: find what answers this question\nQuery: "


def save_bare(path: Path, key: str, **changes: Any) -> Path:
    """A decoder whose tensors are named without ``model.``, as AutoModel saves them."""
    tiny.save(path, key, tied=key == "gemma3_text", **changes)
    AutoModel.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    return path


def states(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made = AutoModel.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids)
    return made.last_hidden_state


@pytest.mark.parametrize(
    ("key", "changes"),
    [("qwen3", {}), ("gemma3_text", {"use_bidirectional_attention": True})],
    ids=["qwen3", "gemma3_text"],
)
def test_a_decoder_without_its_head(
    tmp_path: Path, text: Path, run: Run, key: str, changes: dict[str, Any]
) -> None:
    """As Qwen3-Embedding and EmbeddingGemma are published."""
    source, out = save_bare(tmp_path / "source", key, **changes), tmp_path / "out"
    assert "embed_tokens.weight" in layout_of(source).checkpoint.tensors
    plan = random_plan(source, 512, dict(layout_of(source).widths))
    apply_plan(plan, source=source, output=out)
    kept = torch.from_numpy(plan.ids().kept)
    new = torch.randint(len(kept), (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(states(out, new), states(source, kept[new]))
    smaller = random_plan(source, 512, 0.5)
    apply_plan(smaller, source=source, output=tmp_path / "smaller")
    expected = states(masked_dense(source, smaller, tmp_path / "masked"), kept[new])
    found = states(tmp_path / "smaller", new)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    sizes = ("--vocab-size", 512, "--intermediate-size", 48, "--seq-len", 48, "--samples", 8)
    made = run("prune", source, "--data", text, *sizes, "-o", tmp_path / "pruned")
    assert made.exit_code == 0, made.output
    verified = run("verify", tmp_path / "pruned", "--forward")
    assert verified.exit_code == 0, verified.output
    if not layout_of(source).tied:
        assert "verify" in made.output.splitlines()[-1]
        refused = run("score", source, "--data", text)
        assert refused.exit_code == 2
        assert "qwen3 was saved without its head" in refused.output


def sentence_transformer(path: Path, **prompts: object) -> Path:
    """A directory as sentence-transformers saves it, with a dense layer after the pooling."""
    tiny_encoders.save(path, "bert", "base")
    files: dict[str, object] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 32, "out_features": 16, "bias": True},
    }
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content), "utf-8")
    weights = {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
    save_file(weights, path / "2_Dense" / "model.safetensors")
    (path / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "onnx").mkdir()
    return path


@pytest.mark.parametrize("rows", [400, tiny_encoders.VOCAB_SIZE])
def test_what_follows_the_model_is_carried(tmp_path: Path, rows: int) -> None:
    source, out = sentence_transformer(tmp_path / "source"), tmp_path / "out"
    plan = random_plan(source, rows, 0.5)
    apply_plan(plan, source=source, output=out)
    names = [
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    ]
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    left_out = files_left_out(layout_of(source).checkpoint, plan.ids())
    assert left_out == ["2_Dense/pytorch_model.bin", "onnx"]
    assert "pipeline_tag: feature-extraction" in (out / "README.md").read_text("utf-8")


def test_a_module_whose_weights_are_pickled_is_refused(tmp_path: Path, run: Run) -> None:
    source = sentence_transformer(tmp_path / "source")
    (source / "2_Dense" / "model.safetensors").unlink()
    refused = run("plan", source, "--vocab-size", 400, "-o", tmp_path / "plan.json")
    assert refused.exit_code == 2
    assert "2_Dense/pytorch_model.bin: weights are pickled" in refused.output


def add_module(source: Path, folder: str, kind: str, **files: object) -> None:
    """Name one more module, with JSON files; tensors are saved as its weights."""
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": folder, "type": f"sentence_transformers.{kind}"})
    (source / "modules.json").write_text(json.dumps(modules))
    for name, content in files.items():
        path = source / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, torch.Tensor):
            save_file({"weight": content}, path.with_suffix(".safetensors"))
        else:
            path.with_suffix(".json").write_text(json.dumps(content))


def test_modules_may_have_any_name_and_hold_others(tmp_path: Path) -> None:
    source, out = sentence_transformer(tmp_path / "source"), tmp_path / "out"
    add_module(source, "lstm", "LSTM", lstm_config={"a": 1}, model=torch.ones(2))
    inner = {"sub_0_Dense/config": {}, "sub_0_Dense/model": torch.ones(2)}
    add_module(source, "3_Router", "Router", router_config={}, **inner)
    add_module(source, "4_Normalize", "Normalize")
    (source / "unnamed").mkdir()
    plan = random_plan(source, 400, 0.5)
    apply_plan(plan, source=source, output=out)
    expected = {
        *("lstm/lstm_config.json", "lstm/model.safetensors", "3_Router/router_config.json"),
        *("3_Router/sub_0_Dense/config.json", "3_Router/sub_0_Dense/model.safetensors"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    }
    assert {path.relative_to(out).as_posix() for path in out.glob("*/**/*.*")} == expected
    for name in expected:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    left_out = files_left_out(layout_of(source).checkpoint, plan.ids())
    assert left_out == ["2_Dense/pytorch_model.bin", "onnx", "unnamed"]


@pytest.mark.parametrize(
    ("folder", "kind", "files"),
    [
        ("3_SparseStaticEmbedding", "SparseStaticEmbedding", {"config": {}}),
        ("weights", "WordWeights", {"config": {"vocab": []}}),
        ("3_Router", "Router", {"sub_0_SparseStaticEmbedding/config": {}}),
        ("3_Custom", "Custom", {"config": {}, "model": torch.ones(tiny_encoders.VOCAB_SIZE)}),
    ],
)
def test_a_module_by_token_needs_the_whole_vocabulary(
    tmp_path: Path, folder: str, kind: str, files: dict[str, Any]
) -> None:
    source = sentence_transformer(tmp_path / "source")
    add_module(source, folder, kind, **files)
    with pytest.raises(CheckpointError, match=rf"{folder}/.*holds values by the token's id"):
        make_plan(source, vocab_size=400)
    whole = make_plan(source, intermediate_size=16, criterion="random")
    apply_plan(whole, source=source, output=tmp_path / "out")
    assert (tmp_path / "out" / folder).is_dir()


def link_folder(source: Path, outside: Path) -> None:
    shutil.move(source / "1_Pooling", outside)
    (source / "1_Pooling").symlink_to(outside)


def link_file(source: Path, outside: Path) -> None:
    shutil.move(source / "1_Pooling" / "config.json", outside)
    (source / "1_Pooling" / "config.json").symlink_to(outside)


def link_list(source: Path, outside: Path) -> None:
    shutil.move(source / "modules.json", outside)
    (source / "modules.json").symlink_to(outside)


def dangle(source: Path, outside: Path) -> None:
    (source / "1_Pooling" / "config.json").unlink()
    (source / "1_Pooling" / "config.json").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (link_folder, "1_Pooling: is no file of the model, but a link"),
        (link_file, "1_Pooling/config.json: is no file of the model, but a link"),
        (link_list, "modules.json: is no file of the model, but a link"),
        (dangle, "1_Pooling/config.json: is no file of the model, but a link"),
        (lambda source, _: shutil.rmtree(source / "1_Pooling"), "1_Pooling: is missing"),
        (
            lambda source, _: (source / "2_Dense" / "model.safetensors").write_bytes(b"x" * 99),
            "2_Dense/model.safetensors: ",
        ),
        (lambda source, _: (source / "modules.json").write_text("{}"), "unknown form"),
        (lambda source, _: (source / "modules.json").write_text("[3]"), "unknown form"),
        (lambda source, _: (source / "modules.json").write_text("[{"), "is not valid JSON"),
        (lambda source, _: add_module(source, "../x", "Dense"), "is no folder within the model"),
        (lambda source, _: add_module(source, "/etc", "Dense"), "is no folder within the model"),
    ],
)
def test_damaged_modules_are_refused(
    tmp_path: Path, damage: Callable[[Path, Path], object], message: str
) -> None:
    source = sentence_transformer(tmp_path / "source")
    damage(source, tmp_path / "outside")
    with pytest.raises(CheckpointError, match=message):
        make_plan(source, vocab_size=400)


def test_folders_alone_are_no_part_of_a_model(tmp_path: Path) -> None:
    source = sentence_transformer(tmp_path / "source")
    (source / "modules.json").unlink()
    plan = random_plan(source, 400, 0.5)
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    left_out = files_left_out(layout_of(source).checkpoint, plan.ids())
    assert left_out == ["1_Pooling", "2_Dense", "onnx"]


def test_the_tokens_of_prompts_stay(tmp_path: Path) -> None:
    plain = sentence_transformer(tmp_path / "plain")
    source = sentence_transformer(tmp_path / "source", query=PROMPT, document="")
    needed = set(load_tokenizer(source).encode(PROMPT, add_special_tokens=False).ids)
    rows = 330
    assert not needed <= set(random_plan(plain, rows, 0.5).ids().kept.tolist())
    plan = random_plan(source, rows, 0.5)
    assert needed <= set(plan.ids().kept.tolist())
    apply_plan(plan, source=source, output=tmp_path / "out")
    old, new = (load_tokenizer(path) for path in (source, tmp_path / "out"))
    kept = plan.ids().kept
    assert kept[np.array(new.encode(PROMPT).ids)].tolist() == old.encode(PROMPT).ids


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = sentence_transformer(tmp_path / "source", query=["search"])
    with pytest.raises(TokenizerError, match=r"prompts: has an entry that is no text"):
        random_plan(source, 400, 0.5)


def test_an_encoder_s_head_with_strange_tensors_is_refused(tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "source", "bert")
    tensors = load_file(source / "model.safetensors") | {"surprise.weight": torch.zeros(3)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FamilyError, match=r"surprise.weight: is not a tensor"):
        layout_of(source)
