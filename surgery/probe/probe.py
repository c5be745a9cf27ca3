"""Proposals for a checkpoint of an unknown model type: families that fit, and a new entry."""

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
from surgery.layout.roles import CARRIED
from surgery.probe.evidence import WIDTH_KEY, Evidence
from surgery.probe.proposal import Entry

SHOWN = 6
"""Number of families that fit which an error names."""

LIMITS = (
    "models with the same tensors may compute differently: other norms, positions, factors",
    "where gate and up are one tensor, no shape shows whether in halves or in pairs",
    "verify with `forward` shows whether an entry prunes the right channels",
)
"""What names and shapes cannot show."""


@dataclass(frozen=True)
class Proposal:
    """Families and an entry that fit a checkpoint, by names, shapes and config.json."""

    model_type: str
    families: tuple[str, ...]
    """Families that match every tensor; first those with the fewest slots that no tensor has, and
    the fewest tensors that have no slot."""
    entry: str | None
    """Python text of an entry that matches every tensor; None where none was found."""
    notes: tuple[str, ...]
    """The reason why there is no entry, or ``LIMITS``."""

    def table(self) -> str:
        """The proposal as text for people."""
        rows = [f"model type: {self.model_type}", *(f"note: {note}" for note in self.notes)]
        rows.append(f"families that fit: {', '.join(self.families) or 'none'}")
        if self.families:
            rows.append(f"if it computes as one of them: `family` {self.families[0]}")
        if self.entry is not None:
            rows.append("proposed entry for the table FAMILIES:")
            rows.append(f"{self.model_type!r}: {self.entry},")
        return "\n".join(rows)


def propose(checkpoint: Checkpoint) -> Proposal:
    """Propose families and an entry for ``checkpoint``, from its headers and config.json."""
    model_type = printable(str(checkpoint.config.get("model_type")))
    try:
        entry = _wrapper(checkpoint) or _alone(checkpoint)
    except SurgeryError as error:
        return Proposal(model_type, fitting(checkpoint), None, (f"no entry: {error}",))
    return Proposal(model_type, fitting(checkpoint), entry, LIMITS)


def fitting(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the families that match every tensor and the widths in config.json."""
    apart: dict[str, int] = {}
    for name in FAMILIES:
        try:
            layout = read_layout(replace(checkpoint, family=name))
        except SurgeryError:
            continue
        if _keys_fit(layout.widths, layout.config):
            used = {role.slot.name for role in layout.roles.values()}
            slots = layout.family.slots
            expected = [s for s in slots if s.block != BUFFER and not s.name.endswith(".bias")]
            carried = sum(role.slot is CARRIED for role in layout.roles.values())
            apart[name] = carried + sum(slot.name not in used for slot in expected)
    return tuple(sorted(apart, key=apart.__getitem__))


def unknown_type(checkpoint: Checkpoint, error: UnknownTypeError) -> UnknownTypeError:
    """Return ``error`` with a fix that fits ``checkpoint``."""
    families = fitting(checkpoint)
    if families:
        more = f" and {len(families) - SHOWN} more" if len(families) > SHOWN else ""
        fix = (
            f"its tensors fit {', '.join(families[:SHOWN])}{more}: if it computes as one of "
            f"them, name it, such as `family` {families[0]}"
        )
    else:
        fix = (
            "no family's tensors fit: compact-surgery inspect MODEL with `probe` proposes an entry "
            f"for the table of families; {ADD_FAMILY}"
        )
    return UnknownTypeError(error.where, error.model_type, code=error.code, fix=fix)


def _alone(checkpoint: Checkpoint) -> str:
    """Text of an entry for a language model; the entry matches every tensor."""
    entry = Entry.of(Evidence.read(checkpoint.config, _weights(checkpoint)))
    read_layout(checkpoint, entry.family)
    return entry.text


def _wrapper(checkpoint: Checkpoint) -> str | None:
    """Text of an entry for a model with a known language model inside; None if it has none."""
    section = checkpoint.config.get("text_config")
    if not isinstance(section, dict):
        return None
    kind = section.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if not isinstance(family, Family):
        raise FamilyError(
            checkpoint.config_path,
            "text_config's model type is not in the table",
            found=kind,
            fix="add an entry for that type first",
        )
    prefixes = (("language_model.", ""), ("model.language_model.", "model."))
    inner = replace(family, prefixes=prefixes)
    carried = {
        name.removeprefix("model.").partition(".")[0] + "."
        for name in (weight.name for weight in _weights(checkpoint))
        if not any(template(n)[0] in inner.by_name for n in inner.spellings(name))
    }
    wrapper = Wrapper(tuple(sorted(carried)), prefixes, tied=inner.tied)
    read_layout(checkpoint, wrapper.around(family, str(kind)))
    return f"Wrapper({wrapper.carried!r}, {prefixes!r}, tied={inner.tied})"


def _weights(checkpoint: Checkpoint) -> list[TensorRef]:
    """All tensors except the scales of quantized weights."""
    return [t for t in checkpoint.tensors.values() if weight_of(checkpoint, t) is None]


def _keys_fit(widths: Mapping[str, int], config: Mapping[str, Any]) -> bool:
    """Whether config.json has none of these widths under another key only."""
    sizes = {value for key, value in config.items() if WIDTH_KEY.search(key) and type(value) is int}
    return all(key in config or width not in sizes for key, width in widths.items())
