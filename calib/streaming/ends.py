"""The model before its layers and after them: tables, arguments of the layers, and the head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.streaming.batches import Branches, MicroBatch, seen
from calib.streaming.empty_model import (
    Conversion,
    compute_missing,
    empty_model,
    layers_paths,
    library_errors,
)
from calib.streaming.layers import check_finite, move_buffers
from calib.streaming.stand_ins import ENCODED, IDS, MASK, Arguments, Stack, with_values
from calib.streaming.weights import WeightReader
from surgery.errors import CheckpointError
from surgery.families.blocks import OUTSIDE
from surgery.families.schema import DECODER, ENCODER_DECODER, VOCAB, Dim
from surgery.files.safetensors_header import TensorRef
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

    @cached_property
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


class Ends:
    """The library's model without its layers: what runs before the first and after the last.

    Its weights stay in memory, but for the tables'. An encoder with a decoder has two stacks of
    layers, whose hidden states are side by side.
    """

    def __init__(self, layout: Layout, reader: WeightReader) -> None:
        """Build the model from config.json, without weights and without random numbers."""
        self._layout, self._reader = layout, reader
        self._model, self.conversion = empty_model(layout, reader.dtype)
        paths, outputs = layers_paths(layout, self.conversion), layout.family.layer_outputs
        if 0 < layout.first_shared < layout.num_hidden_layers:
            outputs = 0  # such a model looks at the states between two layers
        self.encoder_layers = len(paths) - layout.decoder_layers
        """How many layers come before those of a decoder that has an encoder beside it."""
        parts = (paths[: self.encoder_layers], paths[self.encoder_layers :])
        self._stacks = [Stack(self._model, part, outputs) for part in parts if part]
        self.layers = [layer for stack in self._stacks for layer in stack.layers]
        """The library's layers."""
        self.tables = Tables(layout, reader, self._model, self.conversion, self._stacks)
        self.streams: tuple[int, ...] = (-1,)
        """The last dimensions of the hidden states; the model may have several streams of them."""
        self.values = 1
        """How many values the layer that ran last has returned."""
        self._options = {"use_cache": False} if layout.family.kind == DECODER else {}

    @property
    def config(self) -> Any:
        """The library's config of the language model, with what its class fills in."""
        return self._model.config.get_text_config()

    def names(self) -> list[str]:
        """Return the file's names of its tensors, in reading order."""
        outer = [ref.name for ref in self._outer_tensors().values()]
        return [*outer, *self.tables.names()]

    def _outer_tensors(self) -> dict[str, TensorRef]:
        """Return the tensors before and after the layers, without embeddings and head."""
        layout, family = self._layout, self._layout.family
        apart = (family.head, family.head.removesuffix("weight") + "bias")
        roles = layout.roles
        return {
            name: ref
            for name, ref in layout.by_name.items()
            if roles[ref.name].layer is None and roles[ref.name].slot.block not in OUTSIDE
            if name not in apart and roles[ref.name].slot.dims != (Dim(VOCAB), None)
        }

    def load(self) -> None:
        """Read all weights but those of the tables.

        Raises:
            CheckpointError: one has NaN or infinity.
        """
        outer = self._outer_tensors()
        names = {name: self._reader.read(ref.name) for name, ref in outer.items()}
        for name, value in names.items():
            check_finite(outer[name], value)
        weights = {k: self._reader.to_device(v) for k, v in self.conversion.convert(names).items()}
        self._model.load_state_dict(weights, strict=False, assign=True)
        if self._layout.family.kind == ENCODER_DECODER:
            compute_missing(self._model)
        move_buffers(self._model, self._reader.device)

    @cached_property
    def start(self) -> int | None:
        """The token that begins a decoder's text; None where there is none, or no such decoder."""
        if not self._layout.decoder_layers:
            return None
        start = getattr(self._model.config, "decoder_start_token_id", None)
        if start is not None and not 0 <= start < self._layout.vocab_size:
            raise CheckpointError(
                self._layout.where,
                "decoder_start_token_id has no row in the embedding",
                expected=f"a number below {self._layout.vocab_size}",
                found=start,
                fix="check config.json",
            )
        return start

    def key(self, part: MicroBatch) -> int:
        """Key of a micro-batch's arguments."""
        alone = self.tables.by_ids or part.batch.branches
        return part.windows.start if alone else len(part.ids)

    def capture(
        self, ids: torch.Tensor, used: np.ndarray, branches: Sequence[Branches] = ()
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """Run the model up to its layers; return the hidden states and each layer's arguments.

        The tables have the rows of the tokens ``used``.
        """
        texts = [ids, shifted(ids, self.start)][: len(self._stacks)]
        places = (torch.from_numpy(np.searchsorted(used, text.numpy())) for text in texts)
        rows = [each.to(self._reader.device) for each in places]
        with library_errors(self._layout):
            if self._layout.family.kind != ENCODER_DECODER:
                hidden, arguments = self._capture_one(rows[0], branches)
            elif self._layout.decoder_layers:
                return self._capture_both(*rows)
            else:
                (stack,) = self._stacks
                run = partial(stack.parent, **self._given(stack, rows[0]))
                hidden, arguments = stack.capture(run)
        self._check_length(hidden, ids)
        self.streams = tuple(hidden.shape[2:])
        return hidden.flatten(2), arguments

    def _capture_one(
        self, rows: torch.Tensor, branches: Sequence[Branches]
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """Capture the only stack's; IDS and MASK stand for the tokens and for the branches."""
        given: dict[str, torch.Tensor] = {}
        stand_ins: list[tuple[torch.Tensor, object]] = [(rows, IDS)]
        if branches:
            mask = self.mask(branches)
            positions = torch.stack([each.positions for each in branches])
            given = {"attention_mask": mask, "position_ids": positions.to(mask.device)}
            stand_ins.append((mask, MASK))
        hidden, found = self._stacks[0].capture(partial(self._forward, rows, given))

        def find(value: Any) -> Any:
            return next((stand_in for each, stand_in in stand_ins if value is each), value)

        return hidden, [with_values(of, find) for of in found]

    def _capture_both(
        self, text: torch.Tensor, shifted_text: torch.Tensor
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """Capture both stacks'; ENCODED stands for what the encoder makes of the text."""
        encoder, decoder = self._stacks
        of_encoder, first = encoder.capture(partial(encoder.parent, **self._given(encoder, text)))
        self._check_length(of_encoder, text)
        encoded, given = torch.zeros_like(of_encoder), self._given(decoder, shifted_text)
        of_decoder, others = decoder.capture(
            partial(decoder.parent, **given, encoder_hidden_states=encoded, use_cache=False)
        )
        crossing = [with_values(each, lambda v: ENCODED if v is encoded else v) for each in others]
        return torch.cat([of_encoder, of_decoder], dim=-1), [*first, *crossing]

    def _forward(self, rows: torch.Tensor, more: Mapping[str, torch.Tensor]) -> Any:
        """Run the library's model on ``rows`` of its tables, int64 ``(windows, tokens)``."""
        given: dict[str, Any] = {**self._options, **more}
        if self.tables.by_ids:
            return self._model(input_ids=rows, **given)
        return self._model(inputs_embeds=self.tables.look_up(rows), **given)

    def mask(self, branches: Sequence[Branches]) -> torch.Tensor:
        """Return what each token of windows with ``branches`` attends to, as a layer adds it.

        ``(windows, 1, tokens, tokens)``: 0 or the lowest number.
        """
        numbers = torch.stack([each.numbers for each in branches]).to(self._reader.device)
        sees, dtype = seen(numbers)[:, None], self._reader.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)

    def _given(self, stack: Stack, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what an encoder or a decoder is run on. Some scale the rows of their table."""
        if self._layout.family.positions_after_pad:  # it would look for padding among the ``rows``
            return {"inputs_embeds": stack.parent.get_input_embeddings()(rows)}
        return {"input_ids": rows}

    def _check_length(self, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        """Refuse windows that the model pads, as BigBird does with long ones."""
        if hidden.shape[1] != ids.shape[1]:
            raise CheckpointError(
                self._layout.where,
                f"makes the model pad a window of {ids.shape[1]} tokens to whole blocks of its "
                "attention",
                found=f"{hidden.shape[1]} tokens",
                fix="use a smaller `seq_len`, at which it attends to all tokens",
            )

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
        for block in self.tables.head_blocks(every):
            shown = None
            for index, (states, rows) in enumerate(hidden):
                first, stop = np.searchsorted(rows, (block[0], block[-1] + 1)).tolist()
                if first == stop:
                    continue
                if rows is not shown:  # computing all rows for half of them takes twice the time
                    self.tables.show_head(np.searchsorted(block, rows[first:stop]))
                    shown = rows
                begin = torch.zeros(states.shape[:2], dtype=torch.int64)
                begin = begin.to(self._reader.device)
                run = partial(self._forward, begin, {})
                logits = self._replayed(self._stacks[0], states, run).logits
                yield index, slice(first, stop), logits

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model without its head makes of the states after the last layer.

        Both are ``(windows, tokens, D)``; a final norm makes the difference. Of an encoder with a
        decoder, the states are those of both, and the output is the decoder's.
        """
        stack = self._stacks[-1]
        if self._layout.family.kind == ENCODER_DECODER:
            of_stack = hidden[..., self.half(self._layout.num_hidden_layers - 1, hidden)]
            return self._end(stack, stack.parent, of_stack)
        return self._end(stack, self._model.base_model, hidden)

    def _end(self, stack: Stack, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return what ``module``, which runs ``stack``, makes of the states after its layers."""
        width = self._layout.by_name[self._layout.family.embedding].shape[1]
        begin = torch.zeros((*hidden.shape[:2], width), dtype=self._reader.dtype)
        begin = begin.to(self._reader.device)
        run = partial(module, inputs_embeds=begin, **self._options)
        last: torch.Tensor = self._replayed(stack, hidden, run).last_hidden_state
        return last

    def _replayed(self, stack: Stack, hidden: torch.Tensor, run: Callable[[], Any]) -> Any:
        given = hidden.to(self._reader.device).unflatten(-1, self.streams)
        with library_errors(self._layout):
            return stack.replay(given, self.values, run)

    def half(self, index: int, states: torch.Tensor) -> slice:
        """Return the columns of ``states`` that a layer changes."""
        if not self._layout.decoder_layers:
            return slice(None)
        half = states.shape[-1] // 2
        return slice(0, half) if index < self.encoder_layers else slice(half, None)

    def ids(self, index: int, part: MicroBatch) -> torch.Tensor:
        """Return the tokens that a layer runs on, int64 ``(windows, tokens)``."""
        return part.ids if index < self.encoder_layers else shifted(part.ids, self.start)

    def whole(self, index: int, part: MicroBatch, after: torch.Tensor) -> torch.Tensor:
        """Return the states of a micro-batch once a layer has made ``after`` of its half."""
        if not self._layout.decoder_layers:
            return after
        states = part.read().to(self._reader.device)
        if index == self.encoder_layers - 1:
            after = self._end(self._stacks[0], self._stacks[0].parent, after)
        whole = states.clone()
        whole[..., self.half(index, states)] = after
        return whole


def shifted(ids: torch.Tensor, start: int | None) -> torch.Tensor:
    """Return what a decoder reads of windows that its encoder reads, int64 ``(windows, tokens)``.

    It is the same text one token later, after the token that begins every output. Where config.json
    names none, the last token of the window begins it, as in mBART's own training.
    """
    first = ids[:, -1:] if start is None else torch.full_like(ids[:, :1], start)
    return torch.cat([first, ids[:, :-1]], dim=1)
