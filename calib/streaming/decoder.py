"""The streamed decoder: the library's own model, its layers' weights present one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

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
from calib.streaming.empty_model import empty_model, library_errors
from calib.streaming.ffn import FfnModule, hooked_ffn
from calib.streaming.layers import Layers, move_buffers
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.stand_ins import ArgumentCapture, Arguments, CaptureDone, ReplayHidden, swapped
from calib.streaming.weights import WeightReader
from surgery.files.safetensors_header import TensorRef
from surgery.layout.layout import Layout
from surgery.process import Advance, no_advance, release_freed_memory

HEAD_ROWS = 8192
"""Rows of lm_head in memory at a time."""

NO_WEIGHTS: Mapping[str, torch.Tensor] = {}


class StreamedDecoder:
    """A causal LM whose decoder layers are read, used for all text, and dropped in turn."""

    def __init__(
        self,
        layout: Layout,
        reader: WeightReader,
        settings: PassSettings | None = None,
        timings: Timings | None = None,
    ) -> None:
        """Build the model from config.json without weights; nothing of it is random."""
        self.layout = layout
        self.reader = reader
        self.settings = settings or PassSettings(reader.device, reader.dtype)
        self.timings = timings or Timings()
        self._model, self._conversion = empty_model(layout, reader.dtype)
        parent, _, self._list_name = layout.family.layers.rpartition(".")
        self._parent = self._model.get_submodule(parent)
        modules = list(getattr(self._parent, self._list_name))
        self._layers = Layers(
            layout, reader, self._conversion, modules, self.settings, self.timings
        )
        self._recorders = [ArgumentCapture(layer) for layer in modules]
        self._recorders[-1].last = True
        self._channels = max((layout.channels_of(axis) for axis in layout.family.widths), default=1)
        self._returns_tuple = False
        self._set_layers(self._recorders)
        reader.expect(self._reading_order())
        self._load_ends()
        release_freed_memory()  # of planning, tokenizing and building, before the weights come

    @torch.no_grad()
    def embed(self, streams: Sequence[Stream], passed: int = 0) -> None:
        """Group each stream's windows by length, in order, and carry them up to the first layer.

        Only the rows of tokens that occur are read, once for all streams.

        Args:
            streams: Texts; each must have a token.
            passed: Layers after which their hidden states have been saved: those are taken up
                again.

        Raises:
            DataError: no token at all, or one without a row in the embedding.
        """
        used = tokens_of(streams, self.layout.vocab_size)
        embedding = self._model.get_input_embeddings()
        rows = self.reader.rows(self._tensor(self.layout.family.embedding), used)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None
        for stream in streams:
            stream.batches = []
            for length in dict.fromkeys(map(len, stream.windows)):
                ids = torch.from_numpy(np.stack([w for w in stream.windows if len(w) == length]))
                first = sum(each.ids.numel() for each in stream.batches)
                stream.batches.append(Batch(ids, stream.states, first))
                self._embed(embedding, stream, used, passed)
            if passed:
                stream.states.restore(passed)
        embedding.to("meta")

    def _embed(self, embedding: nn.Module, stream: Stream, used: np.ndarray, passed: int) -> None:
        """Fill the last batch's rows of the hidden states, and learn what the layers are given."""
        batch, states = stream.batches[-1], stream.states
        for part in self._parts([batch]):
            places = torch.from_numpy(np.searchsorted(used, part.ids.numpy()))
            hidden, arguments = self._record(embedding(places.to(self.reader.device)))
            if not len(states.before):
                states.allocate(stream.tokens, hidden.shape[-1], hidden.dtype)
            batch.arguments.setdefault(len(part.ids), arguments)
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
        """Carry all streams through the layers that they have not passed.

        Args:
            streams: From ``embed``; their hidden states are overwritten.
            hooks: Look on in each layer.
            progress: Called with the windows that have passed a layer.
            finished: Called with each layer that all windows have passed.
        """
        for index in self.layers(streams[0].states.passed):
            for stream in streams:
                self.run(index, stream, hooks, progress=progress)
            finished(index)

    def layers(self, first: int = 0) -> Iterator[int]:
        """Yield the number of each layer from ``first`` on while its weights are in memory.

        The next layer is read meanwhile and, on the CPU, converted to the dtype that computes: two
        layers are in memory. Experts wait in the file's dtype, in which they are merged.
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
        """Carry ``stream`` through the layer ``index``, one that ``layers`` has yielded.

        Args:
            index: Number of the layer.
            stream: Its hidden states are overwritten.
            hooks: Look on.
            weights: Parameters of the layer that this stream is to see instead of its own.
            layer: Stands in for it, as a copy with other weights does.
            progress: Called with the windows that have passed.
        """
        layer, ffn_modules = layer or self.layer(index), self.ffn_modules(index)
        with self.timings.timed("compute"), swapped(layer, weights):
            for part in self._parts(stream.batches):
                watched = hooked_ffn(layer, ffn_modules, part.ids, partial(hooks.channels, index))
                hidden, after = self._run(index, layer, part, watched)
                hooks.states(index, hidden, after)
                part.write(after)
                stream.states.give_back(part.rows)
                progress(len(part.ids))
        with self.timings.timed("write"):
            stream.states.advance()

    @torch.no_grad()
    def peek(
        self, index: int, stream: Stream, weights: Mapping[str, torch.Tensor] = NO_WEIGHTS
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield what a layer with one dense FFN would make of ``stream``, which stays where it is.

        Each micro-batch comes as its rows of the hidden states, the input of down_proj
        ``(tokens, I)`` and the layer's result ``(tokens, D)``.
        """
        layer, ffn_modules = self.layer(index), self.ffn_modules(index)
        for part in self._parts(stream.batches):
            seen: list[torch.Tensor] = []

            def see(axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
                seen.append(act.view(tokens.count, -1, act.shape[-1]))  # noqa: B023

            with self.timings.timed("compute"), swapped(layer, weights):
                watched = hooked_ffn(layer, ffn_modules, part.ids, see)
                _, after = self._run(index, layer, part, watched)
            stream.states.give_back(part.rows)
            yield part.rows, torch.cat(seen, dim=1).flatten(0, 1), after.flatten(0, 1)

    def layer(self, index: int) -> nn.Module:
        """The library's layer; it has weights while ``layers`` is at it."""
        return self._layers.modules[index]

    def ffn_modules(self, index: int) -> list[FfnModule]:
        """What has channels in a layer."""
        return self._layers.ffn_modules(index)

    def dtypes(self, index: int) -> dict[str, str]:
        """Parameters that add up in a collapse → the safetensors dtype that the file has."""
        return self._layers.dtypes(index)

    def _parts(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        return micro_batches(batches, self._channels, self.settings.micro_batch_values)

    @torch.no_grad()
    def logits(
        self, hidden: Sequence[tuple[torch.Tensor, np.ndarray]]
    ) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yield (place in ``hidden``, which of its rows, logits) of lm_head, block by block.

        Each row of the head is read once, whichever of ``hidden`` want it: states ``(windows,
        tokens, D)`` as they left the last layer, with the ascending rows of their vocabulary.
        Logits are ``(windows, tokens, rows of the block)`` as the library computes them, caps
        included.
        """
        family = self.layout.family
        name = self._tensor(family.embedding if self.layout.tied else family.head)
        bias = self.layout.by_name.get(family.head.removesuffix("weight") + "bias")
        width = self.layout.by_name[family.embedding].shape[1]
        head, finished = self._model.get_output_embeddings(), ReplayHidden(self._returns_tuple)
        every = np.unique(np.concatenate([rows for _, rows in hidden]))
        self.reader.expect([name] * -(-len(every) // HEAD_ROWS))
        self._set_layers([finished])
        try:
            for start in range(0, len(every), HEAD_ROWS):
                block = every[start : start + HEAD_ROWS]
                head.weight = nn.Parameter(self.reader.rows(name, block), requires_grad=False)
                if bias is not None:
                    head.bias = nn.Parameter(
                        self.reader.rows(bias.name, block), requires_grad=False
                    )
                for place, (states, rows) in enumerate(hidden):
                    first, stop = np.searchsorted(rows, (block[0], block[-1] + 1)).tolist()
                    if first == stop:
                        continue
                    finished.hidden = states.to(self.reader.device)
                    begin = finished.hidden.new_zeros((*states.shape[:2], width))
                    with library_errors(self.layout):
                        logits = self._model(inputs_embeds=begin, use_cache=False).logits
                    if stop - first < len(block):
                        wanted = torch.from_numpy(np.searchsorted(block, rows[first:stop]))
                        logits = logits[..., wanted.to(logits.device)]
                    yield place, slice(first, stop), logits
        finally:
            self._set_layers(self._recorders)
            head.to("meta")

    def _tensor(self, name: str) -> str:
        """The file's name of a tensor of the text model."""
        return self.layout.by_name[name].name

    def _set_layers(self, layers: Sequence[nn.Module]) -> None:
        setattr(self._parent, self._list_name, nn.ModuleList(layers))

    def _reading_order(self) -> list[str]:
        """The file's names of all tensors up to the last layer, as they are read."""
        ends = [ref.name for ref in self._ends().values()]
        return [*ends, self._tensor(self.layout.family.embedding), *self._layers.names()]

    def _ends(self) -> dict[str, TensorRef]:
        """What lies before and behind the layers, but embedding and head."""
        layout, family = self.layout, self.layout.family
        apart = (family.embedding, family.head, family.head.removesuffix("weight") + "bias")
        outside = {n: r for n, r in layout.by_name.items() if layout.roles[r.name].layer is None}
        return {name: ref for name, ref in outside.items() if name not in apart}

    def _load_ends(self) -> None:
        names = {name: self.reader.read(ref.name) for name, ref in self._ends().items()}
        weights = {k: self.reader.place(v) for k, v in self._conversion.convert(names).items()}
        self._model.load_state_dict(weights, strict=False, assign=True)
        move_buffers(self._model, self.reader.device)

    def _record(self, embeds: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model up to its layers and learn what it passes to each of them."""
        with library_errors(self.layout), suppress(CaptureDone):
            self._model(inputs_embeds=embeds, use_cache=False)
        first = self._recorders[0]
        return first.hidden, [recorder.arguments for recorder in self._recorders]

    def _run(
        self,
        index: int,
        layer: nn.Module,
        part: MicroBatch,
        watched: AbstractContextManager[None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into a layer and what comes out, ``(windows, tokens, D)``."""
        positional, named = part.batch.arguments[len(part.ids)][index]
        hidden = part.read().to(self.reader.device)
        with library_errors(self.layout), watched:
            result = layer(hidden, *positional, **named)
        self._returns_tuple = isinstance(result, tuple)
        return hidden, result[0] if self._returns_tuple else result
