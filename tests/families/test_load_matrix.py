"""Both majors of transformers load what is written of every family, and compute the same.

Needs COMPACT_SURGERY_TRANSFORMERS4, a Python that has transformers 4.57 and torch; `make test`
sets it. Everything is loaded there in one process.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING

from surgery.api import apply_plan
from tests.support import tiny
from tests.support.load_matrix import SENTENCE
from tests.support.loading import (
    NOT_IN_4,
    VARIABLE,
    Job,
    Loaded,
    load_here,
    load_with_transformers4,
)
from tests.support.plans import masked_dense, random_plan
from tests.support.published import as_published_before_5
from tests.support.sample import sampled
from tests.support.tiny_configs import TINY

CASES = sampled(TINY)

_ROPE = {"rope_theta": 500.0}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": _ROPE,
    "mistral": _ROPE,
    "qwen2": _ROPE,
    "qwen3": _ROPE,
    "gemma3_text": _ROPE | {"rope_local_base_freq": 200.0},
    # 4.57 has no windows by layer
    "qwen2_moe": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
}
"""What is unlike the config class's defaults, to which a reader could fall back."""

TOLERANCE = 1e-4
TOLERANCE_4 = {"apertus": 1e-2}
"""Where 4.57 computes in less than float32: Apertus's activation has its two parameters in bf16."""


def in_4(key: str) -> bool:
    """Whether 4.57 knows the model type of a tiny config."""
    return key.partition(":")[0] not in NOT_IN_4


@dataclass(frozen=True)
class Case:
    """A checkpoint, its output, and what that must compute."""

    source: Job
    output: Job
    expected: np.ndarray
    """Logits of the masked dense model for the output's ids."""


def build(key: str, path: Path) -> Case:
    """Prune a tiny checkpoint that looks as if it had been published for transformers 4."""
    source, output = path / "source", path / "output"
    tiny.save(source, key, tied=False, dtype=torch.bfloat16, **CHANGES.get(key, {}))
    if in_4(key):
        as_published_before_5(source)
    plan = random_plan(source, 512, 0.5)  # grouped_mm wants rows of 16 bytes
    apply_plan(plan, source=source, output=output)
    kept = plan.ids().kept
    new = np.random.default_rng(1).integers(0, len(kept), (2, 40))
    dense = load_here(job(masked_dense(source, plan, path / "masked"), key, kept[new]))
    assert dense.logits is not None, dense.error
    return Case(job(source, key, kept[new]), job(output, key, new), dense.logits[..., kept])


def job(path: Path, key: str, ids: np.ndarray) -> Job:
    """Load ``path`` and run ``ids``."""
    return Job(str(path), ids.tolist(), tiny.auto_class(key).__name__)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case | Exception]:
    """By key of CASES: what was built, or why it was not."""
    built: dict[str, Case | Exception] = {}
    for key in CASES:
        try:
            built[key] = build(key, tmp_path_factory.mktemp("case"))
        except Exception as error:
            built[key] = error
    return built


@pytest.fixture
def case(cases: dict[str, Case | Exception], key: str) -> Case:
    """What was built of a family; where that failed, so do the family's tests, and no others."""
    built = cases[key]
    if isinstance(built, Exception):
        raise built
    return built


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A checkpoint in which one tensor has another's name."""
    path = as_published_before_5(tiny.save(tmp_path_factory.mktemp("damaged")))
    tensors = load_file(path / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return Job(str(path), [[0]])


@pytest.fixture(scope="module")
def loaded_by_4(
    cases: dict[str, Case | Exception], damaged: Job, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded]:
    """By directory: sources and outputs of all families that 4.57 has, configs of the others."""
    path = tmp_path_factory.mktemp("transformers4")
    jobs = [damaged]
    for model_type in NOT_IN_4:
        (path / model_type).mkdir()
        (path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
        jobs.append(Job(str(path / model_type), [[0]]))
    for key, built in cases.items():
        if isinstance(built, Case) and in_4(key):
            jobs += [built.source, built.output]
    loaded = load_with_transformers4(jobs, path)
    return {job.directory: found for job, found in zip(jobs, loaded, strict=True)}


def warnings_of(loaded: Loaded, job: Job) -> set[str]:
    return {text.replace(job.directory, "") for text in loaded.warnings}


def assert_loads(case: Case, source: Loaded, output: Loaded, tolerance: float) -> None:
    for loaded in (source, output):
        assert loaded.error is None
        assert loaded.faults == {}
    assert warnings_of(output, case.output) <= warnings_of(source, case.source)
    tokenizer = Tokenizer.from_file(str(Path(case.output.directory) / "tokenizer.json"))
    assert output.tokens == tokenizer.get_vocab_size()
    assert output.encoded == tokenizer.encode(SENTENCE).ids
    assert output.decoded == source.decoded == SENTENCE
    assert output.logits is not None
    assert output.logits.shape == case.expected.shape
    largest = abs(case.expected).max()
    assert abs(output.logits - case.expected).max() / largest <= tolerance
    assert case.expected.std() > 0.05  # logits that could not differ would prove nothing


@pytest.mark.parametrize("key", CASES)
def test_transformers_5(case: Case) -> None:
    source, output = load_here(case.source), load_here(case.output)
    assert output.version.startswith("5.")
    assert_loads(case, source, output, TOLERANCE)


@pytest.mark.parametrize("key", [key for key in CASES if in_4(key)])
def test_transformers_4(case: Case, loaded_by_4: dict[str, Loaded], key: str) -> None:
    source, output = (loaded_by_4[job.directory] for job in (case.source, case.output))
    assert output.version.startswith("4.57.")
    assert_loads(case, source, output, TOLERANCE_4.get(key, TOLERANCE))


@pytest.mark.parametrize("model_type", NOT_IN_4)
def test_not_in_transformers_4(loaded_by_4: dict[str, Loaded], model_type: str) -> None:
    """And so an error, which is a fact of its own job: others are loaded in the same process."""
    (loaded,) = (
        found for directory, found in loaded_by_4.items() if Path(directory).name == model_type
    )
    assert loaded.error is not None
    assert f"model type `{model_type}` but Transformers does not recognize" in loaded.error
    assert loaded.logits is None
    assert model_type in CONFIG_MAPPING


def assert_damage_is_reported(loaded: Loaded) -> None:
    assert loaded.error is None
    assert loaded.faults == {
        "missing_keys": ["model.norm.weight"],
        "unexpected_keys": ["model.other.weight"],
    }
    assert any("model.norm.weight" in text for text in loaded.warnings)


def test_damage_is_reported_by_transformers_5(damaged: Job) -> None:
    assert_damage_is_reported(load_here(damaged))


def test_damage_is_reported_by_transformers_4(damaged: Job, loaded_by_4: dict[str, Loaded]) -> None:
    assert_damage_is_reported(loaded_by_4[damaged.directory])


def test_no_transformers_4_is_a_reason_to_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="names no Python with transformers"):
        load_with_transformers4([], tmp_path)
