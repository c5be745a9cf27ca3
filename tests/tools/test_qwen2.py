"""Tests of the Qwen2.5-Coder checkpoint builder on a made GGUF; none needs a wheel."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.gguf_files import write_gguf
from tools import qwen2
from tools.gguf_checkpoint import BuildError, Model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PLAIN = [*ALPHABET, "he", "ll", "hell", "Ġhell"]
MERGES = ["h e", "l l", "he ll", "Ġ hell"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
TOKENS = [*PLAIN, *ADDED, "[PAD264]", "[PAD265]"]
KINDS = [1] * len(PLAIN) + [3, 3, 3, 4, 5, 5]
SMALL = qwen2.CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(TOKENS),
    "bos_token_id": len(PLAIN),
    "eos_token_id": len(PLAIN) + 2,
}
MODEL = Model(
    SMALL, qwen2.GGUF_KEYS, qwen2.LAYER_NAMES, qwen2.BIASES, {"output.weight": qwen2.HEAD}
)


def shape_of(name: str) -> tuple[int, ...]:
    """Return the small model's shape of a tensor by its GGUF name."""
    part, suffix = name.split(".")[-2:]
    heads = {"attn_q": 16, "attn_k": 8, "attn_v": 8}
    if suffix == "bias":
        return (heads[part],)
    if part in heads:
        return (heads[part], 16)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(TOKENS), 16),
        "output": (len(TOKENS), 16),
        "attn_output": (16, 16),
        "ffn_gate": (12, 16),
        "ffn_up": (12, 16),
        "ffn_down": (16, 12),
    }
    return shapes.get(part, (16,))


def make_tensors() -> dict[str, NDArray[np.float32]]:
    """Give every tensor of the small GGUF values that bfloat16 holds exactly."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(-64, 64, shape_of(name)).astype(np.float32) / np.float32(64)
        for name in MODEL.tensor_names()
    }


def make_metadata() -> dict[str, Any]:
    """Give the small GGUF's metadata."""
    keys = {gguf_key: SMALL[key] for key, gguf_key in qwen2.GGUF_KEYS.items()}
    del keys["general.architecture"]  # which the writer writes
    return keys | {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build the small checkpoint."""
    monkeypatch.setattr(qwen2, "MODEL", MODEL)
    monkeypatch.setattr(qwen2, "CONFIG", SMALL)
    path = write_gguf(tmp_path / "model.gguf", "qwen2", make_metadata(), make_tensors())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    qwen2.write_checkpoint(path, folder)
    return folder


def test_config_is_qwen_2_5_coder_1_5b() -> None:
    config = AutoConfig.for_model(**qwen2.CONFIG)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_543_714_304
    names = set(qwen2.MODEL.tensor_names().values())
    assert names == {name for name, _ in model.named_parameters()} | {qwen2.HEAD}


def test_weights_are_those_of_the_gguf_and_the_output_is_the_embedding(built: Path) -> None:
    found, tensors = load_file(built / "model.safetensors"), make_tensors()
    for old, new in MODEL.tensor_names().items():
        if old not in ("token_embd.weight", "output.weight"):
            assert torch.equal(found[new].float(), torch.from_numpy(tensors[old])), old
    assert torch.equal(found[qwen2.EMBEDDING].float(), torch.from_numpy(tensors["output.weight"]))
    assert qwen2.HEAD not in found


def test_built_checkpoint_loads_and_generates(built: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(built, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    tokenizer: Any = AutoTokenizer.from_pretrained(built)
    text = "<|im_start|>hell hell<tool_call>é"
    ids = tokenizer(text, return_tensors="pt")
    tokens = ["<|im_start|>", "hell", "Ġhell", "<tool_call>", "Ã", "©"]
    assert tokenizer.convert_ids_to_tokens(ids.input_ids[0]) == tokens
    assert tokenizer.decode(ids.input_ids[0], skip_special_tokens=True) == "hell hell<tool_call>é"
    assert tokenizer.eos_token == "<|im_end|>"
    made = model.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape[1] == ids.input_ids.shape[1] + 3
    vocab = json.loads((built / "vocab.json").read_text(encoding="utf-8"))
    assert list(vocab) == PLAIN


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_keeps_text_in_nfc(text: str) -> None:
    tokenizer = qwen2.build_tokenizer(PLAIN, MERGES, ADDED)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_tokens_in_another_order_are_refused(tmp_path: Path) -> None:
    kinds = [*KINDS[:-4], 1, *KINDS[-3:]]
    with pytest.raises(BuildError, match="not in the order"):
        qwen2.write_tokenizer(make_metadata() | {"tokenizer.ggml.token_type": kinds}, tmp_path)


def test_damaged_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / qwen2.WHEELS[0].name).write_bytes(b"not a wheel")
    output = tmp_path / "out"
    result = CliRunner().invoke(qwen2.main, ["--wheel-dir", str(tmp_path), "-o", str(output)])
    assert result.exit_code == 2
    assert "is damaged (sha256 differs)" in result.output
    assert not output.exists()
