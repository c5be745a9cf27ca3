"""A plan repaired: down_projs refitted to the channels that stay, where held-out text agrees."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from calib.estimate import Prediction, WindowLengths, predict_repair
from calib.streaming.ffn import ExpertKey, down_proj_tensors, file_matrices
from calib.streaming.weights import TORCH_DTYPE, raw
from calib.study.study import Study
from calib.study.trial import Trial, Variant
from surgery.apply.edits import kept_channels, layer_groups
from surgery.errors import BudgetError, PlanError
from surgery.families.schema import renumbered
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.replacement import Entry, ReplacementWriter
from surgery.planning.shapes import axis_lengths, output_dtype, output_shape
from surgery.planning.sizes import Sizes
from surgery.process import Advance, Progress, no_advance, peak_rss_bytes, stage

LOG = logging.getLogger(__name__)

WHAT = "least squares"


def repair_plan(
    plan: Plan, study: Study, plan_path: Path, progress: Progress | None = None
) -> Plan:
    """Refit what ``plan`` leaves of each down_proj into a file beside ``plan_path``.

    Raises:
        BudgetError: it collapses layers.
        PlanError: as ``repair``.
    """
    if any(len(group) > 1 for group in plan.layers):
        raise BudgetError(
            "`repair`",
            "does not go with collapsed layers: no text has passed them",
            fix="leave it out, or let layers go instead",
        )
    if plan.after.widths == plan.before.widths:
        return plan
    path = plan_path.with_name(plan_path.name.removesuffix(".json") + ".repair.safetensors")
    predicted = repair_cost(plan, study).peak_memory
    LOG.info("repair: about %s MB of memory", f"{predicted / 1e6:,.0f}")
    made = repair(plan, study, path, stage(progress, "repair", study.windows(2)))
    if (peak := peak_rss_bytes()) is not None:
        LOG.info("repair: %s MB at its peak", f"{peak / 1e6:,.0f}")
    return made


def repair(plan: Plan, study: Study, path: Path, progress: Advance = no_advance) -> Plan:
    """Refit the down_projs of ``plan`` in one pass; return the plan that uses them.

    A matrix is used if it lowers the error of its output on windows that did not fit it, all of
    them if they lower the bits of held-out text; else the plan says that they did not.

    Args:
        plan: A complete plan for the model of ``study``, of which no layers are collapsed.
        study: Text to fit by and to judge by, and where to compute.
        path: File that the matrices are written to.
        progress: Called with windows that have passed a layer.

    Raises:
        PlanError: its weights stay in FP8, which refitted ones do not fit into.
    """
    material = study.text
    layout, sizes = material.layout, plan.after.vocab_size
    lengths = axis_lengths(layout, plan.after.widths)
    sources = [group[0] for group in layer_groups(plan, layout)]
    kept = dict(zip(sources, kept_channels(plan, layout), strict=True))
    plain = Variant(plan.ids(), lengths, kept=kept, layers=plan.layers)
    reading = material.reading(sizes, refits=True)
    encoded = material.encoded(sizes)
    entries = _entries(plan, layout)
    with ReplacementWriter(path, entries) as writer:
        sink = _Sink(layout, sources, entries, writer)
        trials = [
            Trial(plain, encoded, reading),
            Trial(replace(plain, repair=True), encoded, reading, sink.write),
        ]
        bits = study.bits(trials, progress)
        before, after = (float(sum(window.sum() for window in each)) for each in bits)
        if after >= before:
            writer.discard()
    nbytes = sum(len(text.encode("utf-8")) for text in material.heldout)
    change = f"{before / nbytes:.4f} bits per byte of held-out text, {after / nbytes:.4f} repaired"
    made = writer.replacement(f"{WHAT}: {change}")
    refitted = f"{trials[1].refitted} matrices refitted by {WHAT}"
    note = f"{refitted}: {change}" if made else f"not repaired, for it does not help: {change}"
    provenance = msgspec.structs.replace(plan.provenance, notes=[*plan.provenance.notes, note])
    return msgspec.structs.replace(plan, replaced=made, provenance=provenance)


def _entries(plan: Plan, layout: Layout) -> list[Entry]:
    """Every down_proj of the output."""
    sizes = Sizes(plan.after.vocab_size, plan.after.widths, plan.dequantize)
    found = []
    for number, group in enumerate(layer_groups(plan, layout)):
        for name in down_proj_tensors(layout, group[0]):
            ref = layout.checkpoint.tensors[name]
            dtype = output_dtype(layout, ref, sizes)
            if dtype not in TORCH_DTYPE:
                raise PlanError(
                    f"`repair`: {name}",
                    "stays in FP8, which refitted weights do not fit into",
                    fix="plan with `dequantize`, or without `repair`",
                )
            found.append((renumbered(name, number), dtype, output_shape(layout, ref, sizes)))
    return found


def repair_cost(plan: Plan, study: Study) -> Prediction:
    """Predict what ``repair`` takes."""
    material, size = study.text, plan.after.vocab_size
    windows = material.reading(size).streams[0].windows
    every = [*windows, *windows, *material.encoded(size).windows, *material.encoded(size).windows]
    lengths = WindowLengths.of(every)
    return predict_repair(material.layout, plan.after.widths, lengths, study.settings)


class _Sink:
    """Writes refitted matrices as the file lays them out."""

    def __init__(
        self,
        layout: Layout,
        sources: Sequence[int],
        entries: Sequence[Entry],
        writer: ReplacementWriter,
    ) -> None:
        self._layout = layout
        self._numbers = {source: number for number, source in enumerate(sources)}
        self._entries = {name: (dtype, shape) for name, dtype, shape in entries}
        self._writer = writer

    def write(self, index: int, refitted: Mapping[ExpertKey, torch.Tensor]) -> None:
        """Write the tensors of a layer that have been refitted."""
        for name in down_proj_tensors(self._layout, index):
            written = renumbered(name, self._numbers[index])
            dtype, shape = self._entries[written]
            tensor = torch.zeros(shape, dtype=TORCH_DTYPE[dtype])
            views = file_matrices(self._layout, name, tensor)
            if views.keys() <= refitted.keys():
                for place, view in views.items():
                    view.copy_(refitted[place])
                self._writer.add(written, raw(tensor))
