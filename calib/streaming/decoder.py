"""The streamed decoder: the library's own model with the weights of one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from calib.streaming.empty_model import library_errors
from calib.streaming.ends import Ends
from calib.streaming.ffn import FfnCall, FfnModule, ffn_above, hooked_ffn, no_hook, seen_ffn
from calib.streaming.layers import Layers, all_finite, not_finite
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.stand_ins import (
    ENCODED,
    IDS,
    MASK,
    PassedOn,
    swapped,
    takes_passed,
    with_values,
)
from calib.streaming.weights import WeightReader
from surgery.errors import CheckpointError
from surgery.layout.layout import Layout
from surgery.process import Advance, no_advance, release_freed_memory

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
    """A causal LM, or an encoder, that reads each layer, runs all text through it, and frees it.

    An encoder with a decoder runs as one list of layers, the encoder's first. Its hidden states are
    those of both, side by side: ``(windows, tokens, 2 D)``. A layer changes its own half.
    """

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
        self._ends = Ends(layout, reader)
        self._layers = Layers(
            layout, reader, self._ends.conversion, self._ends.layers, self.settings, self.timings
        )
        self._channels = max([1, *map(layout.channels_of, layout.family.widths)])
        reader.expect([*self._ends.names(), *self._layers.names()])
        self._ends.load()
        release_freed_memory()  # that of planning, tokenizing and building, before weights are read

    @property
    def config(self) -> Any:
        """The library's config of the language model, with what its class fills in."""
        return self._ends.config

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
        begins = () if self._ends.start is None else (self._ends.start,)
        used = np.union1d(tokens_of(streams, self.layout.vocab_size), begins).astype(np.int64)
        self._ends.tables.load(used)
        for stream in streams:
            stream.batches = []
            for length in dict.fromkeys(map(len, stream.windows)):
                ids = torch.from_numpy(np.stack([w for w in stream.windows if len(w) == length]))
                first = sum(each.ids.numel() for each in stream.batches)
                pairs = zip(stream.windows, stream.branches, strict=False)
                branches = [each for window, each in pairs if len(window) == length]
                stream.batches.append(Batch(ids, stream.states, first, branches=branches))
                self._embed(stream, used, passed)
            if passed:
                stream.states.restore(passed)
        self._ends.tables.free()
        for stream in streams if passed else ():
            self._recall(stream, passed)

    def _embed(self, stream: Stream, used: np.ndarray, passed: int) -> None:
        """Fill the last batch's hidden states and capture the arguments of the layers."""
        batch, states = stream.batches[-1], stream.states
        for part in self._micro_batches([batch]):
            branches = batch.branches[part.windows]
            hidden, arguments = self._ends.capture(part.ids, used, branches)
            if not len(states.before):
                states.allocate(stream.tokens, hidden.shape[-1], hidden.dtype)
            shared = 0 < self.layout.first_shared < self.layout.num_hidden_layers
            passes = takes_passed(arguments[passed]) if passed else False
            if passed and (shared or (passes and not self.layout.decoder_layers)):
                raise CheckpointError(
                    self.layout.checkpoint.path,
                    "its layers pass on more than hidden states, which no interrupted run keeps",
                    fix="start again without `resume`",
                )
            batch.arguments.setdefault(self._ends.key(part), arguments)
            if not passed:
                states.before[part.rows].view(hidden.shape).copy_(hidden)
                states.give_back(part.rows)

    def _recall(self, stream: Stream, passed: int) -> None:
        """Compute again what the layers of an interrupted run passed on, of T5's a bias.

        The first layer of the stack makes it, from the lengths of the windows alone.
        """
        first = 0 if passed < self._ends.encoder_layers else self._ends.encoder_layers
        if not any(takes_passed(of[passed]) for b in stream.batches for of in b.arguments.values()):
            return
        for index in self.layers(first):
            for part in self._micro_batches(stream.batches):
                if self._ends.key(part) not in part.batch.passed_on:
                    self._run(index, self.layer(index), part, nullcontext())
            return

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
                hooked = hooked_ffn(
                    layer, ffn_modules, self._ends.ids(index, part), channels, outputs
                )
                hidden, after = self._run(index, layer, part, hooked)
                hooks.states(index, hidden, after)
                finite.append(all_finite(after))
                part.write(self._ends.whole(index, part, after))
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
                hooked = hooked_ffn(layer, ffn_modules, self._ends.ids(index, part), collect)
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
                finite.append(all_finite(added))
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

    def channel_tensors(self, index: int, axis: str) -> dict[str, str]:
        """Return the parameters of ``channel_dims``, each with its tensor's name in the file."""
        return self._layers.channel_tensors(index, axis)

    def routers(self, index: int) -> dict[str, int]:
        """Return the tensors of a layer's router, each with its dimension that counts experts."""
        return self._layers.routers(index)

    def dtypes(self, index: int) -> dict[str, str]:
        """Return the parameters that a collapse adds up, each with the file's safetensors dtype."""
        return self._layers.dtypes(index)

    def logits(
        self, hidden: Sequence[tuple[torch.Tensor, np.ndarray]]
    ) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yield the logits of the states after the last layer, as ``Ends.logits``."""
        yield from self._ends.logits(hidden)

    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model without its head makes of such states, as ``Ends.outputs``."""
        return self._ends.outputs(hidden)

    def _micro_batches(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        return micro_batches(batches, self._channels, self.settings.micro_batch_values)

    def _run(
        self,
        index: int,
        layer: nn.Module,
        part: MicroBatch,
        hooked: AbstractContextManager[None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output of a layer, ``(windows, tokens, D)`` each."""
        batch, ends = part.batch, self._ends
        # What T5's layers pass on depends on no token.
        key = ends.key(part) if self.layout.decoder_layers else part.windows.start
        every, passed = batch.arguments[ends.key(part)], batch.passed_on.get(key, ())
        states = part.read().to(self.reader.device)
        hidden = states[..., ends.half(index, states)]

        def find(value: Any) -> Any:
            if isinstance(value, PassedOn):
                return passed[value.place - 1]
            if value is IDS:
                return ends.ids(index, part).to(self.reader.device)
            if value is MASK:
                return ends.mask(batch.branches[part.windows])
            return states[..., ends.half(0, states)] if value is ENCODED else value

        positional, named = with_values(every[index], find)
        with library_errors(self.layout), hooked:
            result = layer(hidden.unflatten(-1, ends.streams), *positional, **named)
        tupled = isinstance(result, tuple | list)
        ends.values = max(2, len(result)) if tupled else 1
        after = result[0] if tupled else result
        if index + 1 < len(every) and takes_passed(every[index + 1]):
            batch.passed_on[key] = tuple(result[1:])
        return hidden, after.flatten(2)
