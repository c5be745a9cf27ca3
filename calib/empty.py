"""The library's own model of a config, without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from calib.conversion import Conversion
from calib.experts import IMPLEMENTATION
from surgery.errors import CheckpointError, SurgeryError
from surgery.layout import Layout
from surgery.slots import BUFFER

MESSAGE = 300
"""Characters of the library's own words that an error quotes: it can list every model type."""

MOST_BUFFER_BYTES = 1 << 30
"""Of tables such as masks, which grow with the square of a config's number of positions."""

NOT_TAKEN = (
    "quantization_config",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Keys of config.json that build no model: quantized weights are read as the numbers they stand
for, and what names code, such as a kernel on the hub, is never run."""


def empty_model(layout: Layout, dtype: torch.dtype) -> tuple[Any, Conversion]:
    """Build the library's model of a checkpoint's text config: real buffers, no weights.

    Raises:
        CheckpointError: config.json does not make a model, or not one with these tensors.
    """
    with library_errors(layout):
        config = AutoConfig.for_model(**_text_config(layout))
        config._experts_implementation = IMPLEMENTATION
        with torch.device("meta"):
            sketch = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _check_shapes(sketch, Conversion(sketch), layout)
        _check_buffers(sketch, layout)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        conversion = Conversion(model)
    return model.eval().requires_grad_(False), conversion


def _text_config(layout: Layout) -> dict[str, Any]:
    """What config.json says of the language model, with a model type that has one alone."""
    family, text = layout.family, dict(layout.config)
    text["model_type"] = family.text_type or family.model_type or text.get("model_type")
    if family.section:
        text["tie_word_embeddings"] = layout.tied
    return {key: value for key, value in text.items() if key not in NOT_TAKEN}


def _check_shapes(model: nn.Module, conversion: Conversion, layout: Layout) -> None:
    """Refuse a checkpoint whose tensors are not those that config.json makes the library expect."""
    tensors = layout.by_name
    empty = {n: torch.empty(t.shape, device="meta") for n, t in tensors.items()}
    found = conversion.convert(empty)
    parameters = model.state_dict()
    for name, parameter in parameters.items():
        value = found.get(name)
        if value is None and layout.tied and name == layout.family.head:
            continue
        if value is None or value.shape != parameter.shape:
            ref = tensors.get(name)
            raise CheckpointError(
                f"{ref.path if ref else layout.checkpoint.path}: tensor {name}",
                "is missing" if value is None else "shape contradicts config.json",
                expected=list(parameter.shape),
                found=list(value.shape) if value is not None else None,
                fix="check config.json",
            )
    for name, ref in tensors.items():
        needed = layout.places[ref.name].slot.block != BUFFER
        if needed and conversion.target(name)[0] not in parameters:
            raise CheckpointError(
                f"{ref.path}: tensor {ref.name}",
                "is not in the model that transformers makes of config.json",
                fix="check config.json, such as its flags for biases",
            )


def _check_buffers(sketch: nn.Module, layout: Layout) -> None:
    nbytes = sum(buffer.nbytes for buffer in sketch.buffers())
    if nbytes > MOST_BUFFER_BYTES:
        raise CheckpointError(
            layout.checkpoint.path / "config.json",
            "asks for tables that do not fit in memory",
            expected=f"at most {MOST_BUFFER_BYTES:,} bytes",
            found=f"{nbytes:,}",
            fix="lower the number of positions",
        )


@contextmanager
def library_errors(layout: Layout) -> Iterator[None]:
    """Make one line of whatever a wrong value of config.json leads to in the library's code.

    Raises:
        CheckpointError: instead of any other error.
    """
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise CheckpointError(
            layout.checkpoint.path / "config.json",
            "transformers cannot build or run the model that it describes",
            found=f"{type(error).__name__}: {str(error)[:MESSAGE]}",
            fix="check config.json",
        ) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create modules with real buffers (rotary tables, scales) but parameters without storage."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
