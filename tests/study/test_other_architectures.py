"""2SSP and SliceGPT as trials: what their papers describe, built by hand from the whole model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.study.slicegpt import _Covariance, sliced_parameters, sliced_size
from calib.study.study import Candidate, Study
from calib.study.two_stage import attentions_by_perplexity, two_stage_sizes
from surgery.planning.sizes import whole
from tests.support import tiny
from tests.support.calibration import SETTINGS, bits_of, study_of
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of
from tools.published import PUBLISHED
from tools.shapes import write_headers_only


def silence(model: Any, layers: list[int]) -> None:
    for layer in layers:
        nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)


@pytest.mark.parametrize("key", ["llama", "gemma3_text", "qwen3"])
def test_a_trial_without_attentions_is_the_model_with_zeros_for_them(
    tmp_path: Path, key: str
) -> None:
    path = tiny.save(tmp_path / "model", key)
    study, layout = study_of(path), layout_of(path)
    candidate = Candidate("2ssp", whole(layout), without_attention=frozenset({0, 2}))
    (row,) = study.rows([candidate])
    model = tiny.load(path, key)
    silence(model, [0, 2])
    bits = bits_of(model, study.text.encoded(layout.vocab_size).windows)
    assert row.bits_per_byte == pytest.approx(bits / row.heldout_bytes, rel=1e-5)
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    full = layout.parameters(layout.vocab_size, layout.widths)
    norms = attention - sum(
        p.numel() for p in model.model.layers[0].self_attn.parameters() if p.dim() > 1
    )
    assert full - row.parameters in (2 * attention, 2 * (attention - norms))


def test_the_second_stage_removes_what_is_missed_least(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    study, layout = study_of(path), layout_of(path)
    study.rows([Candidate("2ssp", two_stage_sizes(layout, 0.2).sizes, "l2", retokenize=False)])
    kept, windows = study.kept["2ssp"], study.calibration_windows()[:1]
    found = attentions_by_perplexity(layout, windows, kept, 2, SETTINGS)

    def bits(removed: list[int]) -> float:
        model = tiny.load(path)
        silence(model, removed)
        for layer, axes in zip(model.model.layers, kept, strict=True):
            gone = np.setdiff1d(np.arange(tiny.INTERMEDIATE_SIZE), axes["ffn"][0])
            layer.mlp.down_proj.weight.data[:, gone] = 0
        return bits_of(model, list(windows))

    removed: list[int] = []
    for _ in range(2):
        left = [n for n in range(tiny.LAYERS) if n not in removed]
        removed.append(min(left, key=lambda n: bits([*removed, n])))
    assert found == removed


@pytest.mark.parametrize(
    ("name", "ratio", "parameters"),
    [
        ("Qwen2.5-0.5B", 0.1012, 444),
        ("Qwen2.5-0.5B", 0.3623, 315),
        ("Llama-3.1-8B", 0.1999, 6425),
        ("Llama-3.1-8B", 0.3477, 5238),
    ],
)
def test_the_split_meets_the_ratios_of_tables_2_and_3(
    tmp_path: Path, name: str, ratio: float, parameters: int
) -> None:
    layout = layout_of(write_headers_only(tmp_path, PUBLISHED[name]))
    found = two_stage_sizes(layout, ratio)
    attention = sum(ref.parameters for n, ref in layout.of_layer[0].items() if ".self_attn." in n)
    left = layout.parameters(layout.vocab_size, found.sizes.widths) - found.attentions * attention
    assert left / 1e6 == pytest.approx(parameters, rel=0.003)
    assert 0 <= found.attentions < layout.num_hidden_layers


def sliced_bits(path: Path, study: Study, size: int) -> tuple[float, int]:
    """Bits and parameters of the sliced network as published: small matrices, changes of basis."""
    model, layout = tiny.load(path), layout_of(path)
    body, windows = model.model, study.text.encoded(layout.vocab_size).windows
    calibration = [torch.from_numpy(w)[None] for w in study.calibration_windows()]
    texts = [*calibration, *(torch.from_numpy(w)[None] for w in windows)]
    full = body.embed_tokens.weight.shape[1]
    count = len(calibration)

    def norm(states: torch.Tensor, eps: float) -> torch.Tensor:
        return states * torch.rsqrt(states.pow(2).sum(-1, keepdim=True) / full + eps)

    def axes_of(states: list[torch.Tensor]) -> torch.Tensor:
        covariance = _Covariance()
        for each in states[:count]:
            covariance.add(each)
        assert covariance._sum is not None
        return torch.linalg.eigh(covariance._sum)[1][:, -size:].float()

    with torch.no_grad():
        whole_states = [body.embed_tokens(ids) for ids in texts]
        axes = axes_of(whole_states)
        states = [each @ axes for each in whole_states]
        parameters = 2 * body.embed_tokens.weight.numel() - layout.vocab_size * (full - size)
        for number, layer in enumerate(body.layers):
            last = number == len(body.layers) - 1
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                linear.weight.data = linear.weight * layer.input_layernorm.weight @ axes
            out = layer.self_attn.o_proj
            whole_out = out.weight.data.clone()
            inner = []
            for ids, each in zip(texts, states, strict=True):
                positions = torch.arange(ids.shape[1])[None]
                rotary = body.rotary_emb(each, positions)
                mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
                read = norm(each, layer.input_layernorm.variance_epsilon)
                made, _ = layer.self_attn(read, position_embeddings=rotary, attention_mask=mask)
                inner.append((each @ axes.T + made, each, made))
            second = axes_of([both for both, _, _ in inner])
            states = [each @ (axes.T @ second) + made @ second for _, each, made in inner]
            out.weight.data = second.T @ whole_out
            for name in ("gate_proj", "up_proj"):
                linear = getattr(layer.mlp, name)
                linear.weight.data = linear.weight * layer.post_attention_layernorm.weight @ second
            eps = layer.post_attention_layernorm.variance_epsilon
            made = [layer.mlp(norm(each, eps)) for each in states]
            whole_states = [a @ second.T + b for a, b in zip(states, made, strict=True)]
            third = torch.eye(full) if last else axes_of(whole_states)
            states = [a @ (second.T @ third) + b @ third for a, b in zip(states, made, strict=True)]
            layer.mlp.down_proj.weight.data = third.T @ layer.mlp.down_proj.weight
            parameters += sum(
                p.numel() for n, p in layer.named_parameters() if "layernorm" not in n
            )
            parameters += (axes.T @ second).numel() + (second.T @ third).numel()
            axes = third
        bits = 0.0
        for ids, each in zip(texts[count:], states[count:], strict=True):
            logs = model.lm_head(body.norm(each))[0].double().log_softmax(-1)
            bits -= float(logs[:-1].gather(1, ids[0, 1:, None]).sum())
    return bits / math.log(2), parameters


@pytest.mark.parametrize("tied", [False, True])
def test_a_sliced_trial_is_the_network_of_small_matrices(tmp_path: Path, tied: bool) -> None:
    path = tiny.save(tmp_path / "model", tied=tied)
    study, layout = study_of(path), layout_of(path)
    size = sliced_size(layout, 0.25)
    (row,) = study.rows([Candidate("slicegpt", whole(layout), slice_to=size)])
    bits, parameters = sliced_bits(path, study, size)
    assert row.bits_per_byte == pytest.approx(bits / row.heldout_bytes, rel=1e-4)
    assert row.bits_per_byte != pytest.approx(study.dense.bits_per_byte, rel=1e-3)
    assert row.parameters == sliced_parameters(layout, size)
    assert row.parameters == parameters


def test_all_columns_are_the_dense_model(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model")
    study, layout = study_of(path), layout_of(path)
    size = sliced_size(layout, 0)
    (row,) = study.rows([Candidate("slicegpt", whole(layout), slice_to=size)])
    assert row.bits_per_byte == pytest.approx(study.dense.bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("key", ["gemma2", "gpt2", "stablelm", "qwen3_moe"])
def test_models_of_other_blocks_are_refused_by_name(tmp_path: Path, key: str, run: Run) -> None:
    path = tiny.save(tmp_path / "model", key)
    prose = tmp_path / "text.txt"
    prose.write_text(tiny.prose(9_000), encoding="utf-8")
    options = ("--ratio", 0.2, "--data", prose, "--seq-len", 64, "--samples", 4, "--windows", 2)
    result = run("compare", path, *options, "--methods", "slicegpt")
    assert_refused(result, "RMS norms", "leave out the method slicegpt")
    if key == "qwen3_moe":
        refused = run("compare", path, *options, "--methods", "2ssp")
        assert_refused(refused, "no single dense FFN", "leave out the method 2ssp")


def test_compare_says_that_their_output_is_no_checkpoint(tmp_path: Path, run: Run) -> None:
    path = tiny.save(tmp_path / "model", intermediate_size=256)
    prose = tmp_path / "text.txt"
    prose.write_text(tiny.prose(9_000), encoding="utf-8")
    options = ("--ratio", 0.35, "--data", prose, "--seq-len", 64, "--samples", 8, "--windows", 2)
    both = ("--methods", "2ssp,slicegpt")
    result = run("compare", path, *options, *both)
    assert result.exit_code == 0, result.output
    assert "2ssp: no standard checkpoint: config.json has no place for layers without" in (
        result.stdout
    )
    assert "slicegpt: no standard checkpoint" in result.stdout
    rows = json.loads(run("compare", path, *options, *both, "--json").stdout)["0.35"]
    assert rows[1]["removed"] == pytest.approx(0.35, abs=0.006)
