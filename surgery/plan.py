"""The plan: everything apply needs but the source, as one readable JSON file."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from surgery import selection
from surgery.budget import Sizes, check_sizes
from surgery.channels import bucket_weights, choose_channels
from surgery.errors import PlanError, StatsError
from surgery.families import FFN, VOCAB
from surgery.header import TensorRef
from surgery.idmap import IdMap
from surgery.jsonfile import dump_table, write_atomic
from surgery.layout import Layout
from surgery.rarity import Rarity
from surgery.selection import MAKE_AGAIN
from surgery.stats import ChannelStats
from surgery.vocab_cost import VocabularyCost

FORMAT = 1


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a model."""

    vocab_size: int
    """Rows of the embedding."""
    intermediate_size: int
    """Channels per layer."""
    parameters: int
    """Tied embeddings once."""
    nbytes: int
    """Bytes of all tensors."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the choice was made."""

    criterion: str
    """Channel importance, a key of ``channels.CRITERIA``."""
    ratio: float | None
    """The target, or None where the sizes were given."""
    text_digest: str | None
    """Of the calibration windows; None for a plan without statistics."""
    calibration_tokens: int
    notes: list[str]
    """What the user should know: approximations made, files left behind."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pure function from the source's headers to the output's."""

    source: str
    """Directory, or hub id ``org/name@revision``."""
    fingerprint: str
    """Of the source: config, tokenizer and headers."""
    output: str | None
    """Directory to write, unless ``apply -o`` names another."""
    before: Shape
    after: Shape
    kept_tokens: str
    """Old ids of the embedding rows that stay (``selection.encode``)."""
    rowless_tokens: int
    """Added tokens behind the last row, kept behind the last row."""
    kept_channels: list[str]
    """Per layer, the channels that stay (``selection.encode``). Empty: none chosen yet."""
    vocabulary: VocabularyCost | None
    """What the cut of the vocabulary costs; None where it stays whole."""
    provenance: Provenance
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Check that the kept indices are as many as the sizes say."""
        counts = {
            "format": (self.format, FORMAT),
            "rowless_tokens below 0": (min(self.rowless_tokens, 0), 0),
            "kept_tokens": (len(self.ids().kept), self.after.vocab_size),
        }
        for layer in range(len(self.kept_channels)):
            found = len(self.channels(layer))
            counts[f"kept_channels of layer {layer}"] = (found, self.after.intermediate_size)
        for name, (found, expected) in counts.items():
            if found != expected:
                raise PlanError(
                    name,
                    "does not match the rest of the plan",
                    expected=expected,
                    found=found,
                    fix=MAKE_AGAIN,
                )

    @property
    def complete(self) -> bool:
        """Whether the channels are chosen, so that the plan can be applied."""
        return bool(self.kept_channels) or not self.cuts_channels

    @property
    def cuts_channels(self) -> bool:
        """Whether any channel goes."""
        return self.after.intermediate_size != self.before.intermediate_size

    def ids(self) -> IdMap:
        """The map from old to new token ids."""
        kept = selection.decode(self.kept_tokens, self.before.vocab_size, "kept_tokens")
        return IdMap(kept, self.before.vocab_size, self.rowless_tokens)

    def channels(self, layer: int) -> np.ndarray:
        """Channels of ``layer`` that stay, ascending."""
        if not self.kept_channels:
            return np.arange(self.after.intermediate_size)
        text = self.kept_channels[layer]
        return selection.decode(
            text, self.before.intermediate_size, f"kept_channels of layer {layer}"
        )

    def encode(self) -> bytes:
        """The plan as JSON; the same plan gives the same bytes."""
        return dump_table(self)

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan does: ``encode`` without the place of the output."""
        return hashlib.sha256(msgspec.structs.replace(self, output=None).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write plan.json atomically."""
        write_atomic(path, self.encode())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read and validate a plan.

        Raises:
            PlanError: not a plan, or its parts contradict each other.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except PlanError as error:
            raise error.inside(path) from error
        except OSError as error:
            raise PlanError(
                path, "cannot be read", found=error.strerror, fix="name the plan's file"
            ) from error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise PlanError(path, "is not a plan", found=error, fix=MAKE_AGAIN) from error


def make_plan(
    layout: Layout,
    rarity: Rarity,
    sizes: Sizes,
    stats: ChannelStats | None,
    *,
    criterion: str,
    source: str,
    output: str | None = None,
    ratio: float | None = None,
    vocabulary: VocabularyCost | None = None,
) -> Plan:
    """Plan the cut of ``layout`` to ``sizes``; no weights are read.

    Without ``stats`` the plan predicts sizes but, where channels go, cannot be applied.

    Raises:
        BudgetError: a size out of reach.
        StatsError: the statistics belong to another model.
    """
    check_sizes(layout, sizes)
    ids = rarity.id_map(sizes.vocab_size)
    kept_channels: list[str] = []
    notes = vocabulary.warnings() if vocabulary else []
    misread = layout.family.misread_vocab_sizes.get(sizes.vocab_size)
    if vocabulary and misread:
        notes.append(f"vocab_size {sizes.vocab_size}: {misread}; another size avoids that")
    if stats is not None:
        _check_stats(layout, stats)
        notes += _approximations(stats, ids, criterion)
        kept_channels = [
            selection.encode(kept, layout.intermediate_size)
            for kept in choose_channels(stats, ids, sizes.intermediate_size, criterion)
        ]
    full = Sizes(layout.vocab_size, layout.intermediate_size)
    return Plan(
        source=source,
        fingerprint=layout.checkpoint.fingerprint,
        output=output,
        before=shape_of(layout, full),
        after=shape_of(layout, sizes),
        kept_tokens=selection.encode(ids.kept, layout.vocab_size),
        rowless_tokens=rarity.rowless,
        kept_channels=kept_channels,
        vocabulary=vocabulary,
        provenance=Provenance(
            criterion=criterion,
            ratio=ratio,
            text_digest=stats.info.text_digest if stats else None,
            calibration_tokens=stats.info.tokens if stats else 0,
            notes=notes,
        ),
    )


def cut_shape(layout: Layout, tensor: TensorRef, sizes: Sizes) -> tuple[int, ...]:
    """Shape of ``tensor`` once its named axes have ``sizes``."""
    lengths = {VOCAB: sizes.vocab_size, FFN: sizes.intermediate_size}
    axes = layout.slots[tensor.name][0].axes or (None,) * len(tensor.shape)
    return tuple(
        length if axis is None else lengths[axis]
        for axis, length in zip(axes, tensor.shape, strict=True)
    )


def shape_of(layout: Layout, sizes: Sizes) -> Shape:
    """Predict sizes, parameters and bytes of ``layout`` cut to ``sizes``."""
    tensors = layout.checkpoint.tensors.values()
    nbytes = sum(int(np.prod(cut_shape(layout, t, sizes))) * t.itemsize for t in tensors)
    return Shape(
        sizes.vocab_size,
        sizes.intermediate_size,
        layout.parameters(sizes.vocab_size, sizes.intermediate_size),
        nbytes,
    )


def _check_stats(layout: Layout, stats: ChannelStats) -> None:
    if stats.info.fingerprint != layout.checkpoint.fingerprint:
        raise StatsError(
            stats.where,
            "were taken from another model",
            expected=f"fingerprint {layout.checkpoint.fingerprint[:12]}",
            found=stats.info.fingerprint[:12],
            fix=f"calibrate {layout.checkpoint.path}",
        )
    expected = (layout.num_hidden_layers, layout.intermediate_size, layout.vocab_size)
    found = (len(stats.sum_sq), stats.sum_sq[0].shape[1], len(stats.token_counts))
    if found != expected:
        raise StatsError(
            stats.where,
            "have other sizes (layers, channels, tokens) than the model",
            expected=expected,
            found=found,
            fix="calibrate again",
        )


def _approximations(stats: ChannelStats, ids: IdMap, criterion: str) -> list[str]:
    weights = bucket_weights(stats, ids)
    partial = np.flatnonzero((weights > 0) & (weights < 1))
    if criterion != "common-act2" or not len(partial):
        return []
    edges = [0, *stats.info.bucket_edges]
    parts = ", ".join(f"{edges[b]}-{edges[b + 1]} by {weights[b]:.1%}" for b in partial)
    return [
        f"vocab_size {ids.new_size} lies inside a bucket of the statistics, which counts by the "
        f"share of its occurrences that stay ({parts}); "
        f"calibrate --vocab-sizes {ids.new_size} makes it exact"
    ]
