"""The streamed decoder: the library's own model, its layers' weights present one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from calib.empty import empty_model
from calib.ffn import watched_ffn
from calib.memory import release_freed_memory, reuse_freed_memory
from calib.weights import WeightReader
from surgery.errors import DataError
from surgery.layout import Layout

MICRO_BATCH_VALUES = 1 << 21
"""Values of one FFN activation at a time, tokens × I: 8 MiB in fp32 (one window at least)."""

HEAD_ROWS = 8192
"""Rows of lm_head in memory at a time."""

Watch = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Called with layer, token ids ``(windows, tokens)`` and their input of down_proj ``(windows,
tokens, I)``; what it returns, if anything, goes into down_proj instead."""


@dataclass
class Batch:
    """Windows of one length and their hidden states, which every layer overwrites."""

    ids: torch.Tensor
    """int64 ``(windows, tokens)``."""
    hidden: torch.Tensor
    """``(windows, tokens, D)`` on the CPU."""
    arguments: list[Mapping[str, Any]]
    """Per layer, what the model passes beside the hidden states: masks, rotary tables."""


@dataclass(frozen=True)
class MicroBatch:
    """Some windows of a batch, by view."""

    batch: Batch
    windows: slice

    @property
    def ids(self) -> torch.Tensor:
        """int64 ``(windows, tokens)``."""
        return self.batch.ids[self.windows]

    @property
    def hidden(self) -> torch.Tensor:
        """``(windows, tokens, D)``, writable."""
        return self.batch.hidden[self.windows]


class StreamedDecoder:
    """A causal LM whose decoder layers are read, used for all text, and dropped in turn."""

    def __init__(self, layout: Layout, reader: WeightReader) -> None:
        """Build the model from config.json without weights; nothing of it is random."""
        self.layout = layout
        self.reader = reader
        self._model = empty_model(layout, reader.dtype)
        self._layers = self._model.model.layers
        self._model.model.layers = nn.ModuleList(map(_Recorder, self._layers))
        self._model.model.norm.load_state_dict(
            {"weight": reader.place(reader.read(layout.family.final_norm))}, assign=True
        )
        for module in self._model.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(reader.device))
        reuse_freed_memory()
        release_freed_memory()  # of planning, tokenizing and building, before the weights come

    @torch.no_grad()
    def embed(self, windows: Sequence[np.ndarray]) -> list[Batch]:
        """Group ``windows`` by length, in order, and look their tokens up.

        Only the rows of tokens that occur are read.

        Raises:
            DataError: no token at all, or one without a row in the embedding.
        """
        used = np.unique(np.concatenate(windows)) if windows else np.zeros(0, dtype=np.int64)
        if not len(used) or used[-1] >= self.layout.vocab_size:
            raise DataError(
                "--data",
                "has no token, or one without a row in the embedding",
                expected=f"ids below {self.layout.vocab_size}",
                found=used[-1] if len(used) else "none",
                fix="give other text",
            )
        embedding = self._model.model.embed_tokens
        rows = self.reader.rows(self.layout.family.embedding, used)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None
        batches = []
        for length in dict.fromkeys(map(len, windows)):
            ids = torch.from_numpy(np.stack([w for w in windows if len(w) == length]))
            hidden = torch.empty((*ids.shape, rows.shape[1]), dtype=self.reader.dtype)
            batch = Batch(ids, hidden, self._arguments(length, rows.shape[1]))
            for part in micro_batches([batch], self.layout.intermediate_size):
                places = torch.from_numpy(np.searchsorted(used, part.ids.numpy()))
                part.hidden.copy_(embedding(places.to(self.reader.device)))
            batches.append(batch)
        embedding.to("meta")
        return batches

    @torch.no_grad()
    def run_layers(
        self,
        batches: Sequence[Batch],
        watch: Watch,
        *,
        stop_early: bool = False,
        progress: Callable[[int], object] = lambda windows: None,
    ) -> None:
        """Carry all batches through every layer; the next layer is read meanwhile.

        It waits in the file's dtype: one layer and a half in memory where bf16 computes in fp32.

        Args:
            batches: From ``embed``; their hidden states are overwritten.
            watch: Sees, and may change, the input of each down_proj.
            stop_early: Leave out what follows the last layer's down_proj input.
            progress: Called with the windows that have passed a layer.
        """
        last = len(self._layers) - 1
        parts = list(micro_batches(batches, self.layout.intermediate_size))
        with ThreadPoolExecutor(1) as background:
            following = background.submit(self._read_layer, 0)
            for index, layer in enumerate(self._layers):
                self._load(layer, following.result())
                if index < last:
                    following = background.submit(self._read_layer, index + 1)
                for part in parts:
                    self._run(index, layer, part, watch, stop_early and index == last)
                    progress(len(part.ids))
                layer.to("meta")

    @torch.no_grad()
    def logits(
        self, hidden: Sequence[torch.Tensor], rows: np.ndarray
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (tensor, first row, logits) of lm_head, block by block of ``rows``.

        Each block of the head is read once and used for all ``hidden`` states
        ``(windows, tokens, D)`` as they left the last layer; logits are ``(windows, tokens,
        block)`` as the library computes them, caps included.
        """
        head = self.layout.family.head
        name = self.layout.family.embedding if self.layout.tied else head
        decoder = _Finished(self._model.model.norm)
        self._model.model, kept = decoder, self._model.model
        try:
            for start in range(0, len(rows), HEAD_ROWS):
                weight = self.reader.rows(name, rows[start : start + HEAD_ROWS])
                self._model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
                for place, states in enumerate(hidden):
                    decoder.hidden = states.to(self.reader.device)
                    yield place, start, self._model(inputs_embeds=decoder.hidden).logits
        finally:
            self._model.model = kept
            self._model.lm_head.to("meta")

    def _arguments(self, length: int, hidden_size: int) -> list[Mapping[str, Any]]:
        """Run the model over recorders to learn what it passes to layers for this length."""
        probe = torch.zeros(
            (1, length, hidden_size), device=self.reader.device, dtype=self.reader.dtype
        )
        self._model.model(inputs_embeds=probe, use_cache=False)
        return [recorder.arguments for recorder in self._model.model.layers]

    def _read_layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"{self.layout.family.layers}.{index}."
        keys = self._layers[index].state_dict()
        return {key: self.reader.read(prefix + key) for key in keys}

    def _load(self, layer: nn.Module, stored: dict[str, torch.Tensor]) -> None:
        """Give ``layer`` its weights; each leaves ``stored`` as soon as it is placed."""
        weights = {key: self.reader.place(stored.pop(key)) for key in list(stored)}
        layer.load_state_dict(weights, assign=True)

    def _run(
        self, index: int, layer: nn.Module, part: MicroBatch, watch: Watch, stop: bool
    ) -> None:
        def see(tokens: slice, act: torch.Tensor) -> torch.Tensor | None:
            changed = watch(index, part.ids[:, tokens], act)
            if stop and tokens.stop == part.ids.shape[1]:
                raise _Stop
            return changed

        ffn, down_proj = self._ffn(index, layer)
        with suppress(_Stop), watched_ffn(ffn, down_proj, self.layout.intermediate_size, see):
            hidden = part.hidden.to(self.reader.device)
            part.hidden.copy_(layer(hidden, **part.batch.arguments[index]))

    def _ffn(self, index: int, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The FFN of ``layer`` and the down_proj in it."""
        name = self.layout.family.ffn_output.format(layer=index)
        prefix = f"{self.layout.family.layers}.{index}."
        path = name.removeprefix(prefix).removesuffix(".weight")
        return layer.get_submodule(path.rpartition(".")[0]), layer.get_submodule(path)


def micro_batches(batches: Sequence[Batch], channels: int) -> Iterator[MicroBatch]:
    """Take windows together until an FFN activation has ``MICRO_BATCH_VALUES``; one at least."""
    for batch in batches:
        windows, tokens = batch.ids.shape
        step = max(1, MICRO_BATCH_VALUES // (tokens * channels))
        for start in range(0, windows, step):
            yield MicroBatch(batch, slice(start, min(start + step, windows)))


class _Stop(Exception):
    """Ends the last layer's forward once its statistic is taken."""


class _Recorder(nn.Module):
    """Stands in for a layer and keeps what the model passes to it; else it is that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: the recorder has no weights

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for things such as attention_type.
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class _Finished(nn.Module):
    """Stands in for the decoder when its hidden states are known: only the final norm is left."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.hidden = torch.empty(0)

    def forward(self, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.hidden))
