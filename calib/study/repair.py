"""Repair a plan: refit down_proj to the kept channels, train FFNs, if held-out text confirms it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from calib.estimate import Prediction, WindowLengths, predict_repair
from calib.streaming.ffn import ExpertKey, down_proj_tensors, file_matrices
from calib.streaming.settings import ComputeOptions
from calib.streaming.weights import TORCH_DTYPE, raw
from calib.study.reconstruction import EPOCHS
from calib.study.study import Study, open_study
from calib.study.trial import ExpertChoice, RefitHook, Trial, Variant
from surgery.apply.edits import KeptParts, kept_parts, layer_groups
from surgery.apply.model_card import LEAST_SQUARES, RECONSTRUCTION
from surgery.errors import BudgetError, PlanError
from surgery.families.schema import FFN, WIDE, Dim
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.plan import Plan
from surgery.planning.replacement import Entry, ReplacementWriter, replacement_file
from surgery.planning.shapes import axis_lengths, output_dtype, output_shape
from surgery.planning.sizes import Sizes
from surgery.process import Advance, Progress, no_advance, peak_rss_bytes, stage
from surgery.stats.channels import RANDOM
from surgery.text.documents import TextOptions

LOG = logging.getLogger(__name__)

JUDGE_WINDOWS = 8
"""Most windows of held-out text that judge a repair.

They run through the model twice. Their bits differ by far more than chance where a repair helps:
on SmolLM2-135M (V' 24,960, I' 896) by 9 %.
"""


def open_repair(
    layout: Layout, choice: SizeChoice, text: TextOptions, compute: ComputeOptions
) -> Study:
    """Return the study of a repair: the text to refit on, and held-out text that judges it.

    Raises:
        SurgeryError: as ``open_study``.
    """
    text = replace(text, windows=min(text.windows, JUDGE_WINDOWS))
    return open_study(layout, choice, text, compute)


def repair_plan(
    plan: Plan,
    study: Study,
    plan_path: Path,
    progress: Progress | None = None,
    *,
    trains: bool = False,
) -> Plan:
    """Refit the kept columns of each down_proj; write them to a file beside ``plan_path``.

    ``trains`` says whether FFNs are then trained.

    Raises:
        BudgetError: the plan collapses layers.
        PlanError: as ``repair``.
    """
    if any(len(group) > 1 for group in plan.layers):
        raise BudgetError(
            "`repair`",
            "does not work with collapsed layers: no text has passed them",
            fix="leave it out, or remove layers instead of collapsing them",
        )
    if plan.after.widths == plan.before.widths:
        LOG.info("note: `repair` has nothing to do: the plan removes no channel")
        return plan
    path = replacement_file(plan_path)
    predicted = repair_cost(plan, study, trains=trains).peak_memory
    LOG.info("repair: about %s MB of memory", f"{predicted / 1e6:,.0f}")
    made = repair(
        plan,
        study,
        path,
        stage(progress, "repair", 2 * len(study.text.heldout) * plan.before.num_hidden_layers),
        trains=trains,
    )
    if (peak := peak_rss_bytes()) is not None:
        LOG.info("repair: %s MB at its peak", f"{peak / 1e6:,.0f}")
    return made


def repair(
    plan: Plan,
    study: Study,
    path: Path,
    progress: Advance = no_advance,
    *,
    trains: bool = False,
) -> Plan:
    """Refit the down_projs of ``plan`` in one pass; return the plan that uses them.

    A matrix is used if it lowers the error of its output on windows that it was not fitted by. The
    plan uses these matrices if together they lower the bits of held-out text. Otherwise it notes
    that they do not help.

    Args:
        plan: A complete plan for the model of ``study``, without collapsed layers.
        study: Text to fit by and to judge by, and compute settings.
        path: File to write the matrices to.
        progress: Called with windows that have passed a layer.
        trains: Whether FFNs are then trained.

    Raises:
        PlanError: the plan keeps weights in FP8, which cannot hold refitted ones.
    """
    text = study.text
    layout, vocab_size = text.layout, plan.after.vocab_size
    parts = parts_by_source(plan, layout)
    plain = plain_variant(plan, layout, parts)
    calibration_pass = text.calibration_pass(vocab_size, refits=True, chooses=False)
    encoded = text.encoded(vocab_size)
    entries = _entries(plan, layout, trains=trains)
    with ReplacementWriter(path, entries) as writer:
        write = refit_hook(layout, parts, entries, writer)
        repaired = replace(plain, repair=True, reconstruct=trains)
        trials = [
            Trial(plain, encoded, calibration_pass),
            Trial(repaired, encoded, calibration_pass, write),
        ]
        bits = study.bits(trials, progress)
        before, after = map(sum, bits)
        if after >= before:
            writer.discard()
    nbytes = sum(len(window.encode("utf-8")) for window in text.heldout)
    change = f"{before / nbytes:.4f} bits per byte of held-out text, {after / nbytes:.4f} repaired"
    made = writer.replacement(f"{RECONSTRUCTION if trains else LEAST_SQUARES}: {change}")
    refitted = f"matrices refitted by {LEAST_SQUARES}: {trials[1].refitted}"
    if trains:
        refitted += f", FFNs trained: {trials[1].trained}"
    note = f"{refitted}; {change}" if made else f"not repaired, for it does not help: {change}"
    provenance = msgspec.structs.replace(plan.provenance, notes=[*plan.provenance.notes, note])
    return msgspec.structs.replace(plan, replaced=made, provenance=provenance)


Parts = Mapping[int, KeptParts]
"""The source's layer → what is kept of it, in the order of the output's layers."""


def parts_by_source(plan: Plan, layout: Layout) -> Parts:
    """Return what a plan keeps, by layers of the source."""
    sources = [group[0] for group in layer_groups(plan, layout)]
    return dict(zip(sources, kept_parts(plan, layout), strict=True))


def plain_variant(plan: Plan, layout: Layout, parts: Parts) -> Variant:
    """Return what a plan makes of the model, without a repair."""
    channels = {
        source: {axis: part.of_source(axis, layout.experts) for axis in part.channels}
        for source, part in parts.items()
    }
    choice = None
    if plan.kept_experts:
        kept = {source: part.experts for source, part in parts.items() if len(part.experts)}
        choice = ExpertChoice(RANDOM, plan.after.experts, 1, kept)  # chosen already
    lengths = axis_lengths(layout, plan.after.widths)
    return Variant(plan.ids(), lengths, kept=channels, layers=plan.layers, experts=choice)


def _entries(plan: Plan, layout: Layout, *, trains: bool = False) -> list[Entry]:
    """Return name, dtype and shape of every down_proj of the output.

    With ``trains``, also of the other tensors that carry channels of a dense FFN.
    """
    experts = plan.after.experts if plan.kept_experts else 0
    sizes = Sizes(plan.after.vocab_size, plan.after.widths, plan.dequantize, experts=experts)
    found = []
    for number, (source, part) in enumerate(parts_by_source(plan, layout).items()):
        for name in [*down_proj_tensors(layout, source), *trained_tensors(layout, source, trains)]:
            ref, role = layout.checkpoint.tensors[name], layout.roles[name]
            if not part.keeps(role):
                continue
            dtype = output_dtype(layout, ref, sizes)
            if dtype not in TORCH_DTYPE:
                raise PlanError(
                    f"`repair`: {name}",
                    "is kept in FP8, which cannot hold refitted weights",
                    fix="plan with `dequantize`, or without `repair`",
                )
            shape = output_shape(layout, ref, sizes)
            found.append((part.name_of(name, role, number), dtype, shape))
    return found


def trained_tensors(layout: Layout, index: int, trains: bool) -> list[str]:
    """Return the file's names of a layer's other tensors that are trained."""
    if not trains:
        return []
    names = [ref.name for ref in layout.of_layer[index].values()]
    done = down_proj_tensors(layout, index)
    slots = {name: layout.roles[name].slot for name in names if name not in done}
    return [name for name, slot in slots.items() if {Dim(FFN), Dim(WIDE)} & {*slot.dims}]


def repair_tokens(plan: Plan, study: Study, *, trains: bool = False) -> int:
    """Return the tokens that pass the layers in ``repair``, as often as they do.

    Text passes the dense model and the pruned one, and held-out text the pruned one without and
    with the repair. A step of training takes about three forwards.
    """
    windows, heldout = _windows(plan, study)
    again = 3 * EPOCHS * sum(map(len, windows)) if trains else 0
    return 2 * sum(map(len, [*windows, *heldout])) + again


def repair_cost(plan: Plan, study: Study, *, trains: bool = False) -> Prediction:
    """Predict the memory that ``repair`` takes."""
    windows, heldout = _windows(plan, study)
    # Of text in the pruned model, a layer's input and output are kept; training keeps an FFN's,
    # twice while they are joined.
    times = 7 if trains else 3
    states = WindowLengths.of([*windows] * times + [*heldout] * 2)
    layout, widths = study.text.layout, plan.after.widths
    return predict_repair(layout, widths, states, study.settings, trains=trains)


def _windows(plan: Plan, study: Study) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Return the windows of text and the held-out ones."""
    text, size = study.text, plan.after.vocab_size
    return text.calibration_pass(size).streams[0].windows, text.encoded(size).windows


def refit_hook(
    layout: Layout, parts: Parts, entries: Sequence[Entry], writer: ReplacementWriter
) -> RefitHook:
    """Return a hook that writes refitted matrices in the file's layout.

    Args:
        layout: The source.
        parts: What is kept of its layers.
        entries: Name, dtype and shape of the tensors that ``writer`` can write.
        writer: Writes the file.
    """
    numbers = {source: number for number, source in enumerate(parts)}
    shapes = {name: (dtype, shape) for name, dtype, shape in entries}

    def write(
        index: int,
        refitted: Mapping[ExpertKey, torch.Tensor],
        others: Mapping[str, torch.Tensor],
    ) -> None:
        part = parts[index]
        for name, tensor in others.items():
            writer.add(part.name_of(name, layout.roles[name], numbers[index]), raw(tensor))
        for name in down_proj_tensors(layout, index):
            role = layout.roles[name]
            if not part.keeps(role):
                continue
            written = part.name_of(name, role, numbers[index])
            dtype, shape = shapes[written]
            tensor = torch.zeros(shape, dtype=TORCH_DTYPE[dtype])
            views = file_matrices(layout, name, tensor, part.experts)
            if views.keys() <= refitted.keys():
                for key, view in views.items():
                    view.copy_(refitted[key])
                writer.add(written, raw(tensor))

    return write
