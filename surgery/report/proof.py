"""The proof in a report: the bill of a cut, and measured results from JSON files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from surgery.errors import DataError, did_you_mean, printable
from surgery.families.schema import EXPERTS, GROUPS, VOCAB
from surgery.files.strict_json import read_file
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.serving import serving_of
from surgery.planning.shapes import sizes_of
from surgery.planning.sizes import whole

CONTEXT = 8192
"""Tokens of the one text that the predicted memory for serving is for."""

AGAIN = "give a file that score, search or compare wrote with `as_json`"


@dataclass(frozen=True)
class BillRow:
    """A size before and after."""

    name: str
    before: int
    after: int

    @property
    def share(self) -> float:
        """Removed share."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Bill:
    """What a cut takes off."""

    parameters: list[BillRow]
    """By group of tensors; the last row is their sum."""
    by_axis: list[tuple[str, int]]
    """What was removed (layers, experts, channels, vocabulary) → parameters."""
    sizes: list[BillRow]
    """Rows, widths, experts and layers that a config.json names."""
    memory: list[BillRow]
    """Bytes: of the weights, of the cache of keys and values where it is known, and their sum."""
    context: int
    """Tokens of text that the cache is for."""


def bill_of(layout: Layout, plan: Plan) -> Bill:
    """Return what a plan takes off its source."""
    before, after = plan.before, plan.after
    cut = layout.with_layers(plan.layers)
    left = cut.with_experts(after.experts if after.experts != before.experts else 0)
    steps = [
        ("layers", layout.groups.total() - cut.groups.total()),
        (EXPERTS, cut.groups.total() - left.groups.total()),
    ]
    channels = left.groups.total() - left.parameters(layout.vocab_size, after.widths)
    steps += [("channels", channels)]
    steps += [("vocabulary", (layout.vocab_size - after.vocab_size) * left.axis_cost(VOCAB))]
    groups = dict(left.groups)
    groups["ffn"] = groups.get("ffn", 0) - channels
    groups["vocabulary"] = groups.get("vocabulary", 0) - steps[-1][1]
    rows = [
        BillRow(group, layout.groups[group], groups.get(group, 0))
        for group in GROUPS
        if layout.groups[group]
    ]
    sizes = [BillRow("rows of the vocabulary", before.vocab_size, after.vocab_size)]
    sizes += [BillRow(key, before.widths[key], after.widths[key]) for key in before.widths]
    if before.experts:
        sizes.append(BillRow("experts of a layer", before.experts, after.experts))
    sizes.append(BillRow("layers", before.num_hidden_layers, after.num_hidden_layers))
    memory, context = _memory(layout, plan)
    return Bill(
        [*rows, BillRow("all", before.parameters, after.parameters)],
        [(name, count) for name, count in steps if count],
        sizes,
        memory,
        context,
    )


def _memory(layout: Layout, plan: Plan) -> tuple[list[BillRow], int]:
    """Return the bytes to serve one text, and how many tokens of it; 0 where that is not known."""
    before, after = serving_of(layout, whole(layout)), serving_of(layout, sizes_of(plan))
    rows = [BillRow("weights", before.weights, after.weights)]
    most = layout.config.get("max_position_embeddings")
    context = min(CONTEXT, most) if type(most) is int and most > 0 else CONTEXT
    if before.cache is None or after.cache is None:
        return rows, 0
    rows.append(BillRow("cache of keys and values", before.cache * context, after.cache * context))
    if before.source_cache is not None and after.source_cache is not None:
        sizes = (before.source_cache * context, after.source_cache * context)
        rows.append(BillRow("cache of as many tokens of a source", *sizes))
    together = (sum(row.before for row in rows), sum(row.after for row in rows))
    return [*rows, BillRow("together", *together)], context


Figure = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
"""A measured number; a larger one was not measured."""


class Change(msgspec.Struct, frozen=True):
    """How many more bits a model needs than another."""

    share: Figure
    margin: Figure | None = None


class ScoreRow(msgspec.Struct, frozen=True):
    """A model's score on held-out text, as ``score`` writes it."""

    model: str
    bits_per_byte: Figure
    bytes: int
    windows: int
    margin: Figure | None = None
    change: Change | None = None


class TrialRow(msgspec.Struct, frozen=True):
    """A pruned model that ``search`` or ``compare`` tried, as they write it."""

    name: str
    vocab_size: int
    widths: dict[str, int]
    num_hidden_layers: int
    parameters: int
    removed: Figure
    bits_per_byte: Figure
    loss: Figure
    heldout_windows: int
    heldout_bytes: int
    experts: int = 0


@dataclass(frozen=True)
class Results:
    """What was measured."""

    scores: list[ScoreRow] = field(default_factory=list)
    search: list[TrialRow] = field(default_factory=list)
    compared: dict[str, list[TrialRow]] = field(default_factory=dict)
    """Ratio → the methods that were tried at it."""

    @property
    def best(self) -> TrialRow | None:
        """The sizes of least loss in a search."""
        return min(self.search, key=lambda row: row.loss, default=None)


def read_results(paths: Sequence[Path]) -> Results:
    """Read the JSON that score, search and compare print.

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    found = Results()
    for path in paths:
        try:
            value: Any = json.loads(read_file(path))
            if isinstance(value, dict) and "bits_per_byte" in value:
                value = [value]
            if not isinstance(value, dict) and not (isinstance(value, list) and value):
                raise ValueError("neither rows nor rows by ratio")
            if isinstance(value, dict):
                found.compared.update(msgspec.convert(value, dict[str, list[TrialRow]]))
            elif isinstance(value[0], dict) and "model" in value[0]:
                found.scores.extend(msgspec.convert(value, list[ScoreRow]))
            else:
                found.search.extend(msgspec.convert(value, list[TrialRow]))
        except OSError as error:
            reason = error.strerror
            raise DataError(
                path, "cannot be read", found=reason, fix=f"{did_you_mean(path)}{AGAIN}"
            ) from error
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise DataError(
                path, "holds no results", found=printable(str(error))[:200], fix=AGAIN
            ) from error
    return found
