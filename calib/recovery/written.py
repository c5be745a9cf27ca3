"""What a recovery makes: its figures, the plan of its checkpoint, and trained tensors for apply."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from calib.streaming.weights import TORCH_DTYPE, raw
from surgery.api import plan_model
from surgery.errors import PlanError
from surgery.files.shard_file import Buffer, ShardFile
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.replacement import Entry, ReplacementWriter
from surgery.planning.request import CutRequest, SizeRequest
from surgery.plot import saved_figure, titled
from surgery.process import spoken
from surgery.tokenizer.tokenizer_file import load_tokenizer
from surgery.verify.files import VerifyReport, origin_of, plan_within, verify_files


@dataclass(frozen=True)
class Recovered:
    """What a recovery made."""

    output: Path | None
    """The checkpoint; None where training did not help, so that none was written."""
    method: str
    before: float
    """Bits per byte of the held-out text, of the checkpoint that was trained."""
    after: float
    """Of the best state, in the checkpoint's dtype."""
    curve: tuple[tuple[int, float], ...]
    """Tokens trained on, and bits per byte of the held-out text after them."""
    seconds: float
    peak_rss_bytes: int | None
    writing_seconds: float = 0.0
    """In which the teacher wrote the text; a part of ``seconds``."""
    checks: VerifyReport | None = None
    """What verify says of the output."""

    @property
    def helped(self) -> bool:
        """Whether the best state needs fewer bits than the checkpoint that was trained."""
        return self.after < self.before

    @property
    def tokens(self) -> int:
        """Tokens that were trained on."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def best_tokens(self) -> int:
        """Tokens after which the best state was reached."""
        return min(self.curve, key=lambda point: point[1])[0] if self.curve else 0

    def facts(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        found = {key: value for key, value in asdict(self).items() if key != "checks"}
        return found | {"output": str(self.output) if self.output else None, "tokens": self.tokens}

    def table(self) -> str:
        """Return the bits as lines for people."""
        lines = [f"{'tokens':>12}{'bits per byte of held-out text':>34}"]
        lines += [f"{tokens:>12,}{bits:>34.4f}" for tokens, bits in ((0, self.before), *self.curve)]
        change = f"{self.after / self.before - 1:+.2%}"
        if self.output is None:
            lines.append(f"no better than before ({change}): nothing was written")
        else:
            lines.append(f"written: {self.after:.4f}, {change}, in {spoken(self.seconds)}")
        return "\n".join(lines)

    def plot(self, path: Path, model: str = "") -> None:
        """Draw bits against tokens to a picture (extra ``plot``)."""
        with saved_figure(path, 7, 4.2) as figure:
            axes = figure.subplots()
            points = ((0, self.before), *self.curve)
            axes.plot(*zip(*points, strict=True), marker="o", label=self.method)
            axes.axhline(self.before, linestyle=":", color="#000000", label="before")
            axes.set_xlabel("tokens trained on")
            axes.set_ylabel("bits per byte of held-out text")
            axes.set_title(titled(model, "trained back"))
            axes.grid(alpha=0.3)
            axes.legend()


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
            with ShardFile(ref.path) as shard:
                stored = shard.window(ref.start, ref.nbytes, Buffer())
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
