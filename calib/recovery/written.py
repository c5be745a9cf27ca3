"""The plan of a trained checkpoint, and its tensors as apply takes them."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch

from calib.streaming.weights import TORCH_DTYPE, raw
from surgery.api import plan_model
from surgery.errors import PlanError
from surgery.files.shard_file import Buffer, open_shard
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.replacement import Entry, ReplacementWriter
from surgery.planning.request import CutRequest, SizeRequest
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import origin_of, plan_within, verify_files


def plan_for(layout: Layout) -> tuple[Plan, Path]:
    """Return the plan that made a checkpoint, and the directory of its source.

    Where the source is not at hand, or the checkpoint was changed since, it is a plan that keeps
    all of the checkpoint, which then is the source.
    """
    directory = layout.checkpoint.path
    plan, source = origin_of(directory)
    if (
        plan is not None
        and source is not None
        and verify_files(directory, plan, source, download=False).ok
    ):
        return plan, source
    request = CutRequest(SizeRequest(vocab_size=layout.vocab_size))
    return plan_model(layout, request), directory


def kept_rows(student: Layout, teacher: Layout) -> np.ndarray:
    """Return the teacher's row of the vocabulary for each row of the student's, ascending.

    Raises:
        PlanError: the plan within the student was made for a model with another vocabulary, or a
            token has another id in the teacher.
    """
    plan = plan_within(student.checkpoint.path)
    rows = np.arange(student.vocab_size) if plan is None else plan.ids().kept
    before = student.vocab_size if plan is None else plan.before.vocab_size
    if teacher.vocab_size != before or len(rows) != student.vocab_size:
        raise PlanError(
            f"`teacher` {teacher.checkpoint.path}",
            "has another vocabulary than the model was pruned from",
            expected=f"{before:,} rows",
            found=f"{teacher.vocab_size:,}",
            fix="name the model that it was pruned from",
        )
    old, new = (load_tokenizer(each.checkpoint.path).get_vocab() for each in (teacher, student))
    for token, row in sorted(new.items(), key=lambda item: item[1]):
        if row < len(rows) and old.get(token) != rows[row]:
            raise PlanError(
                f"`teacher` {teacher.checkpoint.path}: token {token!r}",
                "has another id than in the model's source",
                expected=int(rows[row]),
                found=old.get(token),
                fix="name the model that it was pruned from, or one with the same tokenizer",
            )
    return rows


def trained_plan(
    plan: Plan,
    student: Layout,
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    what: str,
) -> Plan:
    """Write the tensors that training has changed to ``path``; return the plan that uses them.

    Args:
        plan: What makes the student of its source, from ``plan_for``.
        student: The checkpoint that was trained.
        tensors: Trained tensors by their names in its files; those it lacks are left out.
        path: File to write, in the student's dtypes.
        what: How they were trained.
    """
    refs, earlier = student.checkpoint.tensors, plan.replaced
    entries: list[Entry] = [(name, ref.dtype, ref.shape) for name, ref in refs.items()]
    replaced = frozenset(earlier.tensors if earlier else ())
    with ReplacementWriter(path, entries) as writer:
        for name, ref in refs.items():
            with (
                open_shard(ref.path, "read") as shard,
                shard.window(ref.start, ref.nbytes, Buffer()) as stored,
            ):
                data = _bytes(tensors.get(name), ref.dtype) or stored.data
                if name in replaced or data != stored.data:
                    writer.add(name, data)
    made = writer.replacement(what if earlier is None else f"{earlier.what}; then {what}")
    if made is None:  # no tensor has changed
        return plan
    made = msgspec.structs.replace(made, trained=True)
    notes = [*plan.provenance.notes, f"trained: {what}"]
    provenance = msgspec.structs.replace(plan.provenance, notes=notes)
    return msgspec.structs.replace(plan, replaced=made, provenance=provenance)


def _bytes(tensor: torch.Tensor | None, dtype: str) -> memoryview | None:
    """Return a tensor's bytes in a dtype of the files; None where it has none."""
    if tensor is None or dtype not in TORCH_DTYPE:
        return None
    return raw(tensor.detach().cpu().to(TORCH_DTYPE[dtype]).contiguous())
