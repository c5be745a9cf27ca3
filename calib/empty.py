"""The library's own model of a config, without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.errors import CheckpointError
from surgery.layout import Layout


def empty_model(layout: Layout, dtype: torch.dtype) -> Any:
    """Build the library's model of a checkpoint's config: real buffers, no weights.

    Raises:
        CheckpointError: config.json does not make a model, or not one with these tensors.
    """
    checkpoint = layout.checkpoint
    try:
        config = AutoConfig.for_model(**checkpoint.config)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
    except Exception as error:  # the library raises whatever a wrong value leads to
        raise CheckpointError(
            checkpoint.path / "config.json",
            "transformers cannot build a model of it",
            found=f"{type(error).__name__}: {error}",
            fix="check config.json",
        ) from error
    _check_shapes(model, layout)
    return model.eval().requires_grad_(False)


def _check_shapes(model: nn.Module, layout: Layout) -> None:
    """Refuse a checkpoint whose tensors are not those that config.json makes the library expect."""
    tensors = layout.checkpoint.tensors
    for name, parameter in model.state_dict().items():
        ref = tensors.get(name)
        if ref is None and layout.tied and name == layout.family.head:
            continue
        if ref is None or ref.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{ref.path if ref else layout.checkpoint.path}: tensor {name}",
                "is missing" if ref is None else "shape contradicts config.json",
                expected=list(parameter.shape),
                found=list(ref.shape) if ref else None,
                fix="check config.json",
            )


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
