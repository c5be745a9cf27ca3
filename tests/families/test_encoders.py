"""Encoders: hidden states of kept tokens are the source's; statistics equal hooks on all layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.statistics.calibrate import Calibration, take_statistics
from calib.statistics.sums import ChannelSums
from calib.streaming.batches import Tokens
from calib.streaming.settings import PassSettings
from calib.text.windows import token_windows
from surgery.api import apply_plan
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.vocabulary.order import rarity_of
from tests.support import tiny, tiny_encoders
from tests.support.command import Run
from tests.support.loading import NOT_IN_4, Job, load_with_transformers4
from tests.support.plans import layout_of, masked_dense, random_plan
from tests.support.published import as_published_before_5
from tests.support.tiny_encoders import ENCODERS, VOCAB_SIZE

CPU = torch.device("cpu")
EDGES = [400, VOCAB_SIZE]
SMALLER = 400
HEADS = [
    *((key, "masked") for key in ENCODERS),
    *(
        (key, head)
        for key in ("bert", "deberta-v2", "modernbert")
        for head in ("base", "classifier")
    ),
]
"""Every encoder with the head for masked tokens, some without one and with a task's."""


def states(path: Path, ids: torch.Tensor, head: str = "base") -> torch.Tensor:
    """The last hidden states, or what the head makes of them."""
    with torch.no_grad():
        made = tiny_encoders.load(path, head)(input_ids=ids)
    return made.last_hidden_state if head == "base" else made.logits


def random_ids(count: int) -> torch.Tensor:
    """Ids of kept tokens, in two windows."""
    return torch.randint(5, count, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("key", "head"), HEADS)
def test_a_smaller_vocabulary_changes_no_bit(tmp_path: Path, key: str, head: str) -> None:
    source, out = tiny_encoders.save(tmp_path / "source", key, head), tmp_path / "out"
    plan = random_plan(source, SMALLER, dict(layout_of(source).widths))
    apply_plan(plan, source=source, output=out)
    kept, new = torch.from_numpy(plan.ids().kept), random_ids(SMALLER)
    for made in ("base", head):
        expected, found = states(source, kept[new], made), states(out, new, made)
        if made == "masked":
            expected = expected[..., kept]
        assert expected.std() > 0.05
        assert torch.equal(found, expected)


@pytest.mark.parametrize("key", ENCODERS)
def test_pruned_equals_masked_dense(tmp_path: Path, key: str) -> None:
    source, out = tiny_encoders.save(tmp_path / "source", key), tmp_path / "out"
    plan = random_plan(source, SMALLER, 0.6)
    apply_plan(plan, source=source, output=out)
    kept, new = torch.from_numpy(plan.ids().kept), random_ids(SMALLER)
    dense = states(masked_dense(source, plan, tmp_path / "masked"), kept[new])
    found = states(out, new)
    assert (found - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert not torch.allclose(states(source, kept[new]), dense, rtol=1e-3)


def activations(path: Path, windows: list[np.ndarray]) -> list[list[tuple[Tokens, Any]]]:
    """Per layer: the tokens and the input of its down_proj, by hooks on the whole model."""
    model, layout = tiny_encoders.load(path), layout_of(path)
    seen: list[list[tuple[Tokens, Any]]] = [[] for _ in layout.of_layer]
    running = [torch.empty(0)]
    for layer, tensors in enumerate(layout.of_layer):
        (name,) = (n for n, r in tensors.items() if is_down(layout, r.name))

        def hook(_: Any, inputs: Any, layer: int = layer) -> None:
            seen[layer].append((Tokens.of(running[0]), inputs[0].flatten(0, -2).clone()))

        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
    for length in dict.fromkeys(map(len, windows)):
        running[0] = torch.from_numpy(np.stack([w for w in windows if len(w) == length]))
        with torch.no_grad():
            model(input_ids=running[0])
    return seen


def is_down(layout: Any, name: str) -> bool:
    slot = layout.roles[name].slot
    return bool(slot.ffn_output and slot.width)


@pytest.mark.parametrize("key", ENCODERS)
def test_streamed_statistics_equal_hooks(tmp_path: Path, key: str) -> None:
    path = tiny_encoders.save(tmp_path / "model", key)
    layout = layout_of(path)
    documents = [tiny.prose(600), tiny.prose(640)[600:]]
    windows = token_windows(documents, load_tokenizer(path), 30, 24)
    buckets = rarity_of(layout).buckets(EDGES)
    settings = PassSettings(CPU, torch.float32)
    stats = take_statistics(Calibration(layout, windows, 24, buckets, EDGES, settings))
    for layer, seen in enumerate(activations(path, windows)):
        (axis,) = layout.ffn_outputs[layer]
        sums = ChannelSums(len(EDGES), 1, layout.channels_of(axis), CPU)
        for tokens, act in seen:
            sums.add(0, tokens, torch.from_numpy(buckets)[tokens.ids], act)
        found = stats.layers[layer][axis]
        assert np.array_equal(found.tokens, sums.tokens.numpy())
        assert np.allclose(found.sum_sq, sums.sum_sq.total.numpy(), rtol=1e-4, atol=1e-9)


def test_a_convolution_between_layers_runs_in_no_pass(tmp_path: Path, text: Path, run: Run) -> None:
    """As in DeBERTa V2 xlarge: its vocabulary can be pruned, its channels cannot be ranked."""
    convolution: dict[str, Any] = {"conv_kernel_size": 3, "conv_act": "gelu"}
    source = tiny_encoders.save(tmp_path / "source", "deberta-v2", **convolution)
    refused = run("calibrate", source, "--data", text, "-o", tmp_path / "stats.safetensors")
    assert refused.exit_code == 2
    assert "encoder.conv.conv.weight: computes between two layers" in refused.output
    plan = random_plan(source, SMALLER, dict(layout_of(source).widths))
    apply_plan(plan, source=source, output=tmp_path / "out")
    kept, new = torch.from_numpy(plan.ids().kept), random_ids(SMALLER)
    assert torch.equal(states(tmp_path / "out", new), states(source, kept[new]))


@pytest.mark.parametrize("key", ENCODERS)
def test_the_whole_command_line(tmp_path: Path, text: Path, run: Run, key: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", key)
    (width,) = layout_of(source).widths
    stats, plan, out = (tmp_path / name for name in ("stats.safetensors", "plan.json", "out"))
    sizes = ("--vocab-size", SMALLER, "--width", f"{width}=48")
    steps = (
        ("inspect", source),
        ("calibrate", source, "--data", text, "--seq-len", 32, "--samples", 8, "-o", stats),
        ("plan", source, "--stats", stats, *sizes, "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output, result.exception)
    assert "hidden state" in result.output
    refused = run("score", out, "--data", text)
    assert refused.exit_code == 2
    assert "is an encoder" in refused.output


@pytest.mark.parametrize("key", ["bert", "distilbert", "deberta-v2", "modernbert", "eurobert"])
def test_layers_are_removed(tmp_path: Path, run: Run, key: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", key)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    steps = (
        ("plan", source, "--layers", "0,2", "--vocab-size", SMALLER, "-o", plan),
        ("apply", plan, "-o", out),
        ("verify", out, "--forward"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, (step, result.output)
    whole, made = tiny_encoders.load(source), tiny_encoders.load(out)
    layers = [
        (layout_of(path).family.layers, model) for path, model in ((source, whole), (out, made))
    ]
    kept = [
        model.get_submodule(f"{name}.{i}").state_dict()
        for (name, model), i in zip(layers, (2, 1), strict=True)
    ]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert layout_of(out).num_hidden_layers == 2


def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    """What is written of every encoder loads in 4.57, where it knows the type."""
    jobs, expected = [], []
    for key in ENCODERS:
        source, out = (tmp_path / f"{key.replace(':', '-')}-{name}" for name in ("source", "out"))
        tiny_encoders.save(source, key)
        if key not in NOT_IN_4:
            as_published_before_5(source)
        apply_plan(random_plan(source, SMALLER, 0.5), source=source, output=out)
        new = random_ids(SMALLER)
        made = tiny_encoders.load(out, "masked")
        head = tiny_encoders.class_of(made.config, "masked").__name__
        jobs.append(Job(str(out), new.tolist(), head))
        expected.append(states(out, new, "masked").numpy())
    for key, found, logits in zip(
        ENCODERS, load_with_transformers4(jobs, tmp_path), expected, strict=True
    ):
        if key in NOT_IN_4:
            assert found.error is not None
            continue
        assert found.error is None, (key, found.error)
        assert found.logits is not None
        assert np.abs(found.logits - logits).max() <= 1e-4 * np.abs(logits).max(), key
        assert not {"missing_keys", "mismatched_keys"} & found.faults.keys(), (key, found.faults)
