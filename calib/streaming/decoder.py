"""The streamed decoder: the library's own model with the weights of one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.streaming.batches import (
    NO_HOOKS,
    Batch,
    Branches,
    LayerHooks,
    MicroBatch,
    Stream,
    Tokens,
    micro_batches,
    tokens_of,
)
from calib.streaming.empty_model import (
    compute_missing,
    empty_model,
    layers_paths,
    library_errors,
)
from calib.streaming.ffn import FfnCall, FfnModule, ffn_above, hooked_ffn, no_hook, seen_ffn
from calib.streaming.layers import Layers, all_finite, check_finite, move_buffers, not_finite
from calib.streaming.settings import PassSettings, Timings
from calib.streaming.stacks import Stack, capture_both, shifted
from calib.streaming.stand_ins import (
    ENCODED,
    IDS,
    Arguments,
    PassedOn,
    swapped,
    takes_passed,
    with_values,
)
from calib.streaming.tables import Tables
from calib.streaming.weights import WeightReader
from surgery.errors import CheckpointError
from surgery.families.blocks import OUTSIDE
from surgery.families.schema import DECODER, ENCODER_DECODER, VOCAB, Dim
from surgery.files.safetensors_header import TensorRef
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
        self._model, self._conversion = empty_model(layout, reader.dtype)
        paths, outputs = layers_paths(layout, self._conversion), layout.family.layer_outputs
        if 0 < layout.first_shared < layout.num_hidden_layers:
            outputs = 0  # such a model looks at the states between two layers
        self._encoder_layers = len(paths) - layout.decoder_layers
        parts = (paths[: self._encoder_layers], paths[self._encoder_layers :])
        self._stacks = [Stack(self._model, part, outputs) for part in parts if part]
        modules = [layer for stack in self._stacks for layer in stack.layers]
        self._layers = Layers(
            layout, reader, self._conversion, modules, self.settings, self.timings
        )
        self._tables = Tables(layout, reader, self._model, self._conversion, self._stacks)
        self._channels = max([1, *map(layout.channels_of, layout.family.widths)])
        self._outputs = 1
        self._options = {"use_cache": False} if layout.family.kind == DECODER else {}
        self._streams: tuple[int, ...] = (-1,)
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
        begins = () if self._start is None else (self._start,)
        used = np.union1d(tokens_of(streams, self.layout.vocab_size), begins).astype(np.int64)
        self._tables.load(used)
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
        self._tables.free()
        for stream in streams if passed else ():
            self._recall(stream, passed)

    def _embed(self, stream: Stream, used: np.ndarray, passed: int) -> None:
        """Fill the last batch's hidden states and capture the arguments of the layers."""
        batch, states = stream.batches[-1], stream.states
        for part in self._micro_batches([batch]):
            branches = batch.branches[part.windows]
            hidden, arguments = self._capture_arguments(part.ids, used, branches)
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
            batch.arguments.setdefault(self._key(part), arguments)
            if not passed:
                states.before[part.rows].view(hidden.shape).copy_(hidden)
                states.give_back(part.rows)

    def _recall(self, stream: Stream, passed: int) -> None:
        """Compute again what the layers of an interrupted run passed on, of T5's a bias.

        The first layer of the stack makes it, from the lengths of the windows alone.
        """
        first = 0 if passed < self._encoder_layers else self._encoder_layers
        if not any(takes_passed(of[passed]) for b in stream.batches for of in b.arguments.values()):
            return
        for index in self.layers(first):
            for part in self._micro_batches(stream.batches):
                if self._key(part) not in part.batch.passed_on:
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
                hooked = hooked_ffn(layer, ffn_modules, self._ids(index, part), channels, outputs)
                hidden, after = self._run(index, layer, part, hooked)
                hooks.states(index, hidden, after)
                finite.append(all_finite(after))
                part.write(self._both_halves(index, part, after))
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
                hooked = hooked_ffn(layer, ffn_modules, self._ids(index, part), collect)
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
        every = np.unique(np.concatenate([rows for _, rows in hidden]))
        for block in self._tables.head_blocks(every):
            shown = None
            for index, (states, rows) in enumerate(hidden):
                first, stop = np.searchsorted(rows, (block[0], block[-1] + 1)).tolist()
                if first == stop:
                    continue
                if rows is not shown:  # computing all rows for half of them takes twice the time
                    self._tables.show_head(np.searchsorted(block, rows[first:stop]))
                    shown = rows
                begin = torch.zeros(states.shape[:2], dtype=torch.int64)
                begin = begin.to(self.reader.device)
                run = partial(self._forward, begin)
                logits = self._replayed(self._stacks[0], states, run).logits
                yield index, slice(first, stop), logits

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model without its head makes of the states after the last layer.

        Both are ``(windows, tokens, D)``; a final norm makes the difference. Of an encoder with a
        decoder, the states are those of both, and the output is the decoder's.
        """
        stack = self._stacks[-1]
        if self.layout.family.kind == ENCODER_DECODER:
            of_stack = hidden[..., self._half(self.layout.num_hidden_layers - 1, hidden)]
            return self._end(stack, stack.parent, of_stack)
        return self._end(stack, self._model.base_model, hidden)

    def _end(self, stack: Stack, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return what ``module``, which runs ``stack``, makes of the states after its layers."""
        width = self.layout.by_name[self.layout.family.embedding].shape[1]
        begin = torch.zeros((*hidden.shape[:2], width), dtype=self.reader.dtype)
        begin = begin.to(self.reader.device)
        run = partial(module, inputs_embeds=begin, **self._options)
        last: torch.Tensor = self._replayed(stack, hidden, run).last_hidden_state
        return last

    def _replayed(self, stack: Stack, hidden: torch.Tensor, run: Callable[[], Any]) -> Any:
        given = hidden.to(self.reader.device).unflatten(-1, self._streams)
        with library_errors(self.layout):
            return stack.replay(given, self._outputs, run)

    def _reading_order(self) -> list[str]:
        """Return the file's names of all tensors up to the last layer, in reading order."""
        outer = [ref.name for ref in self._outer_tensors().values()]
        return [*outer, *self._tables.names(), *self._layers.names()]

    def _outer_tensors(self) -> dict[str, TensorRef]:
        """Return the tensors before and after the layers, without embeddings and head."""
        layout, family = self.layout, self.layout.family
        apart = (family.head, family.head.removesuffix("weight") + "bias")
        roles = layout.roles
        return {
            name: ref
            for name, ref in layout.by_name.items()
            if roles[ref.name].layer is None and roles[ref.name].slot.block not in OUTSIDE
            if name not in apart and roles[ref.name].slot.dims != (Dim(VOCAB), None)
        }

    def _load_outer(self) -> None:
        outer = self._outer_tensors()
        names = {name: self.reader.read(ref.name) for name, ref in outer.items()}
        for name, value in names.items():
            check_finite(outer[name], value)
        weights = {k: self.reader.to_device(v) for k, v in self._conversion.convert(names).items()}
        self._model.load_state_dict(weights, strict=False, assign=True)
        if self.layout.family.kind == ENCODER_DECODER:
            compute_missing(self._model)
        move_buffers(self._model, self.reader.device)

    @cached_property
    def _start(self) -> int | None:
        """The token that begins a decoder's text; None where there is none, or no such decoder."""
        if not self.layout.decoder_layers:
            return None
        start = getattr(self._model.config, "decoder_start_token_id", None)
        if start is not None and not 0 <= start < self.layout.vocab_size:
            raise CheckpointError(
                self.layout.where,
                "decoder_start_token_id has no row in the embedding",
                expected=f"a number below {self.layout.vocab_size}",
                found=start,
                fix="check config.json",
            )
        return start

    def _key(self, part: MicroBatch) -> int:
        """Key of a micro-batch's arguments."""
        alone = self._tables.by_ids or part.batch.branches
        return part.windows.start if alone else len(part.ids)

    def _forward(self, rows: torch.Tensor, branches: Sequence[Branches] = ()) -> Any:
        """Run the library's model on ``rows`` of its tables, int64 ``(windows, tokens)``."""
        given = self._options | self._attention(branches)
        if self._tables.by_ids:
            return self._model(input_ids=rows, **given)
        return self._model(inputs_embeds=self._tables.look_up(rows), **given)

    def _attention(self, branches: Sequence[Branches]) -> dict[str, torch.Tensor]:
        """Return positions and a mask for windows with ``branches``; nothing for others."""
        if not branches:
            return {}
        sees = torch.stack([each.sees for each in branches])[:, None]
        mask = torch.zeros(sees.shape, dtype=self.reader.dtype)
        mask = mask.masked_fill(~sees, torch.finfo(mask.dtype).min)
        positions = torch.stack([each.positions for each in branches])
        device = self.reader.device
        return {"attention_mask": mask.to(device), "position_ids": positions.to(device)}

    def _capture_arguments(
        self, ids: torch.Tensor, used: np.ndarray, branches: Sequence[Branches] = ()
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model up to its layers; return the hidden states and each layer's arguments.

        The tables have the rows of the tokens ``used``.
        """
        texts = [ids, shifted(ids, self._start)][: len(self._stacks)]
        places = (torch.from_numpy(np.searchsorted(used, text.numpy())) for text in texts)
        rows = [each.to(self.reader.device) for each in places]
        with library_errors(self.layout):
            if self.layout.family.kind != ENCODER_DECODER:
                run = partial(self._forward, rows[0], branches)
                hidden, found = self._stacks[0].capture(run)
                arguments = [with_values(of, lambda v: IDS if v is rows[0] else v) for of in found]
            elif self.layout.decoder_layers:
                given = [self._given(*each) for each in zip(self._stacks, rows, strict=True)]
                of_encoder, of_decoder, arguments = capture_both(*self._stacks, given=given)
                self._check_length(of_encoder, ids)
                return torch.cat([of_encoder, of_decoder], dim=-1), arguments
            else:
                (stack,) = self._stacks
                run = partial(stack.parent, **self._given(stack, rows[0]))
                hidden, arguments = stack.capture(run)
        self._check_length(hidden, ids)
        self._streams = tuple(hidden.shape[2:])
        return hidden.flatten(2), arguments

    def _check_length(self, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        """Refuse windows that the model pads, as BigBird does with long ones."""
        if hidden.shape[1] != ids.shape[1]:
            raise CheckpointError(
                self.layout.where,
                f"makes the model pad a window of {ids.shape[1]} tokens to whole blocks of its "
                "attention",
                found=f"{hidden.shape[1]} tokens",
                fix="use a smaller `seq_len`, at which it attends to all tokens",
            )

    def _given(self, stack: Stack, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what an encoder or a decoder is run on. Some scale the rows of their table."""
        if self.layout.family.positions_after_pad:  # it would look for padding among the ``rows``
            return {"inputs_embeds": stack.parent.get_input_embeddings()(rows)}
        return {"input_ids": rows}

    def _half(self, index: int, states: torch.Tensor) -> slice:
        """Return the columns of ``states`` that a layer changes."""
        if not self.layout.decoder_layers:
            return slice(None)
        half = states.shape[-1] // 2
        return slice(0, half) if index < self._encoder_layers else slice(half, None)

    def _ids(self, index: int, part: MicroBatch) -> torch.Tensor:
        """Return the tokens that a layer runs on, int64 ``(windows, tokens)``."""
        return part.ids if index < self._encoder_layers else shifted(part.ids, self._start)

    def _both_halves(self, index: int, part: MicroBatch, after: torch.Tensor) -> torch.Tensor:
        """Return the states of a micro-batch once a layer has made ``after`` of its half."""
        if not self.layout.decoder_layers:
            return after
        states = part.read().to(self.reader.device)
        if index == self._encoder_layers - 1:
            after = self._end(self._stacks[0], self._stacks[0].parent, after)
        whole = states.clone()
        whole[..., self._half(index, states)] = after
        return whole

    def _run(
        self,
        index: int,
        layer: nn.Module,
        part: MicroBatch,
        hooked: AbstractContextManager[None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output of a layer, ``(windows, tokens, D)`` each."""
        batch, both = part.batch, bool(self.layout.decoder_layers)
        # What T5's layers pass on depends on no token.
        key = self._key(part) if both else part.windows.start
        every, passed = batch.arguments[self._key(part)], batch.passed_on.get(key, ())
        states = part.read().to(self.reader.device)
        hidden = states[..., self._half(index, states)]

        def find(value: Any) -> Any:
            if isinstance(value, PassedOn):
                return passed[value.place - 1]
            if value is IDS:
                return self._ids(index, part).to(self.reader.device)
            return states[..., self._half(0, states)] if value is ENCODED else value

        positional, named = with_values(every[index], find)
        with library_errors(self.layout), hooked:
            result = layer(hidden.unflatten(-1, self._streams), *positional, **named)
        tupled = isinstance(result, tuple | list)
        self._outputs = max(2, len(result)) if tupled else 1
        after = result[0] if tupled else result
        if index + 1 < len(every) and takes_passed(every[index + 1]):
            batch.passed_on[key] = tuple(result[1:])
        return hidden, after.flatten(2)
