"""The embedding tables and the head of the library's model; only rows that are needed are read."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.streaming.empty_model import Conversion
from calib.streaming.layers import check_finite
from calib.streaming.stacks import Stack
from calib.streaming.weights import WeightReader
from surgery.families.schema import ENCODER_DECODER, VOCAB, Dim
from surgery.layout.layout import Layout

HEAD_ROWS = 8192
"""Rows of lm_head in memory at a time."""


class Tables:
    """The tensors with a row for each token. Between two uses they have no weights."""

    def __init__(
        self,
        layout: Layout,
        reader: WeightReader,
        model: Any,
        conversion: Conversion,
        stacks: Sequence[Stack],
    ) -> None:
        """Find the tables of ``model``; an encoder and a decoder in ``stacks`` have one each."""
        self._layout, self._reader, self._model = layout, reader, model
        self._block: dict[str, torch.Tensor] = {}
        """Rows of the head's parameters, by their names in the module."""
        self._modules: dict[str, list[nn.Embedding]] = {}
        """Names of the tensors → their modules. Files may have one for encoder and decoder."""
        found: dict[str, list[nn.Embedding]] = {}
        for name, ref in layout.by_name.items():
            role = layout.roles[ref.name]
            table = role.slot.dims == (Dim(VOCAB), None) and role.layer is None
            if table and name != layout.family.head:
                path = conversion.target(name)[0].removesuffix(".weight")
                found[name] = [model.get_submodule(path)]
        if layout.family.kind != ENCODER_DECODER:
            self._modules = found
            return
        for stack in stacks:
            table = stack.parent.get_input_embeddings()
            own = next((n for n, t in found.items() if t[0] is table), layout.family.embedding)
            self._modules.setdefault(own, []).append(table)

    def names(self) -> list[str]:
        """Return the file's names of the tables, in reading order."""
        return [self._layout.by_name[name].name for name in self._modules]

    @property
    def by_ids(self) -> bool:
        """Whether layers take arguments that depend on the tokens: there are more tables."""
        roles = self._layout.roles.values()
        in_layers = any(role.layer is not None and Dim(VOCAB) in role.slot.dims for role in roles)
        more = len(self._modules) > 1 or in_layers
        return self._layout.family.kind != ENCODER_DECODER and more

    def load(self, used: np.ndarray) -> None:
        """Read the rows ``used``, ascending ids.

        Raises:
            CheckpointError: one has NaN or infinity.
        """
        for name, modules in self._modules.items():
            ref = self._layout.by_name[name]
            rows = self._reader.rows(ref.name, used)
            check_finite(ref, rows)
            for module in modules:
                module.weight = nn.Parameter(rows, requires_grad=False)
                module.padding_idx = None

    def free(self) -> None:
        """Take the rows out of memory."""
        for module in self._every():
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the only table makes of ``rows`` of those that are loaded."""
        (table,) = self._every()
        states: torch.Tensor = table(rows)
        return states

    def head_blocks(self, every: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the ascending ids ``every`` by blocks, whose rows ``show_head`` gives to the head.

        Each table has one row, of zeros, so that the library's model runs.

        Raises:
            CheckpointError: a row has NaN or infinity.
        """
        layout, family = self._layout, self._layout.family
        ref = layout.by_name[family.embedding if layout.tied else family.head]
        bias = layout.by_name.get(family.head.removesuffix("weight") + "bias")
        head = self._model.get_output_embeddings()
        self._reader.expect([ref.name] * -(-len(every) // HEAD_ROWS))
        for module in self._every():
            row = torch.zeros(1, module.embedding_dim, dtype=self._reader.dtype)
            module.weight = nn.Parameter(self._reader.to_device(row), requires_grad=False)
        try:
            for start in range(0, len(every), HEAD_ROWS):
                block = every[start : start + HEAD_ROWS]
                self._block = {"weight": self._reader.rows(ref.name, block)}
                check_finite(ref, self._block["weight"])
                if bias is not None:
                    self._block["bias"] = self._reader.rows(bias.name, block)
                yield block
        finally:
            self._block = {}
            head.to("meta")
            self.free()

    def show_head(self, places: np.ndarray) -> None:
        """Give the head the rows at ``places``, ascending, of the block that was yielded last."""
        head = self._model.get_output_embeddings()
        for name, rows in self._block.items():
            whole = len(places) == len(rows)
            shown = rows if whole else rows[torch.from_numpy(places).to(rows.device)]
            setattr(head, name, nn.Parameter(shown, requires_grad=False))

    def _every(self) -> list[nn.Embedding]:
        return [module for modules in self._modules.values() for module in modules]
