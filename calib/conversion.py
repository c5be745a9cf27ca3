"""Checkpoint tensors → the library's parameters, by the library's own conversion mapping."""

from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class Conversion:
    """What transformers does to names and layouts while it loads: experts become one tensor."""

    def __init__(self, model: Any) -> None:
        """Learn the mapping of ``model``, the library's model of the text config."""
        self._model = model
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that tensor ``name`` goes into, and the converter's pattern."""
        prefix = self._model.base_model_prefix
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and name in self._state:
            return name, None
        return found

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameter → value for ``tensors``; what the model has no place for is left out.

        ``tensors`` is emptied, so that what has been merged need not stay in memory. They may be
        on the meta device, so that shapes can be checked from headers alone.
        """
        result: dict[str, torch.Tensor] = {}
        gathered: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            tensor = tensors.pop(name)
            target, pattern = self.target(name)
            if target not in self._state:
                continue
            if pattern is None:
                result[target] = tensor
                continue
            if target not in gathered:
                gathered[target] = deepcopy(self._by_pattern[pattern])
            gathered[target].add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        while gathered:
            target, converter = gathered.popitem()
            made = converter.convert(target, model=self._model, config=self._model.config)
            result |= {k: v[0] if isinstance(v, list) else v for k, v in made.items()}
        return result
