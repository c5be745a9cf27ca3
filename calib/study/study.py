"""Cuts of one model tried on one text, all of a pass together, on identical held-out bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from calib.statistics.prepare import check_channels
from calib.streaming.settings import ComputeOptions, PassSettings
from calib.streaming.weights import choose_settings
from calib.study.table import Row
from calib.study.text import CalibrationPass, StudyText
from calib.study.trial import Trial, Variant, try_all
from calib.text.heldout import Encoded
from surgery.layout.layout import Layout
from surgery.planning.request import SizeChoice
from surgery.planning.shapes import axis_lengths, blocks
from surgery.planning.sizes import Sizes, whole
from surgery.process import Advance, no_advance
from surgery.stats.channels import DEFAULT_CRITERION
from surgery.text.documents import TextOptions


@dataclass(frozen=True)
class Recipe:
    """A way to make the model smaller."""

    name: str
    sizes: Sizes
    criterion: str = DEFAULT_CRITERION
    retokenize: bool = True
    """Whether channels are chosen on text as the pruned tokenizer cuts it."""
    repair: bool = False
    """Whether down_proj is refitted."""
    samples: int | None = None
    """Windows of calibration text; None is all there are."""

    def text(self, full: int) -> tuple[int, int | None]:
        """Vocabulary that cuts the calibration text, of ``full`` if not its own, and windows."""
        return self.sizes.vocab_size if self.retokenize else full, self.samples


def open_study(
    layout: Layout, choice: SizeChoice, text: TextOptions, compute: ComputeOptions
) -> "Study":
    """Divide a text and choose where to compute.

    Raises:
        BudgetError: the model has no channels to choose.
        DataError: the text is too short.
    """
    check_channels(layout)
    material = StudyText.split(layout, choice, text)
    return Study(material, choose_settings(compute, layout.checkpoint))


@dataclass(eq=False)
class Study:
    """Recipes on their way to rows of a table."""

    text: StudyText
    settings: PassSettings
    _dense: tuple[Encoded, list[np.ndarray]] | None = field(default=None, init=False)
    block_influence: np.ndarray | None = field(default=None, init=False)
    """float64 ``[L]``, known once a recipe has been tried on text that the source's own tokenizer
    cut."""

    def rows(
        self,
        recipes: Sequence[Recipe],
        progress: Advance = no_advance,
    ) -> list[Row]:
        """Try ``recipes`` in one pass and compare each with the dense model."""
        layout = self.text.layout
        dense = Recipe("dense", whole(layout))
        everything = [*recipes] if self._dense else [*recipes, dense]
        readings = self._readings(everything)
        trials = [
            self._trial(recipe, readings.get(recipe.text(layout.vocab_size)))
            for recipe in everything
        ]
        bits = self.bits(trials, progress)
        if self._dense is None:
            self._dense = trials[-1].heldout, bits[-1]
        if (layout.vocab_size, None) in readings:
            self.block_influence = readings[layout.vocab_size, None].block_influence
        return [
            self._row(recipe, trial, found)
            for recipe, trial, found in zip(recipes, trials, bits, strict=False)
        ]

    def bits(
        self, trials: Sequence[Trial], progress: Advance = no_advance
    ) -> list[list[np.ndarray]]:
        """Carry ``trials`` through the model, as ``try_all``."""
        return try_all(self.text.layout, trials, self.settings, progress)

    def windows(self, recipes: int) -> int:
        """Windows × layers that ``rows`` reports for so many recipes."""
        count = len(self.text.heldout) * self.text.layout.num_hidden_layers
        return count * (recipes + (self._dense is None))

    def _readings(self, recipes: Sequence[Recipe]) -> dict[tuple[int, int | None], CalibrationPass]:
        """One for each text that channels are chosen by."""
        layout, found = self.text.layout, {}
        by_text: dict[tuple[int, int | None], list[Recipe]] = {}
        for recipe in recipes:
            if dict(recipe.sizes.widths) != dict(layout.widths):
                by_text.setdefault(recipe.text(layout.vocab_size), []).append(recipe)
        for text, users in by_text.items():
            edges = [r.sizes.vocab_size for r in users if not r.retokenize]
            refits = any(r.repair for r in users)
            found[text] = self.text.reading(*text, edges=edges, refits=refits)
        return found

    def _trial(self, recipe: Recipe, reading: CalibrationPass | None) -> Trial:
        layout, sizes = self.text.layout, recipe.sizes
        by_key = blocks(layout)
        cut = Variant(
            self.text.ids(sizes.vocab_size),
            axis_lengths(layout, sizes.widths),
            recipe.criterion,
            {axis: by_key.get(width.key, 1) for axis, width in layout.family.widths.items()},
            recipe.repair,
            sizes.layers,
        )
        if dict(sizes.widths) == dict(layout.widths):
            reading = None
        return Trial(cut, self.text.encoded(sizes.vocab_size), reading)

    def _row(self, recipe: Recipe, trial: Trial, found: Sequence[np.ndarray]) -> Row:
        assert self._dense is not None
        layout, sizes = self.text.layout, recipe.sizes
        encoded, dense = self._dense
        alike, alike_dense, alike_bytes = 0.0, 0.0, 0
        pairs = zip(trial.heldout.words, found, encoded.words, dense, strict=True)
        for words, bits, words_before, bits_before in pairs:
            same = words.alike(words_before)
            alike += float(words.bits(bits)[same].sum())
            alike_dense += float(words_before.bits(bits_before)[same].sum())
            alike_bytes += int(words.nbytes[same].sum())
        nbytes = sum(len(text.encode("utf-8")) for text in self.text.heldout)
        total, total_dense = (float(sum(map(np.sum, each))) for each in (found, dense))
        left = layout.with_layers(sizes.layers)
        parameters = left.parameters(sizes.vocab_size, sizes.widths)
        return Row(
            name=recipe.name,
            vocab_size=sizes.vocab_size,
            widths=dict(sizes.widths),
            num_hidden_layers=len(sizes.layers) or layout.num_hidden_layers,
            parameters=parameters,
            removed=1 - parameters / layout.parameters(layout.vocab_size, layout.widths),
            bits_per_byte=total / nbytes,
            loss=total / total_dense - 1,
            alike_loss=alike / alike_dense - 1 if alike_dense else 0.0,
            alike_share=alike_bytes / nbytes,
        )
