"""Checks of an output by its files alone: tensors, sizes, ids, bytes and the tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.companions import pruned_config
from surgery.apply.edits import OutputTensor, check_source, edits, sources
from surgery.apply.shard import edit_windows
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import PlanError, printable
from surgery.files.safetensors_header import TensorRef
from surgery.files.shard_file import Buffer, ShardFile
from surgery.files.strict_json import open_regular
from surgery.hub.fetch import resolve_model, source_at_hand
from surgery.hub.shards import Shards
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.plan import PROVENANCE_NAME, Plan
from surgery.plot import html_table
from surgery.tokenizer.tokenizer_file import load_tokenizers, tokenizer_data
from surgery.verify.engines import EngineNote, engine_notes, engine_table, facts_of
from surgery.verify.ids import Origin, id_faults

SAMPLES = (
    "The quick brown fox jumps over the lazy dog; 12,345.67 times in 2024!\n\n\tIndented\r\n",
    "def area(radius):\n    return 3.14159 * radius ** 2  # πr²\n",
    "Ünïcödé, 中文, العربية, हिन्दी, 한국어, 🙂👩‍👩‍👧, e\u0301 \u200b\u202e.",
)
"""Texts that the output's tokenizer must decode to the same text as its source's."""

MOST_FAULTS = 20
"""Most faults that one check lists."""


@dataclass
class VerifyReport:
    """The checks that were made, in order, and the faults they found."""

    checks: dict[str, list[str]] = field(default_factory=dict)
    """Check → its faults; none where it passed."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Check → why it could not be made."""
    details: dict[str, str] = field(default_factory=dict)
    """Check → what was measured, where that is a number."""
    engines: list[EngineNote] = field(default_factory=list)
    """Known constraints of engines that the checkpoint breaks; these are no faults."""

    @property
    def ok(self) -> bool:
        """Whether no check found a fault."""
        return not any(self.checks.values())

    def table(self, *, engines: bool = False) -> str:
        """Return the report as text for people, with the result on the last line.

        Args:
            engines: Whether to show also what engines do with sizes that the plan did not change.
        """
        details = {name: f": {text}" for name, text in self.details.items()}
        passed = [name for name, faults in self.checks.items() if not faults]
        rows = [f"ok       {name}{details.get(name, '')}" for name in passed]
        rows += [f"skipped  {name}: {why}" for name, why in self.skipped.items()]
        rows += [f"FAULT    {n}: {fault}" for n, faults in self.checks.items() for fault in faults]
        rows += [text] if (text := engine_table(self.engines, every=engines)) else []
        return "\n".join([*rows, self.result()])

    def _repr_html_(self) -> str:
        rows = [
            (name, "FAULT" if faults else "ok", "; ".join(faults) or self.details.get(name, ""))
            for name, faults in self.checks.items()
        ]
        rows += [(name, "skipped", why) for name, why in self.skipped.items()]
        return html_table(self.result(), ("check", "result", ""), rows)

    def result(self) -> str:
        """Return how many checks passed, or found faults, and were skipped, on one line."""
        bad, total = sum(map(bool, self.checks.values())), len(self.checks)
        said = f"ok: {total} checks passed" if self.ok else f"FAULT: {bad} of {total} checks failed"
        return said + (f", {len(self.skipped)} skipped" if self.skipped else "")


PLAN_START = b'{\n  "source":'
"""What every plan's file begins with, whatever its name."""


def origin_of(
    directory: Path, plan: Plan | Path | str | None = None, source: Path | str | None = None
) -> tuple[Plan | None, Path | None]:
    """Return the plan that an output was made by, and the directory of its source.

    Each is None where it is not known. A source that is not given is looked for where the plan's
    file says. The plan within the output may be anybody's, so no path and no hub id is followed
    that only it names.

    Args:
        directory: The output.
        plan: The plan, or its file; None looks for the file beside the output, then within.
        source: Directory or hub id of the source.

    Raises:
        PlanError: the plan is damaged.
        CheckpointError: there is no model ``source``.
    """
    found = Plan.load(plan) if isinstance(plan, str | Path) else plan
    found = found or _plan_beside(directory)
    if source is not None:
        return found or plan_within(directory), resolve_model(str(source))[0]
    if found is None:
        return plan_within(directory), None
    return found, source_at_hand(found.source)


def plan_at(path: Path | str) -> Plan:
    """Return the plan in a file, or the one within an output's directory.

    Raises:
        PlanError: there is none.
    """
    path = Path(path)
    found = plan_within(path) if path.is_dir() else Plan.load(path)
    if found is None:
        raise PlanError(
            path,
            "holds no plan, so it is no output of apply",
            fix="name the directory of an output, or the file of a plan",
        )
    return found


def plan_and_source(
    plan: Plan | Path | str, source: Path | str | None = None
) -> tuple[Plan, Layout]:
    """Return a plan, and the model that it was made for.

    Args:
        plan: A plan, its file, or the directory of an output that was made by it.
        source: Directory or hub id of the model; None is where the plan's file says.

    Raises:
        PlanError: there is no plan, or its source is not at hand or is another model.
    """
    made = plan if isinstance(plan, Plan) else plan_at(plan)
    if not isinstance(plan, Plan) and Path(plan).is_dir():
        found, path = origin_of(Path(plan), None, source)
    else:
        found, path = origin_of(Path(), made, source)
    if found is None or path is None:
        raise PlanError(
            "plan" if isinstance(plan, Plan) else plan,
            "its source is not at hand",
            found=printable(made.source),
            fix="name it with `source`",
        )
    checkpoint = Checkpoint.open(path, found.family)
    check_source(found, checkpoint)
    return found, read_layout(checkpoint)


def _plan_beside(directory: Path) -> Plan | None:
    """Return the plan in a file beside the output that was made by it."""
    embedded = plan_within(directory)
    files = sorted(directory.absolute().parent.iterdir()) if embedded is not None else []
    plans = (plan for path in files if (plan := _plan_in(path)) is not None)
    return next((plan for plan in plans if embedded and plan.digest == embedded.digest), None)


def _plan_in(path: Path) -> Plan | None:
    """Return the plan in the file ``path``, or None if it is none."""
    try:
        with open_regular(path) as file:
            begins = file.read(len(PLAN_START)) == PLAN_START
        return Plan.load(path) if begins else None
    except (OSError, PlanError):
        return None


def plan_within(directory: Path) -> Plan | None:
    """Return the plan in an output's compact_surgery.json, or None where there is no such file."""
    path = directory / PROVENANCE_NAME
    return Plan.load(path) if path.exists() else None


SAME_CONFIG = "config.json is the source's with the plan's changes"
SAME_BYTES = "kept rows and channels are bit-identical"
SAME_TEXT = "tokenizer gives back text as the source does"


def verify_files(
    directory: Path,
    plan: Plan | None,
    source: Path | None,
    *,
    download: bool = True,
) -> VerifyReport:
    """Check the checkpoint in ``directory`` against ``plan`` and, where given, its source.

    Weights of a source on the hub are downloaded shard by shard, unless ``download`` is false.

    Raises:
        SurgeryError: ``directory`` is no checkpoint, or ``source`` is not the plan's.
    """
    family = plan.family if plan is not None else None
    checkpoint = Checkpoint.open(directory, family)
    layout = read_layout(checkpoint)
    origin = Origin(source, plan) if plan is not None and source is not None else None
    source_layout = read_layout(Checkpoint.open(origin.path, family)) if origin else None
    wanted = edits(origin.plan, source_layout) if origin and source_layout else None
    report = VerifyReport(engines=_engine_notes(layout, plan))
    report.checks["headers and config.json agree"] = []
    report.checks["ids in JSON files point at tokens"] = id_faults(layout, origin)[:MOST_FAULTS]
    if plan is None:
        report.skipped["sizes are the plan's"] = "no plan"
    else:
        report.checks["sizes are the plan's"] = _check_sizes(layout, plan)
    if origin is not None and source_layout is not None:
        expected = json.loads(pruned_config(origin.plan, source_layout.checkpoint))
        report.checks[SAME_CONFIG] = _differences(expected, checkpoint.config)
    if origin is None or wanted is None:
        reason = (
            "no plan"
            if plan is None
            else f"made from {printable(plan.source)}, which is not at hand; name it with `source`"
        )
        report.skipped |= {SAME_BYTES: reason, SAME_TEXT: reason}
        return report
    shards = Shards.of(origin.path)
    if shards.remote and not download:
        report.skipped[SAME_BYTES] = "the verify command downloads the weights for it again"
    else:
        report.checks[SAME_BYTES] = compare_bytes(wanted, checkpoint, shards)
    report.checks[SAME_TEXT] = _check_tokenizer(directory, origin.path, origin.plan)
    return report


def _engine_notes(layout: Layout, plan: Plan | None) -> list[EngineNote]:
    before = plan.before.vocab_size if plan is not None else None
    return engine_notes(facts_of(layout, before), plan)


def compare_bytes(
    by_shard: dict[str, list[OutputTensor]], output: Checkpoint, shards: Shards
) -> list[str]:
    """Stream every edit again and compare its bytes with ``output``; return the faults."""
    wanted = {tensor.name for shard in by_shard.values() for tensor in shard}
    unplanned = sorted(output.tensors.keys() - wanted)
    faults = [f"tensor {name} is not in the plan" for name in unplanned]
    steps = {name: sources(shard) for name, shard in by_shard.items() if shard}
    with shards:
        shards.expect(list(steps.values()))
        for name, needed in steps.items():
            with shards.lease(needed):
                faults += [
                    fault
                    for tensor in by_shard[name]
                    if (fault := _difference(tensor, output.tensors.get(tensor.name)))
                ]
    return faults


def _difference(tensor: OutputTensor, found: TensorRef | None) -> str | None:
    """Return the fault of the output's tensor, or None."""
    if found is None:
        return f"tensor {tensor.name} is missing"
    if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        expected, instead = (f"{each.dtype} {list(each.shape)}" for each in (tensor, found))
        return f"tensor {tensor.name}: expected {expected}, found {instead}"
    if not _same_bytes(tensor, found):
        return f"{found.path}: tensor {tensor.name} differs from the source's kept values"
    return None


def _same_bytes(tensor: OutputTensor, found: TensorRef) -> bool:
    offset, buffer = found.start, Buffer()
    source_path = tensor.edits[0].source.path
    with ShardFile(source_path) as source, ShardFile(found.path) as output:
        for edit in tensor.edits:
            for window in edit_windows(edit, source):
                data = output.window(offset, len(window), buffer)
                if not np.array_equal(data, np.frombuffer(window, np.uint8)):
                    return False
                offset += len(window)
    return True


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the keys of config.json that are not as apply makes them of the source's."""
    return [
        f"config.json: {key}: expected {expected.get(key)!r}, found {found.get(key)!r}"
        for key in sorted({*expected, *found})
        if expected.get(key) != found.get(key)
    ][:MOST_FAULTS]


def _check_sizes(layout: Layout, plan: Plan) -> list[str]:
    depth, after = layout.family.depth, plan.after
    found = {"vocab_size": layout.vocab_size, depth: layout.num_hidden_layers, **layout.widths}
    expected = {"vocab_size": after.vocab_size, depth: after.num_hidden_layers, **after.widths}
    if after.experts:
        found, expected = (
            {**sizes, "experts": count}
            for sizes, count in ((found, layout.experts), (expected, after.experts))
        )
    return [] if found == expected else [f"expected {expected}, found {found}"]


def _check_tokenizer(directory: Path, source: Path, plan: Plan) -> list[str]:
    """Encode and decode samples with both tokenizers, through the tokenizers library."""
    data = tokenizer_data(source)
    if not data:
        return []
    faults, unknown = list[str](), data["model"].get("unk_id")
    for old, new in zip(load_tokenizers(source), load_tokenizers(directory), strict=True):
        faults += _tokenizer_faults(old, new, plan, unknown)
    return faults[:MOST_FAULTS]


def _tokenizer_faults(old: Any, new: Any, plan: Plan, unknown: int | None) -> list[str]:
    """Compare the source's tokenizer with the output's.

    A text of which the output knows more is no fault: pieces without an id are left out.
    """
    ids, faults = plan.ids(), []
    for token, old_id in old.get_vocab().items():
        if (new_id := ids.new(old_id)) is not None and new.token_to_id(token) != new_id:
            faults.append(f"token {token!r}: expected id {new_id}, found {new.token_to_id(token)}")
    for text in SAMPLES:
        before, after = old.encode(text), new.encode(text)
        known = unknown is not None and before.ids.count(unknown) > after.ids.count(
            ids.new(unknown)
        )
        if not known and new.decode(after.ids) != old.decode(before.ids):
            faults.append(f"{text!r} decodes to {new.decode(after.ids)!r}")
        if np.max(after.ids, initial=0) >= plan.after.vocab_size:
            faults.append(f"{text!r} encodes to ids beyond the embedding")
    return faults
