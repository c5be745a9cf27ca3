"""A smaller residual stream as a trial, beside a checkpoint of that size that is built by hand."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.study.residual import (
    Projection,
    ResidualStream,
    StreamCut,
    StreamSums,
    measure_stream,
)
from calib.study.study import Candidate, Study
from calib.study.table import HIDDEN, ROTATE
from surgery.errors import FamilyError
from surgery.planning.sizes import whole
from tests.support import tiny
from tests.support.calibration import SETTINGS, bits_of, study_of
from tests.support.command import Run, assert_refused
from tests.support.plans import layout_of

READ_BY = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
"""Norm → the block that reads what it gives."""


def sums_of(study: Study) -> StreamSums:
    stream = ResidualStream.of(study.text.layout)
    return measure_stream(stream, study.calibration_windows(), SETTINGS)


def smaller(path: Path, key: str, stream: ResidualStream, cut: StreamCut, by: Projection) -> Any:
    """The library's own model of the smaller size, in which all that carries the stream is cut."""
    model = tiny.load(path, key)
    config, basis = copy.deepcopy(model.config), by.basis.float()
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    share = stream.size / cut.size
    config.hidden_size, config.rms_norm_eps = cut.size, config.rms_norm_eps * share
    config.tie_word_embeddings = False
    offset = 1.0 if key.startswith("gemma") else 0.0
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    tensors.setdefault("lm_head.weight", model.lm_head.weight.detach().clone())
    norms = {n: v + offset for n, v in tensors.items() if v.dim() == 1 and stream.dims.get(n) == 0}
    for name, weight in norms.items():
        if not name.endswith("norm.weight"):  # a bias of what writes to the stream
            tensors[name] = weight @ basis
            continue
        tensors[name] = math.sqrt(share) * (weight @ basis) - offset
        if cut.method == ROTATE:
            tensors[name] = torch.full((cut.size,), math.sqrt(share)) - offset
            layer, _, norm = name.removesuffix(".weight").rpartition(".")
            for other, value in tensors.items():
                reads = other.startswith(f"{layer}.{READ_BY.get(norm)}.")
                final = norm == "norm" and other == "lm_head.weight"
                if final or (reads and stream.dims.get(other) == 1):
                    tensors[other] = value * weight
    for name, dim in {"lm_head.weight": 1, **stream.dims}.items():
        if name not in norms:
            tensors[name] = tensors[name] @ basis if dim else basis.T @ tensors[name]
    made = tiny.auto_class(key).from_config(config).eval()
    made.load_state_dict(tensors, strict=False)
    table = made.model.embed_tokens
    if hasattr(table, "embed_scale"):  # √hidden_size: its rows would be multiplied instead
        table.embed_scale.fill_(math.sqrt(stream.size))
    return made


@pytest.mark.parametrize(
    ("key", "tied"),
    [
        *(("llama", True), ("qwen2", False), ("qwen3", True)),
        *(("mistral", False), ("granite", True), ("phi3", False)),
    ],
)
def test_rotated_and_uncut_is_the_dense_model(tmp_path: Path, key: str, tied: bool) -> None:
    path = tiny.save(tmp_path / "model", key, tied=tied)
    study = study_of(path)
    sums = sums_of(study)
    cut = StreamCut(ROTATE, sums.stream.size, 0)
    made = smaller(path, key, sums.stream, cut, sums.projection(cut))
    ids = torch.from_numpy(study.calibration_windows()[0])[None]
    dense = tiny.logits_of(tiny.load(path, key), ids)
    assert torch.allclose(tiny.logits_of(made, ids), dense, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize("method", [ROTATE, HIDDEN])
@pytest.mark.parametrize(
    ("key", "tied"), [("llama", True), ("qwen2", False), ("gemma3_text", True)]
)
def test_a_trial_is_the_checkpoint_of_that_size(
    tmp_path: Path, key: str, tied: bool, method: str
) -> None:
    path = tiny.save(tmp_path / "model", key, tied=tied)
    study, layout = study_of(path), layout_of(path)
    sums = sums_of(study)
    if (key, method) == ("gemma3_text", ROTATE):
        with pytest.raises(FamilyError, match="a norm that is not just before"):
            sums.stream.check(method)
        return
    cut = sums.stream.cut(0.2, method)
    assert cut.size < sums.stream.size
    (row,) = study.rows([Candidate(method, whole(layout), stream=cut)])
    made = smaller(path, key, sums.stream, cut, sums.projection(cut))
    bits = bits_of(made, list(study.text.encoded(layout.vocab_size).windows))
    assert row.bits_per_byte == pytest.approx(bits / row.heldout_bytes, rel=1e-5)
    assert row.bits_per_byte != pytest.approx(study.dense.bits_per_byte, rel=1e-3)
    parameters = sum(each.numel() for each in made.parameters())
    untied = method == ROTATE or not tied
    assert row.parameters == parameters - (0 if untied else made.lm_head.weight.numel())


@pytest.mark.parametrize(
    ("key", "method", "why"),
    [
        ("gpt2", HIDDEN, "no hidden_size of its own"),
        ("gpt_neox", HIDDEN, "takes other sizes from hidden_size"),
        ("nemotron", HIDDEN, "is not made of RMS norms"),
        ("cohere", HIDDEN, "has a norm that is no RMS norm"),
        ("gemma2", ROTATE, "a norm that is not just before"),
        ("olmo2", ROTATE, "a norm that is not just before"),
    ],
)
def test_other_streams_are_refused_by_name(
    tmp_path: Path, key: str, method: str, why: str, run: Run
) -> None:
    path = tiny.save(tmp_path / "model", key)
    prose = tmp_path / "text.txt"
    prose.write_text(tiny.prose(9_000), encoding="utf-8")
    options = ("--ratio", 0.2, "--data", prose, "--seq-len", 64, "--samples", 4, "--windows", 2)
    result = run("compare", path, *options, "--methods", method)
    assert_refused(result, why, "leave out the method")
