"""Make what the benchmarks work on, in a process of its own so that its memory is not theirs.

python -m tools.bench.make plan DIR LAYERS      DIR/model, random, and DIR/plan.json
python -m tools.bench.make hub DIR              the same of 0.5B shape in ten shards
python -m tools.bench.make headers DIR          DIR/model, 70B-shaped, headers only
python -m tools.bench.make wide DIR CHANNELS    DIR/model, one layer, 8 KB a channel, zeros
python -m tools.bench.make large DIR LAYERS     DIR, random: layers of a 70B model, few tokens
python -m tools.bench.make experts DIR LAYERS   as plan: a quarter of a mixture's experts goes
python -m tools.bench.make mixture DIR LAYERS   DIR, random: layers of DeepSeek-V3, narrow experts
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.planner import plan_cut
from surgery.planning.request import CutRequest
from surgery.planning.sizes import Sizes
from surgery.stats.channel_stats import AxisSums, ChannelStats, StatsInfo
from surgery.stats.channels import LEAST_TOKENS, ChannelOptions
from surgery.vocabulary.order import rarity_of
from tools.published import MIXTURES, PUBLISHED, llama_config
from tools.shapes import MAX_SHARD_BYTES, Config, write_headers_only, write_random, write_tokenizer
from tools.synthetic_tokenizer import SPECIAL_TOKENS

PAPER_SIZES = Sizes(67840, {"intermediate_size": 8448})
"""V' and I' of LLaMA-3.1-8B at 35 % in the paper."""
HALF_SIZES = Sizes(98816, {"intermediate_size": 3328})
"""V' and I' of Qwen2.5-0.5B at 35 % or so."""
HUB_SHARD_BYTES = 100_000_000
SHARDS_70B = 30
LARGE_VOCAB = 4096
MIXTURE_VOCAB = 32768
NARROW = 256
"""``moe_intermediate_size`` of DeepSeek-V3's experts, cut down from 2,048: four layers of the true
width have 90 GB, and 45 GB of memory in fp32."""


def make_planned(directory: Path, layers: int) -> None:
    """Write ``model``, 8B-shaped with ``layers`` layers, and ``plan.json``, unless there already.

    The channels that stay are random.
    """
    config = PUBLISHED["Llama-3.1-8B"] | {"num_hidden_layers": layers}
    _make(directory, config, PAPER_SIZES, MAX_SHARD_BYTES)


def make_experts(directory: Path, layers: int) -> None:
    """The same of Qwen3-30B-A3B's shape, with ``layers`` layers, and a quarter of experts to lose.

    The vocabulary is small, so that nearly all bytes are experts'.
    """
    changes = {"num_hidden_layers": layers, "vocab_size": MIXTURE_VOCAB, **_specials(MIXTURE_VOCAB)}
    config = MIXTURES["Qwen3-30B-A3B"] | changes
    widths = {"moe_intermediate_size": config["moe_intermediate_size"]}
    sizes = Sizes(MIXTURE_VOCAB, widths, experts=config["num_experts"] * 3 // 4)
    _make(directory, config, sizes, MAX_SHARD_BYTES)


def make_hub(directory: Path) -> None:
    """The same of Qwen2.5-0.5B's shape, in shards of about ``HUB_SHARD_BYTES``."""
    _make(directory, PUBLISHED["Qwen2.5-0.5B"], HALF_SIZES, HUB_SHARD_BYTES)


def _make(directory: Path, config: Config, sizes: Sizes, max_shard_bytes: int) -> None:
    model, plan = directory / "model", directory / "plan.json"
    if plan.exists() and json.loads((model / "config.json").read_text()) == config:
        return
    plan.unlink(missing_ok=True)
    for old in model.glob("*.safetensors*"):
        old.unlink()
    write_tokenizer(write_random(model, config, max_shard_bytes=max_shard_bytes), config)
    layout = read_layout(Checkpoint.open(model))
    request = CutRequest(channels=ChannelOptions(expert_criterion="random"))
    choice = SizeChoice(rarity_of(layout), sizes, None, request)
    stats = None if sizes.experts else _random_stats(layout, sizes.vocab_size)
    plan_cut(layout, choice, stats).save(plan)


def make_headers(directory: Path) -> None:
    """Write ``model``: the headers and the tokenizer of a 70B checkpoint."""
    config = PUBLISHED["Llama-3.1-70B"]
    write_tokenizer(write_headers_only(directory / "model", config, SHARDS_70B), config)


def make_large(model: Path, layers: int) -> None:
    """Write ``model``: layers of 70B shape, with few tokens: only rows that occur are read."""
    config = llama_config(8192, 28672, layers, 64, 8, LARGE_VOCAB)
    if not (model / "tokenizer.json").exists():
        write_tokenizer(write_random(model, config), config)


def make_mixture(model: Path, layers: int) -> None:
    """Write ``model``: layers of DeepSeek-V3's shape, all with experts, an eighth as wide."""
    config = MIXTURES["DeepSeek-V3"] | {
        "num_hidden_layers": layers,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": NARROW,
        "vocab_size": LARGE_VOCAB,
        **_specials(LARGE_VOCAB),
    }
    if not (model / "tokenizer.json").exists():
        write_tokenizer(write_random(model, config), config)


def _specials(vocab_size: int) -> Config:
    """Return the ids of bos and eos that ``llama_config`` gives a vocabulary of this size."""
    special = vocab_size - SPECIAL_TOKENS
    return {"bos_token_id": special, "eos_token_id": special + 1}


def make_wide(directory: Path, channels: int) -> None:
    """Write ``model``, one layer with an FFN of ``channels``, and a plan that keeps an eighth."""
    model = directory / "model"
    config = llama_config(4096, channels, 1, 32, 8, 512)
    write_tokenizer(write_headers_only(model, config), config)
    layout = read_layout(Checkpoint.open(model))
    sizes = Sizes(512, {"intermediate_size": channels // 8})
    made = plan_cut(layout, SizeChoice(rarity_of(layout), sizes), _random_stats(layout, 512))
    made.save(directory / "plan.json")


def _random_stats(layout: Layout, edge: int) -> ChannelStats:
    generator, edges = np.random.default_rng(0), sorted({edge, layout.vocab_size})
    buckets = len(edges)
    layers = [
        {
            axis: AxisSums(
                generator.random((buckets, experts, layout.channels_of(axis))),
                generator.random((buckets, experts, layout.channels_of(axis))),
                np.full((buckets, experts), LEAST_TOKENS),
                *generator.random((2, experts, layout.channels_of(axis))),
            )
            for axis, experts in axes.items()
        }
        for axes in layout.ffn_outputs
    ]
    info = StatsInfo(
        fingerprint=layout.checkpoint.fingerprint,
        text_digest="random",
        samples=0,
        seq_len=0,
        tokens=0,
        bucket_edges=edges,
        dtype="float32",
        weights=layout.checkpoint.weights,
    )
    counts = np.ones(layout.vocab_size, dtype=np.int64)
    bucket_of = rarity_of(layout).buckets(info.bucket_edges)
    return ChannelStats(info, layers, counts, bucket_of, np.zeros(len(layers)))


MAKERS: dict[str, Callable[..., None]] = {
    "plan": make_planned,
    "hub": make_hub,
    "headers": make_headers,
    "wide": make_wide,
    "large": make_large,
    "experts": make_experts,
    "mixture": make_mixture,
}
"""Name of what is made → its function of a directory and, perhaps, a number."""

if __name__ == "__main__":
    MAKERS[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
