"""The streamed decoder: the library's own model with the weights of one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.streaming.batches import (
    NO_HOOKS,
    Batch,
    LayerHooks,
    MicroBatch,
    Stream,
    Tokens,
    micro_batches,
    tokens_of,
)
from calib.streaming.empty_model import empty_model, layers_path, library_errors
from calib.streaming.ffn import FfnCall, FfnModule, ffn_above, hooked_ffn, no_hook, seen_ffn
from calib.streaming.layers import Layers, broken_tensor, move_buffers, not_finite
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.stand_ins import (
    ArgumentCapture,
    Arguments,
    CaptureDone,
    ReplayHidden,
    swapped,
    takes_passed,
    with_passed,
)
from calib.streaming.weights import WeightReader
from surgery.errors import CheckpointError
from surgery.families.blocks import OUTSIDE
from surgery.families.schema import DECODER, VOCAB, Dim
from surgery.files.safetensors_header import TensorRef
from surgery.layout.layout import Layout
from surgery.process import Advance, no_advance, release_freed_memory

HEAD_ROWS = 8192
"""Rows of lm_head in memory at a time."""

NO_WEIGHTS: Mapping[str, torch.Tensor] = {}


@dataclass(frozen=True)
class Peeked:
    """What a layer with one dense FFN computes for some tokens."""

    rows: slice
    """Their rows of the hidden states."""
    act: torch.Tensor
    """``(tokens, I)``: the input of down_proj."""
    after: torch.Tensor
    """``(tokens, D)``: the layer's output."""
    ffn: FfnCall | None
    """None where the FFN is no module of its own that takes nothing but hidden states."""


class StreamedDecoder:
    """A causal LM, or an encoder, that reads each layer, runs all text through it, and frees it."""

    def __init__(
        self,
        layout: Layout,
        reader: WeightReader,
        settings: PassSettings | None = None,
        timings: Timings | None = None,
    ) -> None:
        """Build the model from config.json, without weights and without random numbers."""
        self.layout = layout
        self.reader = reader
        self.settings = settings or PassSettings(reader.device, reader.dtype)
        self.timings = timings or Timings()
        self._model, self._conversion = empty_model(layout, reader.dtype)
        parent, _, self._list_name = layers_path(layout, self._conversion).rpartition(".")
        self._parent = self._model.get_submodule(parent)
        modules = list(getattr(self._parent, self._list_name))
        self._layers = Layers(
            layout, reader, self._conversion, modules, self.settings, self.timings
        )
        self._captures = [ArgumentCapture(layer) for layer in modules]
        self._captures[-1].last = True
        self._channels = max([1, *map(layout.channels_of, layout.family.widths)])
        self._returns_tuple = False
        self._options = {"use_cache": False} if layout.family.kind == DECODER else {}
        self._streams: tuple[int, ...] = (-1,)
        self._set_layers(self._captures)
        reader.expect(self._reading_order())
        self._load_outer()
        release_freed_memory()  # that of planning, tokenizing and building, before weights are read

    @torch.no_grad()
    def embed(self, streams: Sequence[Stream], passed: int = 0) -> None:
        """Group each stream's windows by length, in order, and run them up to the first layer.

        Only the rows of tokens that occur are read, once for all streams.

        Args:
            streams: Texts; each must have a token.
            passed: Layers that an earlier run has finished. The hidden states that it saved after
                them are restored.

        Raises:
            CheckpointError: a row of the embedding has NaN or infinity.
            DataError: there is no token, or one without a row in the embedding.
        """
        used = tokens_of(streams, self.layout.vocab_size)
        for name, table in self._tables.items():
            ref = self.layout.by_name[name]
            rows = self.reader.rows(ref.name, used)
            self._check(ref, rows)
            table.weight = nn.Parameter(rows, requires_grad=False)
            table.padding_idx = None
        for stream in streams:
            stream.batches = []
            for length in dict.fromkeys(map(len, stream.windows)):
                ids = torch.from_numpy(np.stack([w for w in stream.windows if len(w) == length]))
                first = sum(each.ids.numel() for each in stream.batches)
                stream.batches.append(Batch(ids, stream.states, first))
                self._embed(stream, used, passed)
            if passed:
                stream.states.restore(passed)
        self._free_tables()

    def _embed(self, stream: Stream, used: np.ndarray, passed: int) -> None:
        """Fill the last batch's hidden states and capture the arguments of the layers."""
        batch, states = stream.batches[-1], stream.states
        for part in self._micro_batches([batch]):
            rows = torch.from_numpy(np.searchsorted(used, part.ids.numpy()))
            hidden, arguments = self._capture_arguments(rows.to(self.reader.device))
            if not len(states.before):
                states.allocate(stream.tokens, hidden.shape[-1], hidden.dtype)
            if passed and takes_passed(arguments[passed]):
                raise CheckpointError(
                    self.layout.checkpoint.path,
                    "its layers pass on more than hidden states, which no interrupted run keeps",
                    fix="start again without `resume`",
                )
            batch.arguments.setdefault(self._key(part), arguments)
            if not passed:
                states.before[part.rows].view(hidden.shape).copy_(hidden)
                states.give_back(part.rows)

    def run_layers(
        self,
        streams: Sequence[Stream],
        hooks: LayerHooks = NO_HOOKS,
        *,
        progress: Advance = no_advance,
        finished: Callable[[int], object] = lambda layer: None,
    ) -> None:
        """Run all streams through the layers that they have not passed.

        Args:
            streams: From ``embed``; their hidden states are overwritten.
            hooks: Run in each layer.
            progress: Called with the windows that have passed a layer.
            finished: Called with each layer once all windows have passed it.
        """
        for index in self.layers(streams[0].states.passed):
            for stream in streams:
                self.run(index, stream, hooks, progress=progress)
            finished(index)

    def layers(self, first: int = 0) -> Iterator[int]:
        """Yield the index of each layer from ``first`` on while its weights are in memory.

        Meanwhile the next layer is read, and on the CPU converted to the compute dtype. So two
        layers are in memory. Experts keep the file's dtype until they are merged.
        """
        yield from self._layers.loaded(first)

    @torch.no_grad()
    def run(
        self,
        index: int,
        stream: Stream,
        hooks: LayerHooks = NO_HOOKS,
        *,
        weights: Mapping[str, torch.Tensor] = NO_WEIGHTS,
        layer: nn.Module | None = None,
        progress: Advance = no_advance,
    ) -> None:
        """Run ``stream`` through the layer ``index``, which ``layers`` has just yielded.

        Args:
            index: Index of the layer.
            stream: Its hidden states are overwritten.
            hooks: Run in the layer.
            weights: Parameters that replace the layer's own for this stream.
            layer: Replaces the layer, for example a copy with other weights.
            progress: Called with the windows that have passed.

        Raises:
            CheckpointError: the layer gives NaN or infinity.
        """
        layer, ffn_modules = layer or self.layer(index), self.ffn_modules(index)
        finite = []
        with self.timings.timed("compute"), swapped(layer, weights):
            for part in self._micro_batches(stream.batches):
                outputs = partial(hooks.routed, index) if hooks.routed is not None else None
                channels = partial(hooks.channels, index)
                hooked = hooked_ffn(layer, ffn_modules, part.ids, channels, outputs)
                hidden, after = self._run(index, layer, part, hooked)
                hooks.states(index, hidden, after)
                finite.append(after.isfinite().all())
                part.write(after)
                stream.states.give_back(part.rows)
                progress(len(part.ids))
            if not bool(torch.stack(finite).all()):
                raise not_finite(self.layout, index, layer, self.reader.dtype)
        with self.timings.timed("write"):
            stream.states.advance()

    @torch.no_grad()
    def peek(
        self, index: int, stream: Stream, weights: Mapping[str, torch.Tensor] = NO_WEIGHTS
    ) -> Iterator[Peeked]:
        """Run a layer with one dense FFN on ``stream`` and leave its hidden states as they are.

        Yields what each micro-batch shows. Its rows of ``stream.states`` may then be overwritten.
        """
        layer, ffn_modules = self.layer(index), self.ffn_modules(index)
        for part in self._micro_batches(stream.batches):
            pieces: list[torch.Tensor] = []

            def collect(axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
                pieces.append(act.view(tokens.count, -1, act.shape[-1]))  # noqa: B023

            with (
                self.timings.timed("compute"),
                swapped(layer, weights),
                seen_ffn(layer, ffn_modules[0]) as calls,
            ):
                hooked = hooked_ffn(layer, ffn_modules, part.ids, collect)
                _, after = self._run(index, layer, part, hooked)
            ffn = calls[0] if len(calls) == 1 else None
            yield Peeked(
                part.rows, torch.cat(pieces, dim=1).flatten(0, 1), after.flatten(0, 1), ffn
            )
            stream.states.give_back(part.rows)

    @torch.no_grad()
    def run_ffn(self, index: int, stream: Stream, weights: Mapping[str, torch.Tensor]) -> None:
        """Finish a layer whose attention has run: only its FFN, the layer's one, is left to run.

        Args:
            index: Index of the layer.
            stream: Its states hold the FFN's input in ``before``, and in ``after`` what the FFN's
                output is added to.
            weights: Parameters that replace the layer's own.

        Raises:
            CheckpointError: the layer gives NaN or infinity.
        """
        layer, ffn_modules, finite = self.layer(index), self.ffn_modules(index), []
        with self.timings.timed("compute"), swapped(layer, weights):
            for part in self._micro_batches(stream.batches):
                hidden = part.read().to(self.reader.device)
                with hooked_ffn(layer, ffn_modules, part.ids, no_hook):
                    added = ffn_above(layer, ffn_modules[0])(hidden)
                finite.append(added.isfinite().all())
                stream.states.after[part.rows] += added.flatten(0, 1).to(stream.states.after.device)
                stream.states.give_back(part.rows)
            if not bool(torch.stack(finite).all()):
                raise not_finite(self.layout, index, layer, self.reader.dtype)
        with self.timings.timed("write"):
            stream.states.advance()

    def layer(self, index: int) -> nn.Module:
        """Return the library's layer; it has weights only while ``layers`` yields its index."""
        return self._layers.modules[index]

    def ffn_modules(self, index: int) -> list[FfnModule]:
        """Return the modules of a layer that have channels."""
        return self._layers.ffn_modules(index)

    def channel_dims(self, index: int, axis: str) -> dict[str, int]:
        """Return the parameters of a layer that carry a channel axis, each with its dimension."""
        return self._layers.channel_dims(index, axis)

    def routers(self, index: int) -> dict[str, int]:
        """Return the tensors of a layer's router, each with its dimension that counts experts."""
        return self._layers.routers(index)

    def dtypes(self, index: int) -> dict[str, str]:
        """Return the parameters that a collapse adds up, each with the file's safetensors dtype."""
        return self._layers.dtypes(index)

    def _micro_batches(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        return micro_batches(batches, self._channels, self.settings.micro_batch_values)

    @torch.no_grad()
    def logits(
        self, hidden: Sequence[tuple[torch.Tensor, np.ndarray]]
    ) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yield the logits of lm_head, a block of its rows at a time.

        Each row of the head is read once, however many entries of ``hidden`` need it.

        Args:
            hidden: States ``(windows, tokens, D)`` after the last layer, each with the ascending
                rows of its vocabulary.

        Yields:
            Index in ``hidden``, slice of its rows, and their logits ``(windows, tokens, rows of
            the slice)``. The library computes them, soft caps included.
        """
        family = self.layout.family
        name = self._tensor(family.embedding if self.layout.tied else family.head)
        bias = self.layout.by_name.get(family.head.removesuffix("weight") + "bias")
        head = self._model.get_output_embeddings()
        replay = ReplayHidden(self.layer(0), self._returns_tuple)
        every = np.unique(np.concatenate([rows for _, rows in hidden]))
        self.reader.expect([name] * -(-len(every) // HEAD_ROWS))
        self._set_layers([replay])
        for table in self._tables.values():
            row = torch.zeros(1, table.embedding_dim, dtype=self.reader.dtype)
            table.weight = nn.Parameter(self.reader.to_device(row), requires_grad=False)
        try:
            for start in range(0, len(every), HEAD_ROWS):
                block = every[start : start + HEAD_ROWS]
                weight = self.reader.rows(name, block)
                self._check(self.layout.checkpoint.tensors[name], weight)
                head.weight = nn.Parameter(weight, requires_grad=False)
                if bias is not None:
                    head.bias = nn.Parameter(
                        self.reader.rows(bias.name, block), requires_grad=False
                    )
                for index, (states, rows) in enumerate(hidden):
                    first, stop = np.searchsorted(rows, (block[0], block[-1] + 1)).tolist()
                    if first == stop:
                        continue
                    replay.hidden = states.to(self.reader.device).unflatten(-1, self._streams)
                    begin = torch.zeros(states.shape[:2], dtype=torch.int64)
                    with library_errors(self.layout):
                        logits = self._forward(begin.to(self.reader.device)).logits
                    if stop - first < len(block):
                        wanted = torch.from_numpy(np.searchsorted(block, rows[first:stop]))
                        logits = logits[..., wanted.to(logits.device)]
                    yield index, slice(first, stop), logits
        finally:
            self._set_layers(self._captures)
            head.to("meta")
            self._free_tables()

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model without its head makes of the states after the last layer.

        Both are ``(windows, tokens, D)``; a final norm makes the difference.
        """
        width = self.layout.by_name[self.layout.family.embedding].shape[1]
        replay = ReplayHidden(self.layer(0), self._returns_tuple)
        replay.hidden = hidden.to(self.reader.device).unflatten(-1, self._streams)
        self._set_layers([replay])
        try:
            begin = replay.hidden.new_zeros((*hidden.shape[:2], width))
            with library_errors(self.layout):
                made = self._model.base_model(inputs_embeds=begin, **self._options)
        finally:
            self._set_layers(self._captures)
        last: torch.Tensor = made.last_hidden_state
        return last

    def _tensor(self, name: str) -> str:
        """Return the name that a tensor of the text model has in the file."""
        return self.layout.by_name[name].name

    def _check(self, ref: TensorRef, rows: torch.Tensor) -> None:
        """Refuse NaN and infinity in rows of a tensor outside of the layers."""
        if not all(bool(part.isfinite().all()) for part in rows.split(HEAD_ROWS)):
            raise broken_tensor(f"{ref.path}: tensor {ref.name}", rows.dtype)

    def _set_layers(self, layers: Sequence[nn.Module]) -> None:
        setattr(self._parent, self._list_name, nn.ModuleList(layers))

    def _reading_order(self) -> list[str]:
        """Return the file's names of all tensors up to the last layer, in reading order."""
        outer = [ref.name for ref in self._outer_tensors().values()]
        tables = map(self._tensor, self._tables)
        return [*outer, *tables, *self._layers.names()]

    def _outer_tensors(self) -> dict[str, TensorRef]:
        """Return the tensors before and after the layers, without embeddings and head."""
        layout, family = self.layout, self.layout.family
        apart = (*self._tables, family.head, family.head.removesuffix("weight") + "bias")
        outside = {n: r for n, r in layout.by_name.items() if layout.roles[r.name].layer is None}
        return {
            name: ref
            for name, ref in outside.items()
            if name not in apart and layout.roles[ref.name].slot.block not in OUTSIDE
        }

    def _load_outer(self) -> None:
        outer = self._outer_tensors()
        names = {name: self.reader.read(ref.name) for name, ref in outer.items()}
        for name, value in names.items():
            self._check(outer[name], value)
        weights = {k: self.reader.to_device(v) for k, v in self._conversion.convert(names).items()}
        self._model.load_state_dict(weights, strict=False, assign=True)
        move_buffers(self._model, self.reader.device)

    @cached_property
    def _tables(self) -> dict[str, nn.Embedding]:
        """Names of the tensors with a row for each token → their modules; the head is none."""
        layout, family = self.layout, self.layout.family
        found = {}
        for name, ref in layout.by_name.items():
            role = layout.roles[ref.name]
            if role.slot.dims == (Dim(VOCAB), None) and name != family.head:
                path = self._conversion.target(name)[0].removesuffix(".weight")
                found[name] = self._model.get_submodule(path)
        return found

    def _free_tables(self) -> None:
        for table in self._tables.values():
            table.weight = nn.Parameter(table.weight.to("meta"), requires_grad=False)

    def _key(self, part: MicroBatch) -> int:
        """Key of a micro-batch's arguments: they depend on its tokens if there are more tables."""
        return part.windows.start if len(self._tables) > 1 else len(part.ids)

    def _forward(self, rows: torch.Tensor) -> Any:
        """Run the library's model on ``rows`` of its tables, int64 ``(windows, tokens)``."""
        if len(self._tables) > 1:
            return self._model(input_ids=rows, **self._options)
        (embedding,) = self._tables.values()
        return self._model(inputs_embeds=embedding(rows), **self._options)

    def _capture_arguments(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model up to its layers; return the hidden states and each layer's arguments."""
        with library_errors(self.layout), suppress(CaptureDone):
            self._forward(rows)
        first = self._captures[0]
        self._streams = tuple(first.hidden.shape[2:])
        return first.hidden.flatten(2), [capture.arguments for capture in self._captures]

    def _run(
        self,
        index: int,
        layer: nn.Module,
        part: MicroBatch,
        hooked: AbstractContextManager[None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output of a layer, ``(windows, tokens, D)`` each."""
        batch, first = part.batch, part.windows.start
        every = batch.arguments[self._key(part)]
        hidden = part.read().to(self.reader.device)
        positional, named = with_passed(every[index], batch.passed_on.get(first))
        with library_errors(self.layout), hooked:
            result = layer(hidden.unflatten(-1, self._streams), *positional, **named)
        self._returns_tuple = isinstance(result, tuple | list)
        after = result[0] if self._returns_tuple else result
        if index + 1 < len(every) and takes_passed(every[index + 1]):
            batch.passed_on[first] = result[1]
        return hidden, after.flatten(2)
