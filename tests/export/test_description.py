"""What llama.cpp is told of layers, windows and rotary embeddings, and what it cannot be told."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import surgery
from surgery.errors import FamilyError
from surgery.export.architectures import ARCHITECTURES, architecture_of
from surgery.export.description import FREQUENCIES, LONG, SHORT, describe
from tests.support import gguf_models
from tests.support.gguf_files import read_gguf
from tests.support.json_files import change, put
from tests.support.plans import layout_of, random_plan


def described(path: Path) -> Any:
    layout = layout_of(path)
    return describe(layout, architecture_of(layout, None))


def without_layers(source: Path, out: Path, layers: list[list[int]]) -> Path:
    surgery.apply_plan(random_plan(source, 640, 1.0, layers=layers), source=source, output=out)
    return out


@pytest.mark.parametrize("key", ["gemma2", "gemma3_text", "gpt_oss"])
def test_windows_are_written_for_the_layers_that_are_left(tmp_path: Path, key: str) -> None:
    source = gguf_models.save(tmp_path / "model", key)
    out = without_layers(source, tmp_path / "out", [[1], [2]])
    surgery.export_gguf(out, tmp_path / "out.gguf", pre="gpt-2")
    name = ARCHITECTURES[key].name
    keys, _ = read_gguf(tmp_path / "out.gguf")
    assert keys[f"{name}.attention.sliding_window_pattern"] == [False, True]
    assert keys[f"{name}.attention.sliding_window"] == 16


@pytest.mark.parametrize(("given", "full"), [(None, 6), (2, 2)])
def test_a_config_without_a_list_counts_as_transformers_does(
    tmp_path: Path, given: int | None, full: int
) -> None:
    layers = {"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}
    source = gguf_models.save(tmp_path / "model", "gemma3_text", **layers)

    def count(config: Any) -> None:
        del config["layer_types"]
        config |= {} if given is None else {"sliding_window_pattern": given}

    change(source / "config.json", count)
    pattern = described(source).values["gemma3.attention.sliding_window_pattern"]
    assert pattern == [(layer + 1) % full != 0 for layer in range(7)]
    types = AutoConfig.from_pretrained(source).layer_types
    assert pattern == [kind == "sliding_attention" for kind in types]


def test_layers_without_rotary_embedding_that_no_key_tells_are_refused(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}
    layers["layer_types"] = ["full_attention"] * 5
    source = gguf_models.save(tmp_path / "model", "smollm3", **layers)
    described(source)
    described(without_layers(source, tmp_path / "last", [[0], [1], [2], [3]]))
    with pytest.raises(FamilyError, match=r"no_rope_layers: llama.cpp computes"):
        described(without_layers(source, tmp_path / "first", [[1], [2], [3], [4]]))


def test_a_scale_that_follows_from_the_number_of_layers_is_refused(tmp_path: Path) -> None:
    source = gguf_models.save(tmp_path / "model", "gemma2")
    described(source)
    change(source / "config.json", put(query_pre_attn_scalar=16))
    with pytest.raises(FamilyError, match=r"query_pre_attn_scalar: .* expected 8, found 16"):
        described(source)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, key: str, changes: dict[str, Any]
) -> None:
    source = gguf_models.save(tmp_path / "model", key)
    change(source / "config.json", put(**changes))
    name = "rope_type" if "rope_parameters" in changes else next(iter(changes))
    with pytest.raises(FamilyError, match=rf"{name}: llama.cpp computes this type otherwise"):
        described(source)


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    given = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **changes}
    return {"rope_parameters": {key: value for key, value in given.items() if value != "none"}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FULL = {"rope_type": "default", "rope_theta": 1e6}

DAMAGES: list[tuple[str, str, dict[str, Any]]] = [
    *(("llama", "head_dim", {"head_dim": value}) for value in ("x", -8, 7.5)),
    *(
        ("llama", "max_position_embeddings", {"max_position_embeddings": value})
        for value in (2**40, -1, 1e300)
    ),
    *(("llama", "rms_norm_eps", {"rms_norm_eps": value}) for value in (1e300, "x", None, True)),
    *(("llama", "factor", rope("linear", factor=value)) for value in ("none", "x", 0, None)),
    ("llama", "rope_theta", rope("default", rope_theta=None)),
    ("llama", "full_attention", {"rope_parameters": {"full_attention": 3}}),
    ("llama", "partial_rotary_factor", {"partial_rotary_factor": "x"}),
    ("llama", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("phi3", "partial_rotary_factor", {"partial_rotary_factor": "x"}),
    ("llama", "rope_scaling", {"rope_scaling": [1]}),
    ("llama", "rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", "low_freq_factor", rope("llama3")),
    ("llama", "high_freq_factor", rope("llama3", **{**LLAMA3, "low_freq_factor": 4.0})),
    ("llama", "factor", rope("llama3", **LLAMA3, factor=0)),
    ("llama", "mscale", rope("yarn", mscale=1.0, mscale_all_dim=1.0)),
    ("llama", "original_max_position_embeddings", rope("longrope")),
    *(
        ("llama", "long_factor", rope("longrope", original_max_position_embeddings=64, **value))
        for value in ({}, {"long_factor": [1.0]}, {"long_factor": ["x"] * 4})
    ),
    *(("gemma2", key, {key: None}) for key in ("attn_logit_softcapping", "sliding_window")),
    *(("gemma2", "final_logit_softcapping", {"final_logit_softcapping": v}) for v in (None, 0)),
    *(
        (key, "sliding_window", {"sliding_window": value})
        for key in ("gemma2", "mistral")
        for value in ("x", -4, 10**12, True)
    ),
    ("gemma2", "layer_types", {"layer_types": ["full_attention", "chunked_attention", "x"]}),
    *(
        (
            "gemma3_text",
            "sliding_window_pattern",
            {"layer_types": None, "sliding_window_pattern": v},
        )
        for v in (0, "x")
    ),
    *(
        (
            "gemma3_text",
            r"sliding_attention\.rope_type",
            {"rope_parameters": {"full_attention": FULL, "sliding_attention": {key: "linear"}}},
        )
        for key in ("rope_type", "type")
    ),
    ("gemma3_text", r"rope_parameters\.full_attention", {"rope_parameters": FULL}),
]
"""Type, the key that the error names, what is changed in config.json."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {key: gguf_models.save(root / key, key) for key in {key for key, *_ in DAMAGES}}


@pytest.mark.parametrize(("key", "named", "changes"), DAMAGES)
def test_what_cannot_be_meant_is_refused_by_its_key(
    tmp_path: Path, sources: dict[str, Path], key: str, named: str, changes: dict[str, Any]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(sources[key], source)
    change(source / "config.json", put(**changes))
    with pytest.raises(surgery.SurgeryError, match=rf"config\.json: .*{named}: "):
        described(source)


def test_a_null_is_no_default(tmp_path: Path) -> None:
    source = gguf_models.save(tmp_path / "model", "gemma3_text")
    change(source / "config.json", put(final_logit_softcapping=None, rope_scaling=None))
    assert "gemma3.final_logit_softcapping" not in described(source).values


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    source = gguf_models.save(tmp_path / "model", "mistral", sliding_window=16)
    (note,) = described(source).notes
    assert note.startswith("llama.cpp has no windows for this type: after 16 tokens")


def test_a_range_of_yarn_that_llama_cpp_rounds_is_said(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "truncate": False}
    source = gguf_models.save(tmp_path / "model", "gpt_oss", rope_parameters=rope)
    made = described(source)
    assert made.notes[0].startswith("llama.cpp rounds YaRN's range")
    assert made.values["gpt-oss.rope.scaling.type"] == "yarn"
    assert made.values["gpt-oss.rope.scaling.factor"] == 4.0


def test_llama_3s_frequencies(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = gguf_models.save(tmp_path / "model", "llama", head_dim=64, rope_parameters=rope)
    factors = described(source).tensors[FREQUENCIES]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        AutoConfig.from_pretrained(source), torch.device("cpu")
    )
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)


def test_long_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "short_factor": [1.0, 1.0, 1.0, 1.5],
    }
    original = {"original_max_position_embeddings": 128}
    source = gguf_models.save(tmp_path / "model", "phi3", rope_parameters=rope, **original)
    made = described(source)
    assert made.tensors[LONG].tolist() == rope["long_factor"]
    assert made.tensors[SHORT].tolist() == rope["short_factor"]
    assert made.values["phi3.rope.scaling.original_context_length"] == 128
    assert made.values["phi3.rope.scaling.attn_factor"] == pytest.approx(
        (1 + np.log(512 / 128) / np.log(128)) ** 0.5
    )


# DistilBERT's epsilon is a number in its class.
@pytest.mark.parametrize("key", [key for key in ARCHITECTURES if key != "distilbert"])
def test_defaults_are_those_of_the_config_class(key: str) -> None:
    config = AutoConfig.for_model(key).to_dict()
    rope = config.get("rope_parameters", {})
    own = {**config, **rope.get("full_attention", rope)}
    if "sliding_attention" in rope:
        own["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    for name, value in ARCHITECTURES[key].defaults.items():
        assert own[name] == value, name
