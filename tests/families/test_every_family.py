"""Every family: streamed statistics and scores, pruning, and the whole command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.scoring.score import score_windows
from calib.statistics.calibrate import Calibration, take_statistics
from calib.statistics.sums import ChannelSums
from calib.streaming.settings import PassSettings
from calib.text.windows import byte_windows, token_windows
from surgery.api import apply_plan
from surgery.planning.plan import Plan
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny
from tests.support.command import Run
from tests.support.contents import weights
from tests.support.full_load import full_load_bits, hooked, window_norms
from tests.support.plans import assert_equals_masked_dense, layout_of, random_plan
from tests.support.published import deepseek_v4_name, rename_tensors
from tests.support.sample import KEYS, sampled, text_family

SHARE = 0.6
CPU = torch.device("cpu")
SETTINGS = PassSettings(CPU, torch.float32)
EDGES = [512, tiny.VOCAB_SIZE]
SEQ_LEN = 24
LITTLE = ("--min-expert-tokens", 0)
"""A random router may send an expert next to nothing."""


@pytest.mark.parametrize("key", sampled(KEYS))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pruned_equals_masked_dense(tmp_path: Path, key: str, tied: bool) -> None:
    source = tiny.save(tmp_path / "source", key, tied=tied, special_first=not tied)
    plan = random_plan(source, 512, SHARE)
    apply_plan(plan, source=source, output=tmp_path / "out")
    assert_equals_masked_dense(source, tmp_path / "out", plan, key)


@pytest.mark.parametrize("key", sampled(KEYS))
def test_streamed_statistics_equal_hooks(tmp_path: Path, key: str) -> None:
    path = tiny.save(tmp_path / "model", key)
    layout = layout_of(path)
    documents = [tiny.prose(600), tiny.prose(640)[600:]]
    windows = token_windows(documents, load_tokenizer(path), 30, SEQ_LEN)
    buckets = rarity_of(layout).buckets(EDGES)
    stats = take_statistics(Calibration(layout, windows, SEQ_LEN, buckets, EDGES, SETTINGS))
    full = hooked(path, key, windows)
    activations = full.activations
    for layer, axes in enumerate(layout.ffn_outputs):
        assert set(axes) == set(activations[layer])
        for axis, experts in axes.items():
            sums = ChannelSums(len(EDGES), experts, layout.channels_of(axis), CPU)
            for expert, tokens, act in activations[layer][axis]:
                sums.add(expert, tokens, torch.from_numpy(buckets)[tokens.ids], act)
            found = stats.layers[layer][axis]
            norms = window_norms(activations[layer][axis], experts, layout.channels_of(axis))
            assert np.allclose(found.sum_l2, norms, rtol=1e-4, atol=1e-9)
            assert np.allclose(found.weight_norm, full.norms[layer][axis], rtol=1e-12)
            assert np.array_equal(found.tokens, sums.tokens.numpy())
            assert found.tokens.sum() >= sum(map(len, windows))
            assert np.allclose(found.sum_sq, sums.sum_sq.total.numpy(), rtol=1e-4, atol=1e-9)
            assert np.allclose(found.sum_abs, sums.sum_abs.total.numpy(), rtol=1e-4, atol=1e-9)
    assert np.allclose(stats.cosines, full.cosines, rtol=1e-5)
    assert np.allclose(stats.block_influence, 1 - stats.cosines / sum(map(len, windows)))


@pytest.mark.parametrize("key", sampled(KEYS))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_score_equals_a_full_load(
    tmp_path: Path, key: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "calib.streaming.ends.HEAD_ROWS", 250
    )  # several blocks, the last one partial
    # transformers zeroes Youtu's padding row as it loads it, which a tied head shows.
    no_padding: dict[str, Any] = {"pad_token_id": None} if key == "youtu" else {}
    path = tiny.save(tmp_path / "model", key, tied=tied, **no_padding)
    texts = byte_windows([tiny.prose(400)], 10, 120)
    found = score_windows(layout_of(path), texts, load_tokenizer(path), SETTINGS)
    assert found.bits == pytest.approx(full_load_bits(path, key, texts), rel=1e-5)


@pytest.mark.parametrize("key", sampled(KEYS))
def test_the_whole_command_line(tmp_path: Path, text: Path, run: Run, key: str) -> None:
    source = tiny.save(tmp_path / "source", key, sharded=True)
    widths = {name: size // 2 for name, size in layout_of(source).widths.items()}
    sizes = ["--vocab-size", 512, *(o for k, n in widths.items() for o in ("--width", f"{k}={n}"))]
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    take = ("calibrate", source, "--data", text, "--seq-len", 64, "--samples", 12, "-o", stats)
    if not widths:
        refused = run(*take)
        assert refused.exit_code == 2
        why = text_family(key).only_vocabulary
        assert f"without channels to choose: {why}; plan the vocabulary alone" in refused.output
    steps = (
        ("inspect", source),
        *([take] if widths else []),
        ("plan", source, *(["--stats", stats, *LITTLE] if widths else []), *sizes, "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
        ("score", out, "--data", text, "--samples", 2, "--window-bytes", 200),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    assert layout_of(out).widths == widths


def test_deepseek_v4_under_its_published_names(tmp_path: Path, text: Path, run: Run) -> None:
    """They have no ``model.`` in front, which transformers saves, and reads either way."""
    source = tiny.save(tmp_path / "source", "deepseek_v4", sharded=True)
    rename_tensors(source, deepseek_v4_name)
    names = set(weights(source))
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_fn"} <= names
    assert not any(name.startswith("model.") for name in names)
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    sizes = ("--vocab-size", 512, "--width", "moe_intermediate_size=32")
    for step in (
        ("calibrate", source, "--data", text, "--seq-len", 64, "--samples", 12, "-o", stats),
        ("plan", source, *sizes, *LITTLE, "--stats", stats, "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
        ("score", source, out, "--data", text),
    ):
        done = run(*step)
        assert done.exit_code == 0, done.output
    assert set(weights(out)) == names
    assert_equals_masked_dense(source, out, Plan.load(plan), "deepseek_v4")


@pytest.mark.parametrize("key", sampled(KEYS))
def test_keeping_everything_reproduces_every_byte(tmp_path: Path, run: Run, key: str) -> None:
    source = tiny.save(tmp_path / "source", key, dtype=torch.bfloat16, sharded=True)
    widths = [o for k, n in layout_of(source).widths.items() for o in ("--width", f"{k}={n}")]
    sizes = ("--vocab-size", tiny.VOCAB_SIZE, *widths)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", source, *sizes, "-o", plan).exit_code == 0
    assert run("apply", plan, "-o", out).exit_code == 0
    for file in source.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_files_may_hold_keys_and_values_that_no_layer_computes(
    tmp_path: Path, text: Path, run: Run
) -> None:
    source = tiny.save(tmp_path / "source", "gemma4_text:shared", tied=True)
    file = source / "model.safetensors"
    tensors = load_file(file)
    at = "model.layers.{}.self_attn.{}.weight"
    more = {
        at.format(3, n): tensors[at.format(2, n)].clone() for n in ("k_norm", "k_proj", "v_proj")
    }
    save_file(tensors | more, file, {"format": "pt"})
    take = ("--data", text, "--seq-len", 32, "--samples", 4)
    sizes = ("--vocab-size", 512, "--width", "intermediate_size=40")
    made = run("prune", source, *take, *sizes, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    verified = run("verify", tmp_path / "out", "--forward")
    assert verified.exit_code == 0, verified.output
    found = weights(tmp_path / "out")
    assert more.keys() <= found.keys()
    widths = [found[f"model.layers.{n}.mlp.up_proj.weight"].shape[0] for n in range(5)]
    assert widths == [40, 40, 40, 80, 80]
