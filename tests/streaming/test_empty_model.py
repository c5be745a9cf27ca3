"""The shapes of a whole model, built empty: a wrong config.json is a fault, no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from calib.streaming.empty_model import shape_faults
from tests.support import tiny, tiny_encoders
from tests.support.plans import layout_of


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and shapes of a mixture whose experts are merged as they are loaded."""
    path = tiny.save(tmp_path_factory.mktemp("model") / "mixtral", "mixtral")
    tensors = layout_of(path).checkpoint.tensors
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return json.loads((path / "config.json").read_text("utf-8")), shapes


def test_a_model_as_saved_has_no_faults(mixture: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert shape_faults(*mixture) == []


@pytest.mark.parametrize("value", ["none", [], 3])
def test_a_wrong_quantization_config_is_no_traceback(
    mixture: tuple[dict[str, Any], dict[str, Any]], value: object
) -> None:
    config, shapes = mixture
    assert shape_faults({**config, "quantization_config": value}, shapes) == []


def test_experts_that_cannot_be_merged_are_a_fault(
    mixture: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    config, shapes = mixture
    name = next(name for name in shapes if "experts.0.w1" in name)
    (fault,) = shape_faults(config, {**shapes, name: [7, 32]})
    assert fault.startswith("transformers builds no model: ")


@pytest.mark.parametrize("key", ["gemma3n", "fast_vlm"])
def test_of_a_vision_tower_that_cannot_be_built_the_text_is_checked(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without timm: no text passes the tower, and its tensors are copied."""
    save: Any = tiny_encoders.save if key in tiny_encoders.VOCABULARY_ALONE else tiny.save
    path = save(tmp_path / "model", key, **({"head": "image"} if key == "gemma3n" else {}))

    def needs_timm(*_: Any) -> None:
        raise ImportError("timm")

    monkeypatch.setattr(TimmWrapperModel, "__init__", needs_timm)
    tensors = layout_of(path).checkpoint.tensors
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    config = json.loads((path / "config.json").read_text("utf-8"))
    assert shape_faults(config, shapes) == []
    name = "model.language_model.embed_tokens.weight"
    (fault,) = shape_faults(config, shapes | {name: [7, shapes[name][1]]})
    assert fault.startswith("model.embed_tokens.weight is [7, ")
