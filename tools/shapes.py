"""Checkpoints of any size without a download: every tensor's shape follows from a config.

``write_headers_only`` makes a directory whose shards are sparse files: enough for whatever reads
headers, at the size of the largest models. ``write_random`` fills the same directory with finite
bfloat16 weights. ``synthetic_tokenizer`` makes a byte-level BPE of any size.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from surgery.checkpoint import INDEX_NAME, SINGLE_NAME
from surgery.families import Family, Slot, family_of
from surgery.header import ITEMSIZE, encode_header
from surgery.jsonfile import dump_json
from tools.synthetic_tokenizer import SPECIAL_TOKENS, synthetic_tokenizer

DTYPE = "BF16"
MAX_SHARD_BYTES = 2_500_000_000
BLOCK_ELEMENTS = 2**23 - 15
"""Random numbers that are written over and over (16 MiB): a prime, so that no two rows agree."""
ONE = 0x3F80
"""1.0 in bfloat16."""
SMALLEST_EXPONENT = 127 - 8
"""Of the random weights, as bfloat16 stores it."""
BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj")}
"""Model type → projections that have a bias whatever the config says."""

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def llama_config(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    **changes: Any,
) -> dict[str, Any]:
    """Return a config.json of model type llama; ``changes`` replaces or adds keys.

    bos and eos are the first two of the synthetic tokenizer's special tokens, which end at
    ``vocab_size`` where that allows it.
    """
    special = max(vocab_size - SPECIAL_TOKENS, 0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": special,
        "eos_token_id": special + 1,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    } | changes


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": llama_config(
        *(896, 4864, 24, 14, 2, 151936),
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
    ),
    "Llama-3.2-1B": llama_config(
        *(2048, 8192, 16, 32, 8, 128256), head_dim=64, tie_word_embeddings=True
    ),
    "Llama-3.1-8B": llama_config(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": llama_config(8192, 28672, 80, 64, 8, 128256),
    "Gemma-3-1B": llama_config(
        *(1152, 6912, 26, 4, 1, 262144),
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        head_dim=256,
        tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=32768,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=512,
    ),
}
"""Model name → a config with its published dimensions."""


def tensor_shapes(config: Config) -> Shapes:
    """Return name → shape of every tensor, in the order in which checkpoints store them."""
    family = family_of(config, "config")
    slots = [slot for slot in family.slots if _present(slot, config, family)]
    layers = [slot for slot in slots if "{layer}" in slot.name]
    names = [
        family.embedding,
        *(s.name.format(layer=n) for n in range(config["num_hidden_layers"]) for s in layers),
        *(s.name for s in slots if s not in layers and s.name != family.embedding),
    ]
    return {name: _shape(name, config) for name in names}


def write_headers_only(path: Path, config: Config, shards: int = 1) -> Path:
    """Write config.json, the index and ``shards`` sparse shards into directory ``path``.

    The files have their full length and read as zeros, but take up no space.
    """
    for name, tensors in _start(path, config, shards).items():
        header = _header(tensors)
        with open(path / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + _nbytes(tensors))
    return path


def write_random(
    path: Path, config: Config, *, max_shard_bytes: int = MAX_SHARD_BYTES, seed: int = 0
) -> Path:
    """Write a checkpoint of seeded random weights, each shard below about ``max_shard_bytes``.

    Weights are finite and lie between 2⁻⁸ and 2⁻⁴ in absolute value, so that a forward pass stays
    finite; those of norms are 1.
    """
    shards = -(-_nbytes(tensor_shapes(config)) // max_shard_bytes)
    block, place = _random_block(seed).data.cast("B"), 0
    for name, tensors in _start(path, config, shards).items():
        with open(path / name, "wb") as file:
            file.write(_header(tensors))
            for tensor, shape in tensors.items():
                if "norm" in tensor:
                    file.write(np.full(shape, ONE, dtype=np.uint16).tobytes())
                else:
                    place = _fill(file, _nbytes({tensor: shape}), block, place)
    return path


def write_tokenizer(path: Path, config: Config) -> Path:
    """Write a tokenizer.json into ``path``, a token for every row of ``config`` (at least 512)."""
    data = synthetic_tokenizer(config["vocab_size"] - SPECIAL_TOKENS)
    (path / "tokenizer.json").write_bytes(dump_json(data))
    return path


def _present(slot: Slot, config: Config, family: Family) -> bool:
    """Whether the model that ``config`` describes has the tensors of ``slot``."""
    if slot.required:
        return True
    if slot.name == family.head:
        return not config.get("tie_word_embeddings", family.tied)
    module, kind = slot.name.split(".")[-2:]
    if kind != "bias":
        return False
    if slot.group == "ffn":
        return bool(config.get("mlp_bias"))
    return module in BIASED.get(config["model_type"], ()) or bool(config.get("attention_bias"))


def _shape(name: str, config: Config) -> tuple[int, ...]:
    """Shape of tensor ``name``: a bias is as long as its weight's first dimension."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config.get("num_key_value_heads", heads) * head
    rows, channels = config["vocab_size"], config["intermediate_size"]
    weights = {
        "embed_tokens": (rows, hidden),
        "lm_head": (rows, hidden),
        "gate_proj": (channels, hidden),
        "up_proj": (channels, hidden),
        "down_proj": (hidden, channels),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    module, kind = name.split(".")[-2:]
    shape = weights.get(module, (hidden,))
    return shape if kind == "weight" else shape[:1]


def _start(path: Path, config: Config, count: int) -> dict[str, Shapes]:
    """Write config.json and the index; return shard name → its tensors, of about equal bytes."""
    shapes = tensor_shapes(config)
    share, place = _nbytes(shapes) / count, 0
    shards: list[Shapes] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        shards[min(int(place / share), count - 1)][name] = shape
        place += _nbytes({name: shape})
    used = [shard for shard in shards if shard]
    names = [f"model-{n:05}-of-{len(used):05}.safetensors" for n in range(1, len(used) + 1)]
    result = dict(zip(names if len(used) > 1 else [SINGLE_NAME], used, strict=True))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_bytes(dump_json(dict(config)))
    if len(used) > 1:
        weight_map = {tensor: name for name, tensors in result.items() for tensor in tensors}
        index = {"metadata": {"total_size": place}, "weight_map": weight_map}
        (path / INDEX_NAME).write_bytes(dump_json(index))
    return result


def _header(tensors: Shapes) -> bytes:
    entries = [(name, DTYPE, shape) for name, shape in tensors.items()]
    return encode_header(entries, {"format": "pt"})


def _nbytes(tensors: Shapes) -> int:
    return sum(prod(shape) for shape in tensors.values()) * ITEMSIZE[DTYPE]


def _random_block(seed: int) -> np.ndarray:
    """uint16 ``[BLOCK_ELEMENTS]``: bfloat16 numbers of random sign, mantissa and four exponents."""
    bits = np.random.default_rng(seed).integers(0, 2**16, BLOCK_ELEMENTS, dtype=np.uint16)
    return (bits & 0x807F) | (bits >> 7 & 3) + SMALLEST_EXPONENT << 7


def _fill(output: BinaryIO, nbytes: int, block: memoryview, place: int) -> int:
    """Write ``nbytes`` of the endlessly repeated ``block`` from ``place``; return where it ends."""
    while nbytes:
        count = output.write(block[place : place + nbytes])
        place, nbytes = (place + count) % len(block), nbytes - count
    return place
