"""Try candidates for a smaller model on one text, all in one pass, on the same held-out bytes."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from calib.scoring.answers import Answers
from calib.scoring.score import check_predicts, half_interval
from calib.scoring.shared_context import most_shared
from calib.scoring.tasks import AskedTasks, Task
from calib.statistics.prepare import check_channels
from calib.streaming.settings import ComputeOptions, PassSettings
from calib.streaming.weights import choose_settings
from calib.study.residual import NarrowTrial, ResidualStream, StreamCut, StreamSums, measure_stream
from calib.study.slicegpt import SlicedTrial, sliced_parameters
from calib.study.table import DENSE, Row
from calib.study.text import CalibrationPass, StudyText
from calib.study.trial import ExpertChoice, Trial, Variant, try_all
from calib.study.two_stage import attention_parameters
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.selection import kept_experts
from surgery.planning.serving import DECODE, MEMORY, served_bytes
from surgery.planning.shapes import axis_lengths, blocks, expert_groups, parameters_of
from surgery.planning.sizes import Sizes, whole
from surgery.process import Advance, Stopwatch, no_advance
from surgery.stats.channels import (
    DEFAULT_CRITERION,
    DEFAULT_EXPERT_CRITERION,
    RANDOM,
    Kept,
    needs_stats,
    too_few_tokens,
)
from surgery.text.documents import TextOptions

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """Sizes of a smaller model, and how its channels are chosen."""

    name: str
    sizes: Sizes
    criterion: str = DEFAULT_CRITERION
    retokenize: bool = True
    """Whether the pruned tokenizer tokenizes the calibration text, instead of the source's own."""
    repair: bool = False
    """Whether down_proj is refitted."""
    reconstruct: bool = False
    """Whether FFNs are then trained, too."""
    samples: int | None = None
    """Windows of calibration text; None is all of them."""
    influence: bool = False
    """Whether its text is to measure block influence, even if no channel is removed."""
    expert_criterion: str = DEFAULT_EXPERT_CRITERION
    """Importance of an expert, where experts are removed."""
    without_attention: frozenset[int] = frozenset()
    """Layers whose attention is removed (2SSP)."""
    slice_to: int = 0
    """Columns of the residual stream that SliceGPT keeps; 0 keeps all."""
    stream: StreamCut | None = None
    """What is kept of the residual stream; None is all."""

    def text(self, full: int) -> tuple[int, int | None]:
        """Return V of the vocabulary that tokenizes the calibration text, and ``samples``.

        ``full`` is the source's V.
        """
        return self.sizes.vocab_size if self.retokenize else full, self.samples


@dataclass(frozen=True)
class Took:
    """Seconds that a candidate takes, without those of reading weights and of the head."""

    text: tuple[int, int | None]
    """The text that chooses its channels; several candidates may share its pass."""
    calibrate: float
    """Of this pass; 0 where no text chooses."""
    own: float
    """Of choosing, refitting and training."""
    heldout: float
    """Of the held-out text."""


def _chooses(candidate: Candidate, layout: Layout) -> bool:
    """Whether a text chooses channels or experts of ``candidate``."""
    sizes = candidate.sizes
    by_text = bool(sizes.experts) and needs_stats(candidate.expert_criterion)
    return by_text or dict(sizes.widths) != dict(layout.widths)


def open_study(
    layout: Layout,
    choice: SizeChoice,
    text: TextOptions,
    compute: ComputeOptions,
    tasks: Sequence[Task] = (),
) -> "Study":
    """Hold out a part of a text, and choose device and dtype.

    ``tasks`` are for ``Study.answers``.

    Raises:
        FamilyError: the model predicts no token, by which candidates could be judged.
        BudgetError: the model has no channels to choose.
        DataError: the text is too short.
    """
    check_predicts(layout)
    check_channels(layout)
    study_text = StudyText.split(layout, choice, text)
    return Study(study_text, choose_settings(compute, layout.checkpoint), tasks)


@dataclass(eq=False)
class Study:
    """Tries candidates on one text and returns rows of a table."""

    text: StudyText
    settings: PassSettings
    tasks: Sequence[Task] = ()
    """Items that candidates answer."""
    _dense_row: Row | None = field(default=None, init=False)
    _told: bool = field(default=False, init=False)
    """Whether a log line has said that the text is short."""
    took: list[Took] = field(default_factory=list, init=False)
    """Of each candidate of the last ``rows``."""
    kept: dict[str, Kept] = field(default_factory=dict, init=False)
    """Name of a candidate → the channels that it kept, layer by layer, when it was last tried."""
    _stream_sums: StreamSums | None = field(default=None, init=False)
    _stream_watch: Stopwatch = field(default_factory=Stopwatch, init=False)
    """Seconds of measuring the stream; the weights are read in them, too."""
    block_influence: np.ndarray | None = field(default=None, init=False)
    """float64 ``[L]``, known once a candidate was tried on text that the source's own tokenizer
    tokenized."""
    influence_seconds: float = field(default=0.0, init=False)
    """What that pass took."""

    def rows(
        self,
        candidates: Sequence[Candidate],
        progress: Advance = no_advance,
        *,
        answers: Collection[str] = (),
    ) -> list[Row]:
        """Try ``candidates`` in one pass and compare each with the dense model.

        Those with a name in ``answers`` answer the tasks, and so does the dense model.
        """
        layout = self.text.layout
        dense = Candidate(DENSE, whole(layout))
        everything = [*candidates, *[dense] * self._needs_dense(answers=bool(answers))]
        passes = self._passes(everything)
        trials = [
            self._trial(
                candidate,
                passes.get(candidate.text(layout.vocab_size)),
                answers=candidate.name in answers or (candidate is dense and bool(answers)),
            )
            for candidate in everything
        ]
        bits = self.bits(trials, progress)
        self.took = [
            self._took(candidate, trial)
            for candidate, trial in zip(candidates, trials, strict=False)
        ]
        self._tell_short_text(passes)
        self.kept |= {c.name: t.kept for c, t in zip(candidates, trials, strict=False) if t.kept}
        if len(everything) > len(candidates):
            self._dense_row = self._row(dense, trials[-1], bits[-1], bits[-1])
        if (layout.vocab_size, None) in passes:
            dense_pass = passes[layout.vocab_size, None]
            self.block_influence = dense_pass.block_influence
            self.influence_seconds = dense_pass.watch.seconds.get("calibrate", 0.0)
        return [
            self._row(candidate, trial, found, self.dense.window_bits)
            for candidate, trial, found in zip(candidates, trials, bits, strict=False)
        ]

    @property
    def dense(self) -> Row:
        """The row of the dense model, which is tried with the first candidates."""
        assert self._dense_row is not None
        return self._dense_row

    def _took(self, candidate: Candidate, trial: Trial) -> Took:
        calibrate = 0.0
        by_text = candidate.influence or candidate.repair or candidate.criterion != RANDOM
        if trial.calibration_pass is not None and by_text:
            calibrate = trial.calibration_pass.watch.seconds.get("calibrate", 0.0)
        if candidate.stream is not None:
            calibrate = self._stream_watch.seconds["calibrate"]
        heldout = trial.watch.seconds.get("heldout", 0.0)
        text = candidate.text(self.text.layout.vocab_size)
        return Took(text, calibrate, trial.own_seconds, heldout)

    def bits(self, trials: Sequence[Trial], progress: Advance = no_advance) -> list[list[float]]:
        """Run ``trials`` as ``try_all`` does."""
        return try_all(self.text.layout, trials, self.settings, progress)

    def windows(self, candidates: int, *, answers: bool = False) -> int:
        """Return the windows × layers that ``rows`` reports for a number of candidates."""
        count = len(self.text.heldout) * self.text.layout.num_hidden_layers
        return count * (candidates + self._needs_dense(answers=answers))

    def _needs_dense(self, *, answers: bool) -> bool:
        """Whether the dense model is still to be tried."""
        return self._dense_row is None or (answers and self._dense_row.answers is None)

    def _passes(
        self, candidates: Sequence[Candidate]
    ) -> dict[tuple[int, int | None], CalibrationPass]:
        """Return one pass for each text that channels are chosen by."""
        layout, found = self.text.layout, {}
        by_text: dict[tuple[int, int | None], list[Candidate]] = {}
        for candidate in candidates:
            if candidate.influence or _chooses(candidate, layout):
                by_text.setdefault(candidate.text(layout.vocab_size), []).append(candidate)
        for text, users in by_text.items():
            edges = [r.sizes.vocab_size for r in users if not r.retokenize]
            refits = any(r.repair for r in users)
            found[text] = self.text.calibration_pass(*text, edges=edges, refits=refits)
        return found

    def _tell_short_text(self, passes: Mapping[tuple[int, int | None], CalibrationPass]) -> None:
        """Log once that all of the text is too little to rank channels."""
        for (_, samples), calibration_pass in passes.items():
            few = too_few_tokens(calibration_pass.tokens)
            if samples is None and few and not self._told:
                LOG.info("note: %s", few)
                self._told = True

    def _trial(
        self, candidate: Candidate, calibration_pass: CalibrationPass | None, *, answers: bool
    ) -> Trial:
        layout, sizes = self.text.layout, candidate.sizes
        by_key = blocks(layout)
        variant = Variant(
            self.text.ids(sizes.vocab_size),
            axis_lengths(layout, sizes.widths),
            candidate.criterion,
            {axis: by_key.get(width.key, 1) for axis, width in layout.family.widths.items()},
            candidate.repair,
            candidate.reconstruct,
            sizes.layers,
            experts=self._experts(candidate),
            without_attention=candidate.without_attention,
        )
        if not (candidate.influence or _chooses(candidate, layout)):
            calibration_pass = None
        asked = self.asked(sizes.vocab_size) if answers else None
        if candidate.slice_to:
            heldout, text = self.text.encoded(layout.vocab_size), self.calibration_windows()
            return SlicedTrial(variant, heldout, candidate.slice_to, text, asked)
        if candidate.stream is not None:
            heldout = self.text.encoded(layout.vocab_size)
            return NarrowTrial(variant, heldout, self._measured_stream(), candidate.stream, asked)
        return Trial(variant, self.text.encoded(sizes.vocab_size), calibration_pass, asked=asked)

    def calibration_windows(self) -> Sequence[np.ndarray]:
        """Return the calibration text, tokenized by the source's own tokenizer."""
        return self.text.calibration_pass(self.text.layout.vocab_size).streams[0].windows

    def _measured_stream(self) -> StreamSums:
        """Return what calibration text shows of the residual stream; measured once."""
        if self._stream_sums is None:
            stream = ResidualStream.of(self.text.layout)
            with self._stream_watch.timed("calibrate"):
                windows = self.calibration_windows()
                self._stream_sums = measure_stream(stream, windows, self.settings)
        return self._stream_sums

    def asked(self, vocab_size: int) -> AskedTasks:
        """Return the tasks, tokenized by the vocabulary of this size."""
        tokenizer, old_ids = self.text.tokenizer_of(vocab_size)
        kept = self.text.ids(vocab_size).kept
        return AskedTasks(
            self.text.layout, self.tasks, tokenizer, (old_ids, kept), self._most_shared
        )

    @cached_property
    def _most_shared(self) -> int:
        return most_shared(self.text.layout, self.settings)

    def _experts(self, candidate: Candidate) -> ExpertChoice | None:
        layout, sizes = self.text.layout, candidate.sizes
        if not sizes.experts:
            return None
        criterion = candidate.expert_criterion
        ids = self.text.ids(sizes.vocab_size)
        kept = kept_experts(layout, sizes, criterion, None, ids)  # empty if a text chooses
        return ExpertChoice(criterion, sizes.experts, expert_groups(layout), kept)

    def _row(
        self, candidate: Candidate, trial: Trial, bits: Sequence[float], dense: Sequence[float]
    ) -> Row:
        """Return a candidate's row, from the bits of each window and those of the dense model."""
        layout, sizes = self.text.layout, candidate.sizes
        nbytes = sum(len(text.encode("utf-8")) for text in self.text.heldout)
        other = candidate.slice_to or candidate.without_attention or candidate.stream
        parameters = parameters_of(layout, sizes)
        parameters -= sum(attention_parameters(layout, n) for n in candidate.without_attention)
        if candidate.slice_to:
            parameters = sliced_parameters(layout, candidate.slice_to)
        if candidate.stream is not None:
            parameters = candidate.stream.parameters
        answers: Answers | None = None
        if trial.asked is not None:
            answers = trial.asked.answers(f"{layout.checkpoint.path}: {candidate.name}")
        return Row(
            name=candidate.name,
            vocab_size=sizes.vocab_size,
            widths=dict(sizes.widths),
            num_hidden_layers=len(sizes.layers) or layout.num_hidden_layers,
            parameters=parameters,
            removed=1 - parameters / layout.parameters(layout.vocab_size, layout.widths),
            bits_per_byte=sum(bits) / nbytes,
            loss=sum(bits) / sum(dense) - 1,
            experts=sizes.experts or layout.experts,
            decoded_bytes=0 if other else served_bytes(layout, sizes, DECODE),
            memory_bytes=0 if other else served_bytes(layout, sizes, MEMORY),
            heldout_windows=len(self.text.heldout),
            heldout_bytes=nbytes,
            loss_margin=half_interval(bits, dense),
            window_bits=tuple(bits),
            answers=answers,
        )
