"""Encoders as GGUF: llama.cpp embeds texts as transformers does, pruned or not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

import surgery
from surgery.errors import CheckpointError, FamilyError, TokenizerError
from surgery.export.architectures import ARCHITECTURES, NOT_IN_RUNTIME
from surgery.export.gguf_file import Exported
from tests.support import ROOT, tiny, tiny_encoders
from tests.support.contents import weights
from tests.support.gguf_files import read_gguf
from tests.support.json_files import change, put
from tests.support.plans import random_plan

ENCODERS = [key for key, entry in ARCHITECTURES.items() if entry.encoder]
BOUND = 2e-3
"""Of embeddings of length 1: llama.cpp takes gelu from a table in f16, and by its tanh form."""

LOWERED = "bert whose texts sentence-transformers lowercases"

METASPACE = pre_tokenizers.Metaspace().__getstate__()

TEXTS = [
    *(tiny.prose(4000)[start : start + 160] for start in range(0, 2000, 400)),
    "Привет,  мир! 東京 è una città. Ünïcödé,   наука и жизнь ",
    "x",
]


def save(path: Path, key: str, **modules: Any) -> Path:
    """Save a tiny encoder whose tokens are pooled as sentence-transformers says."""
    tiny_encoders.save(path, key, "masked", max_position_embeddings=256)
    if tiny_encoders.kind_of(key) == tiny_encoders.UNIGRAM:  # as XLM-R, but without its table
        split = [{"type": "WhitespaceSplit"}, json.loads(METASPACE)]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": split}
        change(path / "tokenizer.json", put(normalizer=None, pre_tokenizer=pre_tokenizer))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    name_modules(path, Pooling="1_Pooling", Normalize="2_Normalize", **modules)
    return path


def name_modules(path: Path, **folders: str) -> None:
    """Write modules.json: the model, then each type with its folder."""
    types = {"Transformer": "", **folders}
    named = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{name}"}
        for i, (name, folder) in enumerate(types.items())
    ]
    (path / "modules.json").write_text(json.dumps(named))


def before(path: Path, **settings: Any) -> Path:
    """Write what sentence-transformers does to a text before the tokenizer."""
    (path / "sentence_bert_config.json").write_text(json.dumps(settings))
    return path


def export(source: Path, file: Path) -> Exported:
    key = json.loads((source / "config.json").read_text())["model_type"]
    byte_level = tiny_encoders.kind_of(key) == tiny_encoders.BYTE_LEVEL
    return surgery.export_gguf(source, file, type="f32", pre="gpt-2" if byte_level else None)


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp, llama.cpp as a prebuilt wheel, is not installed",
)
def test_llama_cpp_embeds_as_transformers_does(tmp_path: Path) -> None:
    models = {key: save(tmp_path / key, key) for key in ENCODERS}
    models[LOWERED] = before(save(tmp_path / "lowered", "bert"), do_lower_case=True)
    for key in ENCODERS:
        models[f"{key} pruned"] = out = tmp_path / f"{key}-out"
        surgery.apply_plan(random_plan(models[key], 512, 64), source=models[key], output=out)
    jobs = []
    for name, path in models.items():
        file = tmp_path / f"{name}.gguf"
        export(path, file)
        jobs.append(tmp_path / f"{name}.json")
        task = {"model": str(file), "prompts": [], "texts": TEXTS, "embed": True}
        jobs[-1].write_text(json.dumps(task))
    command = [sys.executable, "-m", "tools.engines.llama_cpp", *map(str, jobs)]
    subprocess.run(command, check=True, timeout=240, cwd=ROOT, capture_output=True)
    for (name, path), job in zip(models.items(), jobs, strict=True):
        found = json.loads(job.read_text())
        assert "error" not in found, (name, found.get("error"))
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        texts = [text.lower() if name == LOWERED else text for text in TEXTS]
        assert found["ids"] == [tokenizer.encode(text).ids for text in texts], name
        model = tiny_encoders.load(path)
        for ids, own in zip(found["ids"], found["embeddings"], strict=True):
            with torch.no_grad():
                mean = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(
                torch.tensor(own), mean / mean.norm(), atol=BOUND, rtol=0, msg=name
            )


def test_keys_of_an_embedder(tmp_path: Path) -> None:
    made = export(save(tmp_path / "model", "bert"), tmp_path / "model.gguf")
    assert made.notes == ("poolers and heads of tasks are left out: the file gives embeddings",)
    keys, tensors = read_gguf(tmp_path / "model.gguf")
    assert keys["bert.pooling_type"] == 1
    assert keys["bert.attention.causal"] is False
    assert keys["bert.context_length"] == 256
    assert keys["tokenizer.ggml.token_type_count"] == 2
    assert keys["tokenizer.ggml.normalizer.lowercase"] is False
    assert keys["tokenizer.ggml.tokens"][:2] == ["[PAD]", "[UNK]"]
    assert {"\u2581the", "ing"} <= set(keys["tokenizer.ggml.tokens"])
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (2, 3)
    assert not any(name.startswith("cls") for name in tensors)


@pytest.mark.parametrize(
    ("key", "lower", "most", "note"),
    [
        ("bert", True, 256, "puts prompts before texts (passage, query)"),
        ("bert", False, 128, "puts prompts before texts (passage, query) and cuts texts after 128"),
        ("roberta", True, 512, "puts prompts before texts (passage, query) and lowercases texts"),
    ],
)
def test_what_sentence_transformers_does_before_is_held_or_said(
    tmp_path: Path, key: str, lower: bool, most: int, note: str
) -> None:
    source = before(save(tmp_path / "model", key), max_seq_length=most, do_lower_case=lower)
    prompts = {"query": "query: ", "passage": "passage: ", "other": ""}
    (source / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    _, found = export(source, tmp_path / "model.gguf").notes
    assert found.removesuffix(" tokens; the file does not").removesuffix("; the file does not") == (
        f"sentence-transformers {note}"
    )
    keys, _ = read_gguf(tmp_path / "model.gguf")
    held = keys.get("tokenizer.ggml.normalizer.lowercase")
    assert held == (lower if key == "bert" else None)
    assert not keys.get("tokenizer.ggml.normalizer.strip_accents")


def test_the_first_rows_of_robertas_positions_are_left_out(tmp_path: Path) -> None:
    """They begin after the padding token, whose id is 1."""
    source = save(tmp_path / "model", "roberta")
    export(source, tmp_path / "model.gguf")
    keys, tensors = read_gguf(tmp_path / "model.gguf")
    table = weights(source)["roberta.embeddings.position_embeddings.weight"]
    assert keys["bert.context_length"] == len(table) - 2 == 254
    assert (tensors["position_embd.weight"].data == table[2:].numpy()).all()


@pytest.mark.parametrize(
    ("pooling", "number"),
    [({"pooling_mode_cls_token": True}, 2), ({"pooling_mode": "lasttoken"}, 3), (None, None)],
)
def test_pooling(tmp_path: Path, pooling: Any, number: int | None) -> None:
    source = save(tmp_path / "model", "bert")
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if pooling is None:
        (source / "modules.json").unlink()
    made = export(source, tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf")[0].get("bert.pooling_type") == number
    assert any("how to pool" in note for note in made.notes) == (number is None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "expected one of mean, cls"),
        ("modules.json", {"Dense": "2_Dense"}, r"does not do this .*\.Dense"),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, "prepares text otherwise"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(
    tmp_path: Path, name: str, value: dict[str, Any], words: str
) -> None:
    source = save(tmp_path / "model", "bert")
    if name == "modules.json":
        name_modules(source, Pooling="1_Pooling", **value)
    elif name == "1_Pooling/config.json":
        (source / name).write_text(json.dumps(value))
    else:
        change(source / name, put(**value))
    with pytest.raises((CheckpointError, FamilyError, TokenizerError), match=words):
        export(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("key", ["mpnet", "deberta-v2"])
def test_an_encoder_that_llama_cpp_lacks_is_refused_with_the_reason(
    tmp_path: Path, key: str
) -> None:
    source = tiny_encoders.save(tmp_path / "model", key)
    with pytest.raises(FamilyError, match=f"llama.cpp has no {NOT_IN_RUNTIME[key]}.*found {key}"):
        surgery.export_gguf(source, tmp_path / "model.gguf")
