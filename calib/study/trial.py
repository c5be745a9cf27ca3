"""Variants of one model tried together: each layer is read once and serves all of them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from calib.refit import Prefix, refit_if_better
from calib.scoring.score import token_bits
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import ExpertKey, FfnModule, cut_weight, down_matrices, down_name
from calib.streaming.hidden_states import SpilledStates
from calib.streaming.layer_groups import LayerGroups
from calib.streaming.settings import PassSettings
from calib.streaming.weights import TORCH_DTYPE, WeightReader
from calib.study.text import CalibrationPass, has_one_ffn
from calib.text.heldout import Encoded
from surgery.layout.layout import Layout
from surgery.process import Advance, no_advance
from surgery.stats.channels import DEFAULT_CRITERION, Kept, choose_layer
from surgery.tokenizer.id_map import IdMap

Sink = Callable[[int, Mapping[ExpertKey, torch.Tensor]], object]
"""Called with a layer and its refitted down_projs ``[D, K]`` by unit."""


@dataclass(frozen=True, eq=False)
class Variant:
    """What is tried."""

    ids: IdMap
    lengths: Mapping[str, int]
    """Channel axis → I'."""
    criterion: str = DEFAULT_CRITERION
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Channel axis → length of the blocks that go or stay as one."""
    repair: bool = False
    """Whether down_proj is refitted."""
    layers: Sequence[Sequence[int]] = ()
    """As in a plan: the source's layers that each of its own is made of; empty: all as they are."""
    kept: Mapping[int, Mapping[str, list[np.ndarray]]] | None = None
    """Channels that have been chosen already, by layer of the source."""


class Trial:
    """Held-out text through one cut of the model."""

    def __init__(
        self,
        cut: Variant,
        heldout: Encoded,
        reading: CalibrationPass | None,
        sink: Sink = lambda index, refitted: None,
    ) -> None:
        """Make ready to run.

        Args:
            cut: What is tried.
            heldout: Text that its vocabulary has cut.
            reading: The text that its channels are chosen by; None where none go.
            sink: Is given the refitted matrices of each layer.
        """
        self.cut = cut
        self.heldout = heldout
        self.reading = reading
        self.stream = Stream(heldout.windows)
        self.kept: Kept = []
        """The channels that stayed, layer by layer."""
        self.refitted = 0
        """Matrices that the gate let through."""
        self._prefix = Prefix(reading.streams) if reading and cut.repair else None
        self._sink = sink
        self._groups = LayerGroups(cut.layers)

    @property
    def streams(self) -> list[Stream]:
        """All text that a trial carries itself."""
        return [self.stream, *(self._prefix.streams if self._prefix else [])]

    def run(self, decoder: StreamedDecoder, index: int) -> None:
        """Carry the text through a layer as the cut leaves it."""
        if not self.cut.layers or [index] in self.cut.layers:
            weights = self._cut_weights(decoder, index)
            decoder.run(index, self.stream, weights=weights)
            if self._prefix is not None:
                self._prefix.advance(decoder, index, weights)
            return
        self._groups.run(decoder, index, self.stream)

    def _cut_weights(self, decoder: StreamedDecoder, index: int) -> dict[str, torch.Tensor]:
        """down_proj with zeros for channels that go, refitted where that is asked and helps."""
        if self.reading is None:
            return {}
        chosen = self._choose(self.reading, index)
        layer, found = decoder.layer(index), {}
        refitted: dict[ExpertKey, torch.Tensor] = {}
        for ffn_module in decoder.ffn_modules(index):
            if ffn_module.axis in chosen:
                if self.cut.repair:
                    refitted |= self._refit(
                        decoder, index, ffn_module, self.reading, chosen[ffn_module.axis]
                    )
                found[down_name(ffn_module)] = cut_weight(
                    layer, ffn_module, chosen[ffn_module.axis], refitted
                )
        self._sink(index, refitted)
        return found

    def _refit(
        self,
        decoder: StreamedDecoder,
        index: int,
        ffn_module: FfnModule,
        reading: CalibrationPass,
        kept: Sequence[np.ndarray],
    ) -> dict[ExpertKey, torch.Tensor]:
        """The matrices of a unit ``[D, K]``, none where refitting helps none of them."""
        layer, helped = decoder.layer(index), 0
        found: dict[ExpertKey, torch.Tensor] = {}
        along = self._prefix if has_one_ffn(decoder.ffn_modules(index)) else None
        dtype = down_dtype(decoder.layout, index, ffn_module.axis)
        weight = layer.get_parameter(down_name(ffn_module)).data
        for expert, matrix in enumerate(down_matrices(layer, ffn_module, weight)):
            place = ffn_module.axis, expert
            stays = torch.from_numpy(kept[expert]).to(matrix.device)
            grams = [grams[place] for grams in reading.grams if place in grams]
            if along is not None:
                better = along.refit(decoder, index, ffn_module, stays, dtype)
            else:
                better = refit_if_better(matrix, stays, grams, dtype) if grams else None
            helped += better is not None
            found[place] = matrix[:, stays].to(dtype) if better is None else better
        self.refitted += helped
        return found if helped else {}

    def _choose(self, reading: CalibrationPass, index: int) -> dict[str, list[np.ndarray]]:
        """The channels that stay on each axis that loses some."""
        cut = self.cut
        if cut.kept is None:
            weights = reading.weights(cut.ids.new_size)
            chosen = choose_layer(
                reading.sums, weights, cut.lengths, cut.criterion, cut.blocks, index
            )
        else:
            chosen = dict(cut.kept[index])
        self.kept.append(chosen)
        full = {axis: sums.sum_sq.shape[-1] for axis, sums in reading.sums.items()}
        return {axis: kept for axis, kept in chosen.items() if len(kept[0]) < full[axis]}


def try_all(
    layout: Layout,
    trials: Sequence[Trial],
    settings: PassSettings,
    progress: Advance = no_advance,
) -> list[list[np.ndarray]]:
    """Carry all trials and their readings through the model in one pass.

    A reading shows one layer at a time, to the trials that choose by it, and forgets it.

    Hidden states are in files where the settings name a directory for them, else in memory.

    Returns:
        Per trial and window of held-out text, the bits of each token, float64.
    """
    readings = list({id(t.reading): t.reading for t in trials if t.reading is not None}.values())
    streams = [stream for reading in readings for stream in reading.streams]
    streams += [stream for trial in trials for stream in trial.streams]
    with ExitStack() as stack:
        reader = stack.enter_context(
            WeightReader(layout.checkpoint, settings.device, settings.dtype)
        )
        if settings.spill is not None:
            folder = stack.enter_context(TemporaryDirectory(".hidden", "trials.", settings.spill))
            for number, stream in enumerate(streams):
                place = Path(folder) / str(number)
                place.mkdir()
                stream.states = SpilledStates(place)
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed(streams)
        for index in decoder.layers():
            for reading in [*readings, None]:
                if reading is not None:
                    reading.measure(decoder, index)
                for trial in (t for t in trials if t.reading is reading):
                    trial.run(decoder, index)
                    progress(len(trial.heldout.windows))
                if reading is not None:
                    reading.forget()
        return token_bits(decoder, [(trial.stream, trial.cut.ids.kept) for trial in trials])


def down_dtype(layout: Layout, index: int, axis: str) -> torch.dtype:
    """The dtype in which the file holds a layer's down_proj; that of FP8 is bf16, once cut."""
    for ref in layout.of_layer[index].values():
        slot = layout.roles[ref.name].slot
        if slot.ffn_output and slot.width == axis:
            return TORCH_DTYPE.get(ref.dtype, torch.bfloat16)
    raise KeyError(axis)
