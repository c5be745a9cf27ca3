"""Streamed statistics and scores equal those of a full load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib.scoring.score import score_windows
from calib.statistics.sums import ChannelSums
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import pieces
from calib.streaming.weights import WeightReader
from calib.text.windows import byte_windows, scored_windows
from surgery.stats.channel_stats import PARTS, ChannelStats
from surgery.stats.channels import CRITERIA, bucket_weights, choose_channels
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny
from tests.support.calibration import CPU, EDGES, SEQ_LEN, SETTINGS, sample_windows, take_stats
from tests.support.command import Run, assert_refused
from tests.support.contents import digests
from tests.support.full_load import full_load_bits, hooked, window_norms
from tests.support.plans import layout_of, random_plan

COMMON = "common-act2"


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_streamed_sums_equal_hooks_bit_for_bit(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    path = tiny.save(tmp_path / "model", model_type, dtype=dtype, sharded=True)
    stats = take_stats(path)
    bucket_of = torch.from_numpy(rarity_of(layout_of(path)).buckets(EDGES))
    full = hooked(path, model_type, sample_windows(path))
    for layer, axes in enumerate(full.activations):
        sums = ChannelSums(len(EDGES), 1, tiny.INTERMEDIATE_SIZE, CPU)
        for expert, tokens, act in axes["ffn"]:
            sums.add(expert, tokens, bucket_of[tokens.ids], act)
        found = stats.layers[layer]["ffn"]
        expected = sums.numbers(torch.from_numpy(found.weight_norm))
        for part in PARTS:
            assert np.array_equal(getattr(found, part), getattr(expected, part)), part
        assert np.allclose(found.weight_norm, full.norms[layer]["ffn"], rtol=1e-12)
        assert found.sum_sq.min() > 0
        assert np.allclose(found.sum_l2, window_norms(axes["ffn"], *found.sum_l2.shape), rtol=1e-12)
    assert np.allclose(stats.cosines, full.cosines, rtol=1e-12)
    assert stats.token_counts.sum() == stats.info.tokens == sum(map(len, sample_windows(path)))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_ffn_in_pieces_of_tokens_gives_the_same(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.save(tmp_path / "model", model_type)
    whole = take_stats(path)
    monkeypatch.setattr("calib.streaming.ffn.PIECE_VALUES", 20 * tiny.INTERMEDIATE_SIZE)
    assert len(pieces(1, SEQ_LEN, tiny.INTERMEDIATE_SIZE)) == 3
    in_pieces = take_stats(path)
    for expected, found in zip(whole.layers, in_pieces.layers, strict=True):
        for name in ("sum_sq", "sum_abs", "sum_l2"):
            old, new = (getattr(axes["ffn"], name) for axes in (expected, found))
            assert np.allclose(old, new, rtol=1e-5, atol=0)
    assert np.array_equal(whole.token_counts, in_pieces.token_counts)


def test_importance_is_equation_5_by_hand(tmp_path: Path) -> None:
    """I_k = Σ_i w_i (σ(X_i W_1) ⊙ X_i W_2)_k², w_i = 0 where x_i is one of the rarest tokens."""
    path = tiny.save(tmp_path / "model")
    layout, windows = layout_of(path), sample_windows(path)
    ids = rarity_of(layout).id_map(400)
    stats, kept = take_stats(path), ids.keep_mask()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    importance = np.zeros(tiny.INTERMEDIATE_SIZE)
    weights = []
    for window in windows:
        with torch.no_grad():
            model(torch.from_numpy(window)[None])
        for token, x in zip(window, inputs.pop()[0].double().numpy(), strict=True):
            gate = x @ mlp.gate_proj.weight.detach().double().numpy().T
            up = x @ mlp.up_proj.weight.detach().double().numpy().T
            weight = 1.0 if kept[token] else 0.0
            weights.append(weight)
            importance += weight * (gate / (1 + np.exp(-gate)) * up) ** 2
    assert 0 < sum(weights) < len(weights)  # some tokens are in S, some are not
    sums = stats.layers[1]["ffn"].sum_sq[:, 0]
    assert np.allclose(bucket_weights(stats, ids) @ sums, importance, rtol=1e-4)
    chosen = choose_channels(stats, ids, {"ffn": 40}, COMMON)[1]["ffn"][0]
    assert set(chosen) == set(np.argsort(-importance)[:40])
    assert set(chosen) != set(choose_channels(stats, ids, {"ffn": 40}, "random")[1]["ffn"][0])


def test_wanda_and_l2_are_what_their_papers_say(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    stats, ids = take_stats(path), rarity_of(layout_of(path)).id_map(512)
    windows, kept = sample_windows(path), torch.from_numpy(ids.keep_mask())
    activations = hooked(path, "llama", windows).activations[1]["ffn"]
    inputs = torch.cat([act[kept[tokens.ids]] for _, tokens, act in activations]).double()
    assert len(inputs) < sum(map(len, windows))  # some tokens are in S, some are not
    weight = tiny.load(path).model.layers[1].mlp.down_proj.weight.detach().double()
    scores = weight.abs() * inputs.norm(dim=0)  # Wanda's, of each weight
    norms = [
        act[tokens.windows == window].double().norm(dim=0)
        for _, tokens, act in activations
        for window in range(tokens.count)
    ]
    assert len(norms) == len(windows)
    expected = {"wanda": scores.norm(dim=0), "l2": torch.stack(norms).mean(dim=0)}
    for criterion, importance in expected.items():
        found = CRITERIA[criterion](stats.layers[1]["ffn"], bucket_weights(stats, ids), [0])[0]
        scale = len(windows) if criterion == "l2" else 1
        assert np.allclose(found, scale * importance.numpy(), rtol=1e-5)
        chosen = choose_channels(stats, ids, {"ffn": 40}, criterion)[1]["ffn"][0]
        assert set(chosen) == set(torch.argsort(-importance)[:40].tolist())


def test_rare_tokens_change_act2_but_not_common_act2(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    stats, ids = take_stats(path), rarity_of(layout_of(path)).id_map(400)
    assert np.array_equal(bucket_weights(stats, ids), [1, 0, 0])
    for axes in stats.layers:
        sums = axes["ffn"].sum_sq
        sums[1:] += np.random.default_rng(0).random(sums.shape[2]) * 1e6
    lengths = {"ffn": 40}
    before = [kept["ffn"][0] for kept in choose_channels(take_stats(path), ids, lengths, COMMON)]
    after = [kept["ffn"][0] for kept in choose_channels(stats, ids, lengths, COMMON)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    plain = choose_channels(stats, ids, lengths, "act2")[0]["ffn"][0]
    assert not np.array_equal(plain, before[0])


def test_size_inside_a_bucket_counts_by_the_share_that_is_kept(tmp_path: Path, run: Run) -> None:
    path = tiny.save(tmp_path / "model")
    stats = take_stats(path)
    rarity = rarity_of(layout_of(path))
    ids = rarity.id_map(450)
    inside = rarity.order[400:512]
    share = stats.token_counts[rarity.order[400:450]].sum() / stats.token_counts[inside].sum()
    assert 0 < share < 1
    assert np.allclose(bucket_weights(stats, ids), [1, share, 0])
    stats.save(tmp_path / "stats.safetensors")
    sizes = ("--vocab-size", 450, "--intermediate-size", 48)
    options = ("--stats", tmp_path / "stats.safetensors", "-o", tmp_path / "plan.json")
    result = run("plan", path, *sizes, *options)
    assert "calibrating with --vocab-sizes 450 makes it exact" in result.output


def test_every_weight_byte_is_read_once(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model", "gemma3_text", sharded=True)
    layout, windows = layout_of(path), sample_windows(path)
    used = len(np.unique(np.concatenate(windows)))
    with WeightReader(layout.checkpoint, CPU, torch.float32) as reader:
        decoder = StreamedDecoder(layout, reader)
        stream = Stream(windows)
        decoder.embed([stream])
        decoder.run_layers([stream])
    tensors = layout.checkpoint.tensors
    rest = sum(
        tensors[name].nbytes for name in tensors if "embed" not in name and name != "lm_head.weight"
    )
    row = tensors["model.embed_tokens.weight"].nbytes // layout.vocab_size
    assert used < layout.vocab_size
    assert reader.bytes_read == rest + used * row


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_score_equals_a_full_load(
    tmp_path: Path, model_type: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "calib.streaming.ends.HEAD_ROWS", 100
    )  # several blocks, the last one partial
    capped = model_type == "gemma3_text"
    changes: dict[str, Any] = {"final_logit_softcapping": 2.0} if capped else {}
    path = tiny.save(tmp_path / "model", model_type, tied=tied, **changes)
    texts = byte_windows([tiny.prose(700), tiny.prose(900)[700:]], 10, 256)
    found = score_windows(layout_of(path), texts, load_tokenizer(path), SETTINGS)
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.bits == pytest.approx(full_load_bits(path, model_type, texts), rel=1e-5)
    assert found.lossy_windows == 0


def broken(path: Path, name: str, value: float) -> None:
    """Write ``value`` into the last number of a tensor of the model."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "spilled", "prune", "teach", "score", "search"])
def test_a_broken_tensor_is_named_by_every_command_that_computes(
    tmp_path: Path, name: str, value: float, command: str, run: Run
) -> None:
    path, text = tiny.save(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(tiny.prose(3000), encoding="utf-8")
    (tmp_path / "spill").mkdir()
    random_plan(path, 640, 96).save(tmp_path / "plan.json")
    broken(path, name, value)
    out, windows = ("-o", tmp_path / "new" / "out"), ("--seq-len", 32, "--samples", 4)
    (tmp_path / "new").mkdir()
    more = {
        "calibrate": (*out, *windows),
        "spilled": (*out, *windows, "--spill", tmp_path / "spill"),
        "prune": (*out, *windows, "--intermediate-size", 64),
        "teach": (*out, "--plan", tmp_path / "plan.json", "--tokens", 64, "--seq-len", 32),
        "score": ("--window-bytes", 256),
        "search": ("--ratio", 0.1, "--multiple-of", 8, "--seq-len", 32),
    }
    before = digests(tmp_path)
    named = "calibrate" if command == "spilled" else command
    result = run(named, path, "--data", text, *more[command])
    *_, error = result.stderr.splitlines()
    words = (f"model.safetensors: tensor {name}", "not finite", "another checkpoint")
    assert (result.exit_code, [word for word in words if word not in error]) == (2, [])
    assert digests(tmp_path) == before  # nothing is left that would stop the next run


def test_a_broken_embedding_or_head_is_named(tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.prose(3000), encoding="utf-8")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        path = tiny.save(tmp_path / name)
        file = path / "model.safetensors"
        tensors = load_file(file)
        tensors[name].fill_(float("nan"))
        save_file(tensors, file, {"format": "pt"})
        result = run("score", path, "--data", text, "--window-bytes", 256)
        assert_refused(result, f"tensor {name}", "not finite")


def test_an_overflow_names_the_first_layer_and_the_dtype(tmp_path: Path, run: Run) -> None:
    path, text = tiny.save(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(tiny.prose(3000), encoding="utf-8")
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 6e4 / 2
    tensors["model.layers.1.mlp.up_proj.weight"].clamp_(-6e4, 6e4)
    save_file(tensors, file, {"format": "pt"})
    options = ("--data", text, "--seq-len", 32, "--samples", 4, "-o", tmp_path / "s")
    result = run("calibrate", path, *options, "--dtype", "float16")
    assert_refused(result, "layer 1: is the first", "float16", "--dtype bfloat16 or float32")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "text.txt"]
    again = run("calibrate", path, *options)  # the same output, in float32
    assert again.exit_code == 0, again.output


def test_weights_that_no_token_meets_are_checked_too(tmp_path: Path, run: Run) -> None:
    """An expert without tokens adds nothing to the output, but its norms rank its channels."""
    path, text = tiny.save(tmp_path / "model", "mixtral"), tmp_path / "text.txt"
    text.write_text("a" * 20, encoding="utf-8")
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".layers.2." in name and ("experts" in name) and ("w2" in name or "down" in name):
            tensor.fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    result = run(
        "calibrate", path, "--data", text, "--seq-len", 8, "--samples", 1, "-o", tmp_path / "s"
    )
    assert_refused(result, "layers.2.", "not finite")


FEW = 40
"""Positions of the models below; a window of 2,048 bytes takes many more tokens."""
KEYS = {"gpt2": "n_positions", "codegen": "n_positions", "mpt": "max_seq_len"}


@pytest.mark.parametrize(
    "model_type", ["gpt2", "codegen", "mpt", "opt", "gpt_bigcode", "gpt_neo", "llama"]
)
def test_windows_are_within_the_positions_of_the_model(
    tmp_path: Path, model_type: str, run: Run
) -> None:
    """The default of 2,048 tokens and bytes is more than some models have positions for."""
    key = KEYS.get(model_type, "max_position_embeddings")
    changes: dict[str, Any] = {key: FEW}
    path = tiny.save(tmp_path / "model", model_type, **changes)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.prose(9000).split()), encoding="utf-8")
    data = ("--data", text)
    scored = run("score", path, *data, "--json")
    assert scored.exit_code == 0, scored.output
    assert f"than the model has positions ({FEW})" in scored.stderr
    assert json.loads(scored.stdout)["bytes"] == len(text.read_bytes())
    shorter = run("score", path, *data, "--json", "--window-bytes", 30)
    assert "positions" not in shorter.stderr
    if not layout_of(path).widths:
        return
    calibrated = run("calibrate", path, *data, "-o", tmp_path / "s")
    assert calibrated.exit_code == 0, calibrated.output
    assert f"the model has {FEW} positions" in calibrated.stderr
    info = ChannelStats.load(tmp_path / "s").info
    assert info.seq_len == FEW
    pair = ("--candidates", "600:90,500:96")
    searched = run("search", path, *data, *pair, "--samples", 2)
    assert searched.exit_code == 0, searched.output
    sizes = ("--vocab-size", 600, "--intermediate-size", 90)
    pruned = run("prune", path, *data, *sizes, "-o", tmp_path / "out", "--samples", 2)
    assert pruned.exit_code == 0, pruned.output
    assert run("verify", tmp_path / "out", "--forward").exit_code == 0


def test_a_text_in_several_windows_gives_each_token_once() -> None:
    ids = np.arange(10, 33)
    for most in (None, 2, 5, 23, 24, 25):
        windows = scored_windows(1, ids, most)
        assert all(window[0] == 1 and len(window) <= (most or 24) for window in windows)
        assert np.array_equal(np.concatenate([window[1:] for window in windows]), ids)
        assert (len(windows) == 1) == (most is None or most >= 24)
