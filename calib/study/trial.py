"""Try variants of one model together: each layer is read once for all of them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from calib.refit import PrunedPrefix, refit_if_better
from calib.scoring.score import count_bits, predictions_of
from calib.scoring.tasks import AskedTasks
from calib.streaming.batches import Stream, spilled
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import (
    ExpertKey,
    FfnModule,
    down_matrices,
    down_name,
    pruned_parameters,
)
from calib.streaming.layer_groups import LayerGroups
from calib.streaming.settings import PassSettings
from calib.streaming.stand_ins import masked_router
from calib.streaming.weights import TORCH_DTYPE, WeightReader
from calib.study.reconstruction import RATES, reconstruct
from calib.study.text import CalibrationPass, has_one_ffn
from calib.study.two_stage import without_attention
from calib.text.heldout import Encoded
from surgery.families.schema import EXPERT
from surgery.layout.layout import Layout
from surgery.process import Advance, Stopwatch, no_advance
from surgery.stats.channels import (
    DEFAULT_CRITERION,
    Kept,
    choose_experts,
    choose_layer,
    expert_importance,
)
from surgery.tokenizer.id_map import IdMap

RefitHook = Callable[[int, Mapping[ExpertKey, torch.Tensor], Mapping[str, torch.Tensor]], object]
"""Called with a layer, its refitted down_projs ``[D, K]``, and other tensors that were trained, by
their names in the source's file."""


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """How many experts of each layer are kept, and by what."""

    criterion: str
    """A key of ``channels.EXPERT_CRITERIA``."""
    count: int
    groups: int
    """Groups of experts, each of which keeps as many."""
    kept: Mapping[int, np.ndarray]
    """By layer of the source, where no text chooses them."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A pruned version of the model."""

    ids: IdMap
    lengths: Mapping[str, int]
    """Channel axis → I'."""
    criterion: str = DEFAULT_CRITERION
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Channel axis → length of the blocks that are kept or removed as one."""
    repair: bool = False
    """Whether down_proj is refitted."""
    reconstruct: bool = False
    """Whether FFNs are then trained, too."""
    layers: Sequence[Sequence[int]] = ()
    """As in a plan: the source's layers that make each output layer. Empty keeps all layers."""
    kept: Mapping[int, Mapping[str, list[np.ndarray]]] | None = None
    """Kept channels by layer of the source, if they are chosen already."""
    experts: ExpertChoice | None = None
    """None keeps all experts."""
    without_attention: frozenset[int] = frozenset()
    """Layers whose attention is removed (2SSP)."""


class Trial:
    """Runs held-out text through one variant of the model."""

    def __init__(
        self,
        variant: Variant,
        heldout: Encoded,
        calibration_pass: CalibrationPass | None,
        on_refit: RefitHook = lambda index, refitted, others: None,
        asked: AskedTasks | None = None,
    ) -> None:
        """Prepare a trial.

        Args:
            variant: The variant to try.
            heldout: Text that the variant's vocabulary has tokenized.
            calibration_pass: The text to choose channels by; None if all channels are kept.
            on_refit: Called with the refitted matrices of each layer.
            asked: Items that the variant is to answer, tokenized by its vocabulary.
        """
        self.variant = variant
        self.heldout = heldout
        self.calibration_pass = calibration_pass
        self.stream = Stream(heldout.windows)
        self.asked = asked
        self.kept: Kept = []
        """The kept channels, layer by layer."""
        self.refitted = 0
        """Number of refitted matrices that are used."""
        self.trained = 0
        """Number of FFNs whose training is used."""
        self._rates: Sequence[float] = RATES
        self._prefix: PrunedPrefix | None = None
        if calibration_pass and variant.repair:
            streams = calibration_pass.streams
            self._prefix = PrunedPrefix(streams, collects=variant.reconstruct)
        self.watch = Stopwatch()
        """Seconds of "trial" in all layers, and of "heldout" and "tasks" among them."""
        self._on_refit = on_refit
        self._groups = LayerGroups(variant.layers)

    @property
    def streams(self) -> list[Stream]:
        """All streams that the trial runs itself."""
        return [*self.scored.values(), *(self._prefix.streams if self._prefix else [])]

    @property
    def scored(self) -> dict[str, Stream]:
        """The streams whose predictions count, by what ``watch`` calls them."""
        return {"heldout": self.stream} | ({"tasks": self.asked.stream} if self.asked else {})

    @property
    def own_seconds(self) -> float:
        """Seconds of all but the held-out text and the tasks: of choosing and refitting."""
        taken = self.watch.seconds
        return taken.get("trial", 0.0) - taken.get("heldout", 0.0) - taken.get("tasks", 0.0)

    def run(self, decoder: StreamedDecoder, index: int) -> None:
        """Run the text through the variant's version of a layer."""
        if not self.variant.layers or [index] in self.variant.layers:
            experts = self._kept_experts(decoder, index)
            weights = self._pruned_weights(decoder, index, experts)
            silent = index in self.variant.without_attention
            layer = decoder.layer(index)
            block = without_attention(decoder.layout, index, layer) if silent else nullcontext()
            with block, self._without_experts(decoder, index, experts):
                self.run_scored(decoder, index, weights)
                if self._prefix is not None:
                    self._prefix.advance(decoder, index, weights)
            return
        with self.watch.timed("heldout"):
            self._groups.run(decoder, index, *self.scored.values())

    def run_scored(
        self, decoder: StreamedDecoder, index: int, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Run what is scored through a layer whose ``weights`` replace its own."""
        for name, stream in self.scored.items():
            with self.watch.timed(name):
                decoder.run(index, stream, weights=weights)

    def _kept_experts(self, decoder: StreamedDecoder, index: int) -> np.ndarray | None:
        """Return the experts of a layer that the variant keeps; None where it keeps all."""
        choice, layout = self.variant.experts, decoder.layout
        if choice is None or EXPERT not in layout.ffn_outputs[index]:
            return None
        kept = choice.kept.get(index)
        if kept is None:
            assert self.calibration_pass is not None
            sums = self.calibration_pass.sums[EXPERT]
            weights = self.calibration_pass.weights(self.variant.ids.new_size)
            importance = expert_importance(choice.criterion, sums, weights, layout.experts, index)
            kept = choose_experts(importance, choice.count, choice.groups)
        return kept

    @staticmethod
    def _without_experts(
        decoder: StreamedDecoder, index: int, kept: np.ndarray | None
    ) -> AbstractContextManager[None]:
        """Keep the layer's router from the experts that are not kept."""
        if kept is None:
            return nullcontext()
        removed = torch.from_numpy(np.setdiff1d(np.arange(decoder.layout.experts), kept))
        return masked_router(decoder.layer(index), decoder.routers(index), removed)

    def _pruned_weights(
        self, decoder: StreamedDecoder, index: int, experts: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        """Return parameters of the kept channels, down_proj refitted if asked and if that helps.

        ``experts`` are the kept ones; None is all.
        """
        if self.calibration_pass is None:
            return {}
        chosen = self._choose(self.calibration_pass, decoder.layout, index)
        layer, found = decoder.layer(index), dict[str, torch.Tensor]()
        refitted: dict[ExpertKey, torch.Tensor] = {}
        others: dict[str, torch.Tensor] = {}
        for ffn_module in decoder.ffn_modules(index):
            if ffn_module.axis in chosen:
                if self.variant.repair:
                    kept = dict(enumerate(chosen[ffn_module.axis]))
                    if ffn_module.routed and experts is not None:
                        kept = {expert: kept[expert] for expert in experts.tolist()}
                    refitted |= self._refit(decoder, index, ffn_module, self.calibration_pass, kept)
                dims = decoder.channel_dims(index, ffn_module.axis)
                made = pruned_parameters(layer, ffn_module, dims, chosen[ffn_module.axis], refitted)
                trained = self._train(decoder, index, ffn_module, made)
                found |= made | {name: t.to(made[name].dtype) for name, t in trained.items()}
                names = decoder.channel_tensors(index, ffn_module.axis) if trained else {}
                for parameter, tensor in trained.items():
                    if parameter == down_name(ffn_module):
                        refitted[ffn_module.axis, 0] = tensor
                    else:
                        others[names[parameter]] = tensor
        self._on_refit(index, refitted, others)
        return found

    def _train(
        self,
        decoder: StreamedDecoder,
        index: int,
        ffn_module: FfnModule,
        weights: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Return what training makes of ``weights``; empty if it does not help or is not asked for.

        It is for FFNs that are modules of their own, with linear maps that are apart.
        """
        prefix = self._prefix if has_one_ffn(decoder.ffn_modules(index)) else None
        dims = decoder.channel_dims(index, ffn_module.axis)
        if prefix is None or not prefix.examples or weights.keys() != dims.keys():
            return {}
        dtype = down_dtype(decoder.layout, index, ffn_module.axis)
        layer, examples = decoder.layer(index), prefix.examples
        made = reconstruct(layer, ffn_module, weights, examples, dtype, self._rates)
        prefix.examples = []
        if made is None:
            return {}
        self.trained += 1
        self._rates = (made.rate,)
        return made.weights

    def _refit(
        self,
        decoder: StreamedDecoder,
        index: int,
        ffn_module: FfnModule,
        calibration_pass: CalibrationPass,
        kept: Mapping[int, np.ndarray],
    ) -> dict[ExpertKey, torch.Tensor]:
        """Return the refitted matrices ``[D, K]`` of a module; empty if refitting helps none.

        ``kept`` has the kept channels of each expert that is kept. It is fitted to the tokens that
        the dense model routes to it.
        """
        layer, helped = decoder.layer(index), 0
        found: dict[ExpertKey, torch.Tensor] = {}
        prefix = self._prefix if has_one_ffn(decoder.ffn_modules(index)) else None
        dtype = down_dtype(decoder.layout, index, ffn_module.axis)
        weight = layer.get_parameter(down_name(ffn_module)).data
        matrices = down_matrices(layer, ffn_module, weight)
        for expert in kept:
            key, matrix = (ffn_module.axis, expert), matrices[expert]
            columns = torch.from_numpy(kept[expert]).to(matrix.device)
            grams = [grams[key] for grams in calibration_pass.grams if key in grams]
            if prefix is not None:
                better = prefix.refit(decoder, index, ffn_module, columns, dtype)
            else:
                better = refit_if_better(matrix, columns, grams, dtype) if grams else None
            helped += better is not None
            found[key] = matrix[:, columns].to(dtype) if better is None else better
        self.refitted += helped
        return found if helped else {}

    def _choose(
        self, calibration_pass: CalibrationPass, layout: Layout, index: int
    ) -> dict[str, list[np.ndarray]]:
        """Return the kept channels of each axis from which channels are removed."""
        variant = self.variant
        if variant.kept is None:
            weights = calibration_pass.weights(variant.ids.new_size)
            chosen = choose_layer(
                calibration_pass.sums,
                weights,
                variant.lengths,
                variant.criterion,
                variant.blocks,
                index,
            )
        else:
            chosen = dict(variant.kept[index])
        self.kept.append(chosen)
        return {
            axis: kept for axis, kept in chosen.items() if len(kept[0]) < layout.channels_of(axis)
        }


def try_all(
    layout: Layout,
    trials: Sequence[Trial],
    settings: PassSettings,
    progress: Advance = no_advance,
) -> list[list[float]]:
    """Run all trials and their calibration passes through the model, reading it once.

    A calibration pass holds the statistics of one layer at a time, for the trials that use it.
    Hidden states are in files if the settings name a directory for them, else in memory.

    Returns:
        Per trial, the bits of each held-out text. Of the items that trials are asked, the bits have
        been counted.
    """
    passes = list(
        {
            id(t.calibration_pass): t.calibration_pass
            for t in trials
            if t.calibration_pass is not None
        }.values()
    )
    streams = [stream for calibration_pass in passes for stream in calibration_pass.streams]
    streams += [stream for trial in trials for stream in trial.streams]
    with ExitStack() as stack:
        reader = stack.enter_context(
            WeightReader(layout.checkpoint, settings.device, settings.dtype)
        )
        stack.enter_context(spilled(streams, settings.spill))
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed(streams)
        for index in decoder.layers():
            for calibration_pass in [*passes, None]:
                if calibration_pass is not None:
                    with calibration_pass.watch.timed("calibrate"):
                        calibration_pass.measure(decoder, index)
                for trial in (t for t in trials if t.calibration_pass is calibration_pass):
                    with trial.watch.timed("trial"):
                        trial.run(decoder, index)
                    progress(len(trial.heldout.counts))
                if calibration_pass is not None:
                    calibration_pass.forget()
        scored = [predictions_of(trial.stream, trial.variant.ids.kept) for trial in trials]
        asked = [each for trial in trials if trial.asked for each in trial.asked.predictions()]
        count_bits(decoder, [*asked, *(each for found in scored for each in found.values())])
    return [
        trial.heldout.by_text(each.bits() for _, each in sorted(found.items()))
        for trial, found in zip(trials, scored, strict=True)
    ]


def down_dtype(layout: Layout, index: int, axis: str) -> torch.dtype:
    """Return the file's dtype of a layer's down_proj; bf16 for FP8, which is dequantized."""
    for ref in layout.of_layer[index].values():
        slot = layout.roles[ref.name].slot
        if slot.ffn_output and slot.width == axis:
            return TORCH_DTYPE.get(ref.dtype, torch.bfloat16)
    raise KeyError(axis)
