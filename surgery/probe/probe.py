"""What a checkpoint of an unknown model type may be: families that fit, or a proposed entry."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.fp8 import weight_of
from surgery.errors import ADD_FAMILY, FamilyError, SurgeryError, UnknownTypeError, printable
from surgery.families.blocks import BUFFER
from surgery.families.schema import Family, Wrapper, template
from surgery.families.table import FAMILIES
from surgery.files.safetensors_header import TensorRef
from surgery.layout.build import read_layout
from surgery.probe.evidence import WIDTH_KEY, Evidence
from surgery.probe.proposal import Entry

SHOWN = 6
"""Families that fit which one line names."""

UNSEEN = (
    "models with the same tensors may compute otherwise: other norms, positions, factors",
    "where gate and up lie in one tensor, no shape shows whether in halves or in pairs",
    "verify with `forward` shows whether an entry cuts what it should",
)
"""What names and shapes cannot tell."""


@dataclass(frozen=True)
class Proposal:
    """What names, shapes and config.json say of a checkpoint."""

    model_type: str
    families: tuple[str, ...]
    """Families that account for every tensor, those with the fewest tensors unused first."""
    entry: str | None
    """Python text of an entry that accounts for every tensor; None where none is found."""
    notes: tuple[str, ...]
    """Why there is no entry, and what cannot be seen."""

    def table(self) -> str:
        """The proposal as text for people."""
        rows = [f"model type: {self.model_type}"]
        rows.append(f"families that fit: {', '.join(self.families) or 'none'}")
        if self.families:
            rows.append(f"where it computes as one of them: `family` {self.families[0]}")
        if self.entry is not None:
            rows.append("proposed entry for the table FAMILIES:")
            rows.append(f"{self.model_type!r}: {self.entry},")
        return "\n".join([*rows, *(f"note: {note}" for note in self.notes)])


def propose(checkpoint: Checkpoint) -> Proposal:
    """Say what ``checkpoint`` may be, whatever its model type; reads headers and config.json."""
    model_type = printable(str(checkpoint.config.get("model_type")))
    try:
        entry = _wrapper(checkpoint) or _alone(checkpoint)
    except SurgeryError as error:
        return Proposal(model_type, fitting(checkpoint), None, (f"no entry: {error}",))
    return Proposal(model_type, fitting(checkpoint), entry, UNSEEN)


def fitting(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the families that account for every tensor, with the widths of config.json."""
    unused: dict[str, int] = {}
    for name in FAMILIES:
        try:
            layout = read_layout(replace(checkpoint, family=name))
        except SurgeryError:
            continue
        if _said(layout.widths, layout.config):
            used = {place.slot.name for place in layout.roles.values()}
            slots = layout.family.slots
            unused[name] = sum(s.name not in used and s.block != BUFFER for s in slots)
    return tuple(sorted(unused, key=unused.__getitem__))


def unknown_type(checkpoint: Checkpoint, error: UnknownTypeError) -> UnknownTypeError:
    """Return ``error`` of a checkpoint with what can be done about it."""
    families = fitting(checkpoint)
    if families:
        more = f" and {len(families) - SHOWN} more" if len(families) > SHOWN else ""
        fix = (
            f"its tensors fit {', '.join(families[:SHOWN])}{more}: where it computes as one of "
            f"them, name it, such as `family` {families[0]}"
        )
    else:
        fix = (
            "no family's tensors fit: compact-surgery inspect MODEL with `probe` proposes an entry "
            f"for the table of families; {ADD_FAMILY}"
        )
    return UnknownTypeError(error.where, error.model_type, code=error.code, fix=fix)


def _alone(checkpoint: Checkpoint) -> str:
    """Text of an entry for a language model; it accounts for every tensor."""
    entry = Entry.of(Evidence.read(checkpoint.config, _weights(checkpoint)))
    read_layout(checkpoint, entry.family)
    return entry.text


def _wrapper(checkpoint: Checkpoint) -> str | None:
    """Text of an entry for a language model of a known type inside; None where there is no such."""
    section = checkpoint.config.get("text_config")
    if not isinstance(section, dict):
        return None
    kind = section.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if not isinstance(family, Family):
        raise FamilyError(
            checkpoint.path / "config.json",
            "text_config's model type is not in the table",
            found=kind,
            fix="add that one first",
        )
    prefixes = (("language_model.", ""), ("model.language_model.", "model."))
    inner = replace(family, prefixes=prefixes)
    beside = {
        name.removeprefix("model.").partition(".")[0] + "."
        for name in (weight.name for weight in _weights(checkpoint))
        if not any(template(n)[0] in inner.by_name for n in inner.spellings(name))
    }
    wrapper = Wrapper(tuple(sorted(beside)), prefixes, tied=inner.tied)
    read_layout(checkpoint, wrapper.around(family, str(kind)))
    return f"Wrapper({wrapper.carried!r}, {prefixes!r}, tied={inner.tied})"


def _weights(checkpoint: Checkpoint) -> list[TensorRef]:
    """Tensors that are no scales of quantized ones."""
    return [t for t in checkpoint.tensors.values() if weight_of(checkpoint, t) is None]


def _said(widths: Mapping[str, int], config: Mapping[str, Any]) -> bool:
    """Whether config.json does not hold one of these widths under another key than this."""
    said = {value for key, value in config.items() if WIDTH_KEY.search(key) and type(value) is int}
    return all(key in config or width not in said for key, width in widths.items())
