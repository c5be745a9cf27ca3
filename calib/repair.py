"""A plan repaired: down_projs refitted to the channels that stay, where held-out text agrees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from calib.calibration import text_of
from calib.down import Place, file_matrices, watched_tensors
from calib.study import Study
from calib.trial import Cut, Trial
from calib.weights import TORCH_DTYPE, raw
from surgery.budget import Sizes
from surgery.edits import kept_channels, layer_groups
from surgery.errors import PlanError
from surgery.family import renumbered
from surgery.layout import Layout
from surgery.plan import Plan
from surgery.predict import axis_lengths, cut_shape, output_dtype
from surgery.prediction import Prediction, Settings
from surgery.repair_cost import predict_repair
from surgery.replacement_file import Entry, ReplacementWriter

WHAT = "least squares"


def repair(
    plan: Plan,
    study: Study,
    path: Path,
    *,
    progress: Callable[[int], object] = lambda windows: None,
) -> Plan:
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
    material = study.material
    layout, sizes = material.layout, plan.after.vocab_size
    lengths = axis_lengths(layout, plan.after.widths)
    sources = [group[0] for group in layer_groups(plan, layout)]
    kept = dict(zip(sources, kept_channels(plan, layout), strict=True))
    plain = Cut(plan.ids(), lengths, kept=kept, layers=plan.layers)
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
        for name in watched_tensors(layout, group[0]):
            ref = layout.checkpoint.tensors[name]
            dtype = output_dtype(layout, ref, sizes)
            if dtype not in TORCH_DTYPE:
                raise PlanError(
                    f"`repair`: {name}",
                    "stays in FP8, which refitted weights do not fit into",
                    fix="plan with `dequantize`, or without `repair`",
                )
            found.append((renumbered(name, number), dtype, cut_shape(layout, ref, sizes)))
    return found


def repair_cost(plan: Plan, study: Study) -> Prediction:
    """Predict what ``repair`` takes."""
    material, size = study.material, plan.after.vocab_size
    windows = material.reading(size).streams[0].windows
    every = [*windows, *windows, *material.encoded(size).windows, *material.encoded(size).windows]
    settings = Settings(
        itemsize=study.dtype.itemsize,
        buckets=1,
        device=study.device.type,
        hidden="file" if study.spill else "memory",
        journal=False,
    )
    return predict_repair(material.layout, plan.after.widths, text_of(every), settings)


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

    def write(self, index: int, refitted: Mapping[Place, torch.Tensor]) -> None:
        """Write the tensors of a layer that have been refitted."""
        for name in watched_tensors(self._layout, index):
            written = renumbered(name, self._numbers[index])
            dtype, shape = self._entries[written]
            tensor = torch.zeros(shape, dtype=TORCH_DTYPE[dtype])
            views = file_matrices(self._layout, name, tensor)
            if views.keys() <= refitted.keys():
                for place, view in views.items():
                    view.copy_(refitted[place])
                self._writer.add(written, raw(tensor))
