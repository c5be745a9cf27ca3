"""The plan: all that apply needs besides the source, as one readable JSON file."""

import hashlib
import re
from html import escape
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from surgery.errors import PlanError, did_you_mean
from surgery.files import index_sets
from surgery.files.atomic import write_atomic
from surgery.files.index_sets import MAKE_AGAIN
from surgery.files.strict_json import dump_table, read_file
from surgery.hub.upload import HUB_NAME
from surgery.planning.layers import format_layers
from surgery.planning.replacement import Replacement
from surgery.plot import html_table
from surgery.tokenizer.id_map import IdMap
from surgery.vocabulary.cost import LINE, ScriptCost, VocabularyCost, shortened_token, token_lines

FORMAT = 4

SHOWN_SCRIPTS = 12
"""How many scripts the tables list, those that lose most tokens; plan.json has all."""

PROVENANCE_NAME = "compact_surgery.json"
"""Name of ``ProvenanceFile`` in an output."""

MOST_ROWLESS = 1 << 16
"""Most tokens with ids after the last row; Gemma 3 has one."""


HUB_SOURCE = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*@\w[\w./-]*")
"""A source on the hub; every other one is a directory."""

CACHED_SOURCE = re.compile(
    r"[\\/]models--((?:\w[\w.-]*?--)?\w[\w.-]*)[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]?$"
)
"""A directory in the hub's cache: organization (if any) and name, commit."""


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a model."""

    vocab_size: int
    """Rows of the embedding."""
    widths: dict[str, int]
    """Key of config.json → channels of every FFN, or expert, of this kind."""
    num_hidden_layers: int
    parameters: int
    """Tied embeddings count once."""
    nbytes: int
    """Bytes of all tensors."""
    experts: int = 0
    """Routed experts of each layer that has some; 0 where none has."""


class ChannelShares(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the kept channels hold of the statistics that they were chosen by."""

    lengths: dict[str, int]
    """Channel axis → channels of each FFN, or expert, in the source."""
    kept: list[dict[str, float]]
    """For each layer of the output: channel axis → the share that stays of Σ act² over the kept
    tokens (eq. 5); of all experts together."""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the choice was made."""

    criterion: str
    """Channel importance, a key of ``channels.CRITERIA``."""
    ratio: float | None
    """The ratio that was asked for, or None where the sizes were given."""
    text_digest: str | None
    """Digest of the calibration windows; None for a plan without statistics."""
    calibration_tokens: int
    notes: list[str]
    """What the user should know, such as approximations that were made."""
    channel_shares: ChannelShares | None = None
    """What the kept channels hold of the statistics; None where no channels are chosen."""
    layers_by_influence: bool = False
    """Whether the layers that are kept are those of largest block influence."""
    expert_criterion: str | None = None
    """Importance of an expert, a key of ``channels.EXPERT_CRITERIA``; None where all are kept."""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pure function from the source's headers to those of the output."""

    source: str
    """Absolute path of a directory, or hub id ``org/name@revision``."""
    fingerprint: str
    """Digest of the source's config, tokenizer and headers."""
    output: str | None
    """Directory to write, unless ``apply -o`` names another."""
    before: Shape
    after: Shape
    kept_tokens: str
    """Old ids of the embedding rows to keep (``index_sets.encode``)."""
    rowless_tokens: int
    """Added tokens with ids after the last row; they are kept after the last row."""
    kept_channels: list[dict[str, list[str]]]
    """For each layer of the output: channel axis → the channels to keep (``index_sets.encode``), an
    entry for each kept expert. A dense FFN counts as one expert. Empty: none are chosen yet, or
    all are kept."""
    dropped: list[str]
    """Tensors to remove, with ``{expert}`` for numbers: layers for multi-token prediction."""
    dequantize: bool
    """Whether FP8 weights become bf16."""
    vocabulary: VocabularyCost | None
    """What the smaller vocabulary costs; None where all of it is kept."""
    provenance: Provenance
    layers: list[list[int]] = []
    """For each layer of the output, the source's layers that it is made of: one, or several merged
    into W of the first + Σ (W of another − W of the first) (LaCo, arXiv 2402.11187).
    Empty: all layers are kept."""
    replaced: Replacement | None = None
    """Tensors that are read from another file than the source's."""
    weights: str | None = None
    """``Checkpoint.weights`` of the source."""
    family: str | None = None
    """Model type that the source is treated as; None is its own."""
    base_model: str | None = None
    """Hub id ``org/name`` that the model card names as the base; None is the source's, if any."""
    untie: bool = False
    """Whether the source's lm_head differs from its embedding although its config.json ties them.
    The output's does not."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for the way that the source splits text before BPE, where the vocabulary is
    pruned, so that an export knows it; None where it is not known, or not needed."""
    kept_experts: list[str] = []
    """For each layer of the output: the routed experts to keep (``index_sets.encode``), "" where it
    has none. Empty: none are chosen yet, or all are kept."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Check that kept rows and layers match the sizes; ``edits`` checks the channels."""
        if self.base_model is not None and not HUB_NAME.fullmatch(self.base_model):
            raise PlanError(
                "base_model",
                "is no model's name on the hub",
                expected="org/name",
                found=self.base_model,
                fix="correct it",
            )
        counts = {
            "format": (self.format, FORMAT),
            "rowless_tokens": (self.rowless_tokens, min(max(self.rowless_tokens, 0), MOST_ROWLESS)),
            "kept_tokens": (len(self.ids().kept), self.after.vocab_size),
            "layers": (
                len(self.layers) or self.before.num_hidden_layers,
                self.after.num_hidden_layers,
            ),
        }
        for name, (found, expected) in counts.items():
            if found != expected:
                raise PlanError(
                    name,
                    "does not match the rest of the plan",
                    expected=expected,
                    found=found,
                    fix=MAKE_AGAIN,
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuse sizes that no model has, or that grow."""
        for name, full in self.before.widths.items():
            found = self.after.widths.get(name, 0)
            if not 1 <= found <= full:
                raise PlanError(
                    f"after.widths.{name}",
                    "does not match the rest of the plan",
                    expected=f"1 to {full}",
                    found=found,
                    fix=MAKE_AGAIN,
                )
        for when, shape in (("before", self.before), ("after", self.after)):
            for name in ("vocab_size", "num_hidden_layers", "parameters", "nbytes"):
                if getattr(shape, name) < 1:
                    raise PlanError(
                        f"{when}.{name}",
                        "is no size of a model",
                        expected="at least 1",
                        found=getattr(shape, name),
                        fix=MAKE_AGAIN,
                    )

    @property
    def complete(self) -> bool:
        """Whether channels and experts are chosen, so that the plan can be applied."""
        channels = bool(self.kept_channels) or self.after.widths == self.before.widths
        return channels and (bool(self.kept_experts) or self.after.experts == self.before.experts)

    @property
    def base(self) -> str | None:
        """Hub id, without a commit, of the model that this one is made from, where it is known."""
        return self.base_model or (self.hub_id and self.hub_id.partition("@")[0])

    def ids(self) -> IdMap:
        """The map from old to new token ids."""
        kept = index_sets.decode(self.kept_tokens, self.before.vocab_size, "kept_tokens")
        return IdMap(kept, self.before.vocab_size, self.rowless_tokens)

    def experts(self, layer: int) -> np.ndarray:
        """Return the experts of ``layer``, numbered as in the output, to keep; ascending.

        Raises:
            PlanError: the plan lacks the layer, or keeps another number of experts.
        """
        if not self.kept_experts:
            return np.arange(self.before.experts)
        where = f"kept_experts of layer {layer}"
        text = self.kept_experts[layer] if layer < len(self.kept_experts) else ""
        kept = index_sets.decode(text, self.before.experts, where)
        if len(kept) != self.after.experts:
            raise PlanError(
                where,
                "does not match the rest of the plan",
                expected=f"{self.after.experts} experts",
                found=len(kept),
                fix=MAKE_AGAIN,
            )
        return kept

    def channels(self, layer: int, axis: str, channels: int, experts: int = 1) -> list[np.ndarray]:
        """Return the channels of ``layer`` to keep, ascending, one array per expert.

        Args:
            layer: Number of the layer in the output.
            axis: One of ``family.WIDTHS``.
            channels: Length of the axis in the source.
            experts: How many experts the layer keeps on this axis.

        Raises:
            PlanError: the plan lacks the layer, or has another number of experts.
        """
        if not self.kept_channels:
            return [np.arange(channels)] * experts
        where = f"kept_channels of layer {layer}"
        texts = self.kept_channels[layer].get(axis) if layer < len(self.kept_channels) else None
        if texts is None or len(texts) != experts:
            raise PlanError(
                f"{where}: {axis}",
                "is not for as many experts as the source has",
                expected=experts,
                found=len(texts or ()),
                fix=MAKE_AGAIN,
            )
        return [index_sets.decode(text, channels, f"{where}: {axis}") for text in texts]

    def sizes(self) -> list[tuple[str, int, int]]:
        """Return the name of each size, and the size before and after."""
        before, after = self.before, self.after
        sizes = [("vocab_size", before.vocab_size, after.vocab_size)]
        sizes += [(key, before.widths[key], after.widths[key]) for key in before.widths]
        if after.experts != before.experts:
            sizes.append(("experts of a layer", before.experts, after.experts))
        if self.layers:
            sizes.append(("layers", before.num_hidden_layers, after.num_hidden_layers))
        sizes.append(("parameters", before.parameters, after.parameters))
        sizes.append(("bytes of weights", before.nbytes, after.nbytes))
        return sizes

    def _repr_html_(self) -> str:
        rows = [(name, old, new, 1 - new / old) for name, old, new in self.sizes()]
        lost = self.vocabulary.scripts if self.vocabulary is not None else []
        rows += [
            (
                f"tokens of {s.script}",
                s.tokens_before,
                s.tokens_after,
                1 - s.tokens_after / s.tokens_before,
            )
            for s in lost
            if s.tokens_before > s.tokens_after
        ]
        heads = ("size", "before", "after", "removed")
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.provenance.notes)
        return html_table(f"plan for {_last_part(self.source)}", heads, rows) + f"<ul>{notes}</ul>"

    def table(self) -> str:
        """Return each size before and after with its removed share, then the notes, as text."""
        sizes = self.sizes()
        wide = max(20, 2 + max(len(label) for label, _, _ in sizes))
        rows = [f"{'':<{wide}}{'before':>18}{'after':>18}{'removed':>10}"]
        for label, old, new in sizes:
            rows.append(f"{label:<{wide}}{old:>18,}{new:>18,}{1 - new / old:>10.2%}")
        if self.vocabulary is not None:
            rows += ["", *_vocabulary_rows(self.vocabulary)]
        if self.layers:
            rows.append(f"layers kept: {format_layers(self.layers)}")
        rows += [f"note: {note}" for note in self.provenance.notes]
        if self.vocabulary is not None and not self.vocabulary.text_bytes:
            rows.append("note: `data` shows how much longer text becomes")
        if self.dropped:
            rows.append(f"note: left out, for they only guess ahead: {', '.join(self.dropped)}")
        if not self.complete:
            rows.append("note: sizes only; give `stats` to choose what to keep and apply the plan")
        return "\n".join(rows)

    def channel_facts(self) -> list[dict[str, Any]]:
        """Return, for each layer of the output, the channels that are kept of each axis.

        Returns:
            An entry for each layer: its number, the source's layers that it is made of (``from``),
            and for each channel axis how many channels the source has, the indices that are kept
            for each expert, and the share of Σ act² that they hold. Empty where the plan removes
            no channels.

        Raises:
            PlanError: the plan predicts sizes only.
        """
        if self.after.widths == self.before.widths:
            return []
        shares = self.provenance.channel_shares
        if shares is None or not self.kept_channels:
            raise PlanError(
                "plan",
                "predicts sizes only: its channels are not chosen",
                fix="calibrate, then plan again with `stats`",
            )
        facts = []
        for layer, axes in enumerate(self.kept_channels):
            known = dict(enumerate(shares.kept)).get(layer, {})
            found = {}
            for axis, texts in axes.items():
                length = shares.lengths.get(axis, 0)
                kept = self.channels(layer, axis, length, len(texts))
                found[axis] = {
                    "channels": length,
                    "share": known.get(axis),
                    "kept": [indices.tolist() for indices in kept],
                }
            group = dict(enumerate(self.layers)).get(layer, [layer])
            facts.append({"layer": layer, "from": group, "axes": found})
        return facts

    def channel_table(self) -> str:
        """Return ``channel_facts`` as text for people, a line for each layer and axis.

        Raises:
            PlanError: as ``channel_facts``.
        """
        head = f"{'layer':<14}{'axis':<8}{'kept':>8}{'of':>8}{'share':>9}  kept channels"
        rows, shares = [head], list[float]()
        for entry in self.channel_facts():
            sources = entry["from"]
            layer = str(entry["layer"])
            if sources != [entry["layer"]]:
                layer += f" (was {'+'.join(map(str, sources))})"
            for axis, found in entry["axes"].items():
                kept, share = found["kept"], found["share"]
                text = f"{layer:<14}{axis:<8}{len(kept[0]):>8,}{found['channels']:>8,}"
                text += f"{'' if share is None else f'{share:.2%}':>9}  "
                shown = index_sets.as_ranges(np.array(kept[0], dtype=np.int64))
                if len(kept) > 1:
                    shown = f"of each of {len(kept)} experts"
                rows.append(text + _fitting(shown, LINE - len(text)))
                shares += [] if share is None else [share]
        if len(rows) == 1:
            return "all channels are kept"
        if shares:
            least, mean = min(shares), sum(shares) / len(shares)
            rows.append(
                f"share of Σ act² over the kept "
                f"tokens that stays: {mean:.2%} on average, {least:.2%} at least"
            )
        return "\n".join(rows)

    def encode(self) -> bytes:
        """The plan as JSON; the same plan gives the same bytes."""
        return dump_table(self)

    @property
    def hub_id(self) -> str | None:
        """The source's id on the hub with its commit; None where only a directory is known."""
        if HUB_SOURCE.fullmatch(self.source):
            return self.source
        cached = CACHED_SOURCE.search(self.source)
        return f"{cached[1].replace('--', '/', 1)}@{cached[2]}" if cached else None

    def published(self) -> "Plan":
        """Return the plan without paths of this machine: the source's hub id or bare name."""
        replaced = self.replaced
        if replaced is not None:
            replaced = msgspec.structs.replace(replaced, file=_last_part(replaced.file))
        source = self.hub_id or _last_part(self.source)
        return msgspec.structs.replace(self, source=source, output=None, replaced=replaced)

    @property
    def digest(self) -> str:
        """SHA-256 of ``encode``, the same wherever the plan's files are."""
        bare = self.published()
        replaced = bare.replaced and msgspec.structs.replace(bare.replaced, file="")
        bare = msgspec.structs.replace(bare, replaced=replaced)
        return hashlib.sha256(bare.encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write plan.json atomically."""
        write_atomic(Path(path), self.encode())

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Read and validate a plan, from its own file or from an output's compact_surgery.json.

        The latter has no paths; the file of replacements is looked for beside the output.

        Raises:
            PlanError: the file is not a plan, or its parts contradict each other.
        """
        path = Path(path)
        try:
            if path.name != PROVENANCE_NAME:
                return msgspec.json.decode(read_file(path), type=cls)
            plan = msgspec.json.decode(read_file(path), type=ProvenanceFile).plan
        except PlanError as error:
            raise error.inside(path) from error
        except OSError as error:
            fix = f"{did_you_mean(path)}name the plan's file"
            raise PlanError(path, "cannot be read", found=error.strerror, fix=fix) from error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise PlanError(path, "is not a plan", found=error, fix=MAKE_AGAIN) from error
        if plan.replaced is None:
            return plan
        file = path.absolute().parent.parent / Path(plan.replaced.file).name
        replaced = msgspec.structs.replace(plan.replaced, file=str(file))
        return msgspec.structs.replace(plan, replaced=replaced)


def recorded_pre_tokenizer(directory: Path) -> str | None:
    """Return ``pre_tokenizer`` of the plan that made ``directory``; None where there is none."""
    try:
        return Plan.load(directory / PROVENANCE_NAME).pre_tokenizer
    except PlanError:  # it was not made by this tool, or by another version
        return None


def _fitting(text: str, width: int) -> str:
    """Return as many of the parts of "0-3,5,…" as fit into ``width`` characters."""
    if len(text) <= width:
        return text
    return text[: max(text.rfind(",", 0, width), 0)] + ",…"


def _last_part(path: str) -> str:
    """The name of a file or directory, of whichever system the path is."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _vocabulary_rows(cost: VocabularyCost) -> list[str]:
    """Return rows on the tokens that each script loses, and on tokens per byte of a text."""
    lost = [s for s in cost.scripts if s.tokens_before > s.tokens_after and s.asked != "kept"]
    lost.sort(key=lambda script: script.tokens_after - script.tokens_before)
    shown = lost[:SHOWN_SCRIPTS]
    kept = [script for script in cost.scripts if script.asked == "kept"]
    heads = f"{'tokens of':<20}{'before':>18}{'after':>18}{'removed':>10}"
    rows = [heads + (f"{'text grows':>12}" if cost.text_bytes else "")]
    for script in [*shown, *kept]:
        share = 1 - script.tokens_after / script.tokens_before if script.tokens_before else 0.0
        row = f"{script.script:<20}{script.tokens_before:>18,}{script.tokens_after:>18,}"
        removed = f"{share:.2%}" if script in lost else "kept"
        rows.append(f"{row}{removed:>10}{_growth(script):>12}".rstrip())
    if others := len(lost) - len(shown):
        more = "scripts" if others > 1 else "script"
        rows.append(f"and {others} other {more}, in the plan's file")
    if cost.tokens_per_byte_before and cost.tokens_per_byte_after:
        before, after = cost.tokens_per_byte_before, cost.tokens_per_byte_after
        rows.append(
            f"tokens per byte of the text: {before:.4f} before, {after:.4f} after "
            f"({after / before - 1:+.1%})"
        )
    heading = "such as, the most common first (inspect with `removed` lists more)"
    rows += ["", f"{'removed tokens of':<20}{heading}"]
    for script in shown:
        lines = token_lines(map(shortened_token, script.examples), LINE - 20)
        rows += [f"{'' if n else script.script:<20}{line}" for n, line in enumerate(lines)]
    return rows


def _growth(script: ScriptCost) -> str:
    return f"{script.growth:+.1%}" if script.text_tokens_before else ""


class ProvenanceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """compact_surgery.json: how this checkpoint was made."""

    version: str
    """Of compact-surgery."""
    plan_digest: str
    plan: Plan
    """As ``Plan.published``, so that the same plan gives the same bytes anywhere."""
