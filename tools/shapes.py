"""Checkpoints of any size without a download: every tensor's shape follows from a config.

``write_headers_only`` makes a directory whose shards are sparse files: enough for whatever reads
headers, at the size of the largest models. ``write_random`` fills the same directory with finite
bfloat16 weights. ``synthetic_tokenizer`` makes a byte-level BPE of any size.

The model types are those of ``tools/published.py`` and their like: attention by q, k, v and o or
DeepSeek's latent one, FFNs that are gated, experts one by one or packed. A config with a
``quantization_config`` has its weights as published: in FP8 with block scales, or MXFP4.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from surgery.checkpoint.fp8 import scale_grid
from surgery.checkpoint.quantization import SCALE_SUFFIX
from surgery.families.blocks import BUFFER
from surgery.families.schema import EXPERTS, VOCAB, Dim, Family, Slot
from surgery.families.table import family_of
from surgery.files.model_files import INDEX_NAME, SINGLE_NAME
from surgery.files.safetensors_header import ITEMSIZE, encode_header
from surgery.files.strict_json import dump_json
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

MXFP4_GROUP, MXFP4_SCALE = 32, 127 - 7
"""Values that share a scale in MXFP4, two in a byte, and the code of the scale 2⁻⁷."""

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name → safetensors dtype and shape."""


def stored_tensors(config: Config) -> Tensors:
    """Return every tensor of a checkpoint, in the order in which files store them."""
    family = family_of(config, "config")
    embedding = family.by_name[family.embedding]
    found: Tensors = {embedding.name: (DTYPE, _shape(embedding, config, family))}
    for layer in range(config["num_hidden_layers"]):
        slots = [s for s in family.slots if "{layer}" in s.name and _present(s, config, layer)]
        for slot, expert in _with_experts(slots, _experts(config)):
            name = slot.name.format(layer=layer, expert=expert)
            found |= _quantized(name, slot, _shape(slot, config, family), config)
    for slot in family.slots:
        if "{layer}" not in slot.name and slot.name != family.embedding:
            tied = slot.name == family.head and config.get("tie_word_embeddings", family.tied)
            if not tied and not slot.name.endswith("bias"):
                found[slot.name] = (DTYPE, _shape(slot, config, family))
    return found


def _quantized(name: str, slot: Slot, shape: tuple[int, ...], config: Config) -> Tensors:
    """Return what a file stores of a layer's tensor, quantized as the config says.

    FP8 with block scales has all matrices but the router's. MXFP4 has the packed matrices
    ``[experts, in, out]`` alone, as codes ``[experts, out, groups, bytes]``.
    """
    section = config.get("quantization_config", {})
    if section.get("quant_method") == "fp8" and len(shape) == 2 and not slot.router:
        grid = scale_grid((shape[0], shape[1]), section["weight_block_size"])
        return {name: ("F8_E4M3", shape), f"{name}{SCALE_SUFFIX}": ("F32", grid)}
    if section.get("quant_method") == "mxfp4" and slot.packed and len(shape) == 3:
        groups = (shape[0], shape[2], shape[1] // MXFP4_GROUP)
        codes = (*groups, MXFP4_GROUP // 2)
        return {f"{name}_blocks": ("U8", codes), f"{name}_scales": ("U8", groups)}
    return {name: (DTYPE, shape)}


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
    finite; those of norms are 1. Codes of MXFP4 are any, and below 2⁻⁴ with their scales. FP8
    is not written.
    """
    shards = -(-_nbytes(stored_tensors(config)) // max_shard_bytes)
    block, place = _random_block(seed).data.cast("B"), 0
    for name, tensors in _start(path, config, shards).items():
        with open(path / name, "wb") as file:
            file.write(_header(tensors))
            for tensor, (dtype, shape) in tensors.items():
                if "norm" in tensor:
                    file.write(np.full(shape, ONE, dtype=np.uint16).tobytes())
                elif dtype == "U8" and tensor.endswith("_scales"):
                    file.write(np.full(shape, MXFP4_SCALE, dtype=np.uint8).tobytes())
                else:
                    place = _fill(file, _nbytes({tensor: (dtype, shape)}), block, place)
    return path


def write_tokenizer(path: Path, config: Config) -> Path:
    """Write a tokenizer.json into ``path``, a token for every row of ``config`` (at least 512)."""
    data = synthetic_tokenizer(config["vocab_size"] - SPECIAL_TOKENS)
    (path / "tokenizer.json").write_bytes(dump_json(data))
    return path


def _experts(config: Config) -> int:
    """Routed experts of a layer; 0 in a dense model."""
    keys = ("n_routed_experts", "num_local_experts", "num_experts")
    return next((int(config[key]) for key in keys if key in config), 0)


def _with_experts(slots: list[Slot], experts: int) -> Iterator[tuple[Slot, int]]:
    """Every slot of a layer, those of experts once for each, expert by expert."""
    routed = [slot for slot in slots if "{expert}" in slot.name]
    yield from ((slot, 0) for slot in slots if slot not in routed)
    yield from ((slot, expert) for expert in range(experts) for slot in routed)


def _present(slot: Slot, config: Config, layer: int) -> bool:
    """Whether layer ``layer`` of the model that ``config`` describes has the tensor of ``slot``."""
    module, kind = slot.name.split(".")[-2:]
    sparse = _experts(config) > 0 and layer >= config.get("first_k_dense_replace", 0)
    one_by_one = any(each.of_expert for each in family_of(config, "config").slots)
    blocks = {
        "packed": sparse and not one_by_one,
        BUFFER: False,
        "dense": not sparse,
        "experts": sparse,
        "shared": sparse and bool(config.get("n_shared_experts")),
    }
    if not blocks.get(slot.block, sparse or not slot.beside):
        return False
    if kind == "bias" and slot.group == "attention":
        return module in BIASED.get(config["model_type"], ()) or bool(config.get("attention_bias"))
    if kind == "bias" and not slot.router:
        return slot.group == "ffn" and bool(config.get("mlp_bias"))
    if module in ("q_a_proj", "q_a_layernorm", "q_b_proj"):
        return bool(config.get("q_lora_rank"))
    return not (module == "q_proj" and config.get("q_lora_rank"))


def _shape(slot: Slot, config: Config, family: Family) -> tuple[int, ...]:
    """Shape of a tensor of ``slot``: its axes first, then what its module says."""
    hidden, module = config["hidden_size"], slot.name.split(".")[-2]
    if any(slot.dims):
        return tuple(_length(dim, config, family) if dim else hidden for dim in slot.dims)
    if slot.beside:  # the gate of a shared expert
        return (1, hidden)
    shape = _attention_shapes(config).get(module, (hidden,))
    return shape[:1] if slot.name.endswith("bias") else shape


def _length(dim: Dim, config: Config, family: Family) -> int:
    """Positions of a dimension that carries an axis."""
    if dim.axis == VOCAB:
        return int(config["vocab_size"])
    if dim.axis == EXPERTS:
        return _experts(config)
    width = family.widths[dim.axis]
    return int(config[width.key]) * int(config.get(width.times, 1)) * dim.copies


def _attention_shapes(config: Config) -> Shapes:
    """Last but one part of a name → shape of the weight, of attention and its norms."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        nope, rope, value = (
            config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        rank, query_rank = config["kv_lora_rank"], config.get("q_lora_rank") or hidden
        return {
            "q_proj": (heads * (nope + rope), hidden),
            "q_a_proj": (query_rank, hidden),
            "q_a_layernorm": (query_rank,),
            "q_b_proj": (heads * (nope + rope), query_rank),
            "kv_a_proj_with_mqa": (rank + rope, hidden),
            "kv_a_layernorm": (rank,),
            "kv_b_proj": (heads * (nope + value), rank),
            "o_proj": (hidden, heads * value),
        }
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config.get("num_key_value_heads", heads) * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (head,),
        "k_norm": (head,),
        "self_attn": (heads,),  # its sinks
    }


def _start(path: Path, config: Config, count: int) -> dict[str, Tensors]:
    """Write config.json and the index; return shard name → its tensors, of about equal bytes."""
    stored = stored_tensors(config)
    share, place = _nbytes(stored) / count, 0
    shards: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in stored.items():
        shards[min(int(place / share), count - 1)][name] = tensor
        place += _nbytes({name: tensor})
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


def _header(tensors: Tensors) -> bytes:
    entries = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    return encode_header(entries, {"format": "pt"})


def _nbytes(tensors: Tensors) -> int:
    return sum(prod(shape) * ITEMSIZE[dtype] for dtype, shape in tensors.values())


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
