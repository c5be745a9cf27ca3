"""The layout of a checkpoint: its tensors by role, named axes and their lengths."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.opaque import steps_of
from surgery.errors import CheckpointError
from surgery.families.schema import (
    DECODER,
    EXPERT,
    EXPERTS,
    TEXT_VOCAB,
    TIE_KEY,
    VOCAB,
    Dim,
    Family,
    Slot,
)
from surgery.files.safetensors_header import TensorRef
from surgery.layout.roles import CARRIED, DRAFT, TensorRole, TensorRoles


def size_in(config: Mapping[str, Any], key: str, where: object, *, least: int = 1) -> int | None:
    """Return the size that config.json has under ``key``; None where it is missing or null.

    Raises:
        CheckpointError: not a number, below ``least``, or not the same for all layers.
    """
    value = config.get(key)
    if isinstance(value, list) and value and len(set(map(str, value))) == 1:
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or value < least:
        raise no_size(where, key, value)
    return value


def no_size(where: object, key: str, value: object) -> CheckpointError:
    """The error of a key without a valid size."""
    return CheckpointError(
        where,
        f"{key} is missing or not a size",
        expected="a positive number",
        found=value,
        fix="check config.json",
    )


OWN_HEAD = (
    "lm_head differs from the embedding, although config.json ties them: the model counts as "
    "untied, and the output's config.json says so"
)
"""What a user should know of a layout that ``unties``."""


@dataclass(frozen=True)
class Layout:
    """The validated shape of a checkpoint; ``read_layout`` makes it."""

    checkpoint: Checkpoint
    family: Family
    vocab_size: int
    """Rows of the embedding."""
    widths: Mapping[str, int]
    """Key of config.json → channels, for widths that some tensor has; the costliest first."""
    num_hidden_layers: int
    """Of an encoder with a decoder, the layers of both: the encoder's come first."""
    tied: bool
    """Whether lm_head and the embedding are one tensor, by config.json and by their values."""
    decoder_layers: int = 0
    """How many of the layers are a decoder's that has an encoder beside it."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers whose parameters count; None means all layers."""
    experts_left: int = 0
    """How many of each layer's experts count; 0 means all experts."""

    def with_layers(self, groups: Sequence[Sequence[int]]) -> "Layout":
        """Return a layout where only the first layer of each group counts.

        ``groups`` are as in a plan. Other layers are removed, or merged into the first of their
        group. Without groups, all layers count.
        """
        return self._counting(layers=tuple(group[0] for group in groups)) if groups else self

    def with_experts(self, count: int) -> "Layout":
        """Return a layout where only ``count`` experts of each layer count; 0 means all."""
        if not count:
            return self
        made = self._counting(experts_left=count)
        made.__dict__.update(by_slot=self.by_slot)
        return made

    def _counting(self, **changes: Any) -> "Layout":
        """Return a layout of the same tensors, of which others count; they are matched once."""
        made = replace(self, **changes)
        made.__dict__.update(roles=self.roles, experts=self.experts)
        return made

    @property
    def where(self) -> object:
        """config.json, for errors."""
        return self.checkpoint.config_path

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        return self.family.text_config(self.checkpoint.config)

    @property
    def says_tied(self) -> bool:
        """Whether config.json ties lm_head to the embedding; the weights may contradict it."""
        of_text = self.config.get(TIE_KEY, self.family.tied)
        return bool(self.checkpoint.config.get(TIE_KEY, of_text))

    @property
    def unties(self) -> bool:
        """Whether the stored lm_head differs from the embedding, although config.json ties them."""
        return self.says_tied and not self.tied

    @property
    def without_head(self) -> bool:
        """Whether the model may lack its head: an encoder, or a decoder saved without one."""
        stored = self.by_name.get(self.family.embedding)
        return self.family.kind != DECODER or (
            stored is not None and self.family.base + stored.name == self.family.embedding
        )

    @property
    def predicts(self) -> bool:
        """Whether it gives a text's next token: a decoder with a head, or with a tied one."""
        has_head = self.tied or self.family.head in self.by_name
        return self.family.kind == DECODER and has_head

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the model, one sentence each."""
        why = self.family.only_vocabulary
        alone = f"only the vocabulary can be pruned: {why}"
        own_head = (OWN_HEAD,) if self.unties else ()
        return (*own_head, *((alone,) if why else ()), *self.checkpoint.notes)

    @cached_property
    def roles(self) -> dict[str, TensorRole]:
        """Tensor name in the file → its role."""
        key = self.family.draft_layers
        drafts = (size_in(self.config, key, self.where, least=0) if key else None) or 0
        depths = (self.num_hidden_layers - self.decoder_layers, self.decoder_layers)
        wide = self.config.get(self.family.double_wide) if self.family.double_wide else None
        first_wide = self.first_shared if wide else self.num_hidden_layers
        roles = TensorRoles(self.checkpoint, self.family, depths, drafts, first_wide)
        return {name: roles.of(ref) for name, ref in self.checkpoint.tensors.items()}

    @property
    def first_shared(self) -> int:
        """The first of the last layers, which take the keys and values of layers before them."""
        shared = size_in(self.config, "num_kv_shared_layers", self.where, least=0) or 0
        return self.num_hidden_layers - shared

    @cached_property
    def by_name(self) -> dict[str, TensorRef]:
        """Tensors of the language model, by their names in transformers' text model."""
        tensors = self.checkpoint.tensors
        return {
            role.name: tensors[name]
            for name, role in self.roles.items()
            if role.slot not in (CARRIED, DRAFT) and not role.scales
        }

    @property
    def runs_whole(self) -> bool:
        """Whether a text runs through the whole model, for its language model has no own class."""
        return bool(self.family.section) and not self.family.text_type

    @cached_property
    def beside(self) -> dict[str, TensorRef]:
        """Tensors beside the language model, where a decoder has no class that runs it alone."""
        if self.family.text_type or self.family.kind != DECODER:
            return {}
        tensors = self.checkpoint.tensors.items()
        return {name: ref for name, ref in tensors if self.roles[name].slot is CARRIED}

    def layers_of(self, slot: Slot) -> range:
        """Return the layers that may have a tensor of ``slot``, one of the layers' slots."""
        encoder = self.num_hidden_layers - self.decoder_layers
        stacks = self.family.stacks
        if len(stacks) > 1 and slot.name.startswith(stacks[1]):
            return range(encoder, self.num_hidden_layers)
        return range(encoder)

    def layer_path(self, layer: int) -> str:
        """Return the name of a layer's module in the text model."""
        encoder = self.num_hidden_layers - self.decoder_layers
        if layer < encoder:
            return f"{self.family.layers}.{layer}"
        return f"{self.family.stacks[1]}.{layer - encoder}"

    @cached_property
    def of_layer(self) -> list[dict[str, TensorRef]]:
        """Per layer, its part of ``by_name``."""
        found: list[dict[str, TensorRef]] = [{} for _ in range(self.num_hidden_layers)]
        for name, ref in self.by_name.items():
            layer = self.roles[ref.name].layer
            if layer is not None:
                found[layer][name] = ref
        return found

    @cached_property
    def counted(self) -> tuple[TensorRef, ...]:
        """Tensors whose values are parameters, as transformers counts them.

        Buffers do not count, and neither does a stored copy of a tied lm_head.
        """
        tied_head = self.family.head if self.tied else ""
        roles = self.roles
        return tuple(
            t
            for n, t in self.checkpoint.tensors.items()
            if roles[n].name != tied_head and not roles[n].dropped and roles[n].is_parameter
            if self.layers is None or roles[n].layer in (None, *self.layers)
        )

    @cached_property
    def experts(self) -> int:
        """Routed experts per layer; 0 where there are none."""
        counts = [0]
        for name, role in self.roles.items():
            if role.slot.width == EXPERT:
                shape = self.checkpoint.tensors[name].shape
                packed = role.slot.packed and shape
                counts.append(shape[0] if packed else (role.expert or 0) + 1)
        return max(counts)

    def channels_of(self, axis: str) -> int:
        """Length of a channel axis; 0 where the model has no such axis."""
        width = self.family.widths.get(axis)
        if width is None or width.key not in self.widths:
            return 0
        return self.widths[width.key] * self.times(axis)

    def times(self, axis: str) -> int:
        """Factor between a channel axis's width in config.json and its length."""
        key = self.family.widths[axis].times
        if isinstance(self.config.get(key), bool):
            return 2 if self.config[key] else 1
        return (size_in(self.config, key, self.where, least=0) if key else None) or 1

    @cached_property
    def ffn_outputs(self) -> tuple[dict[str, int], ...]:
        """Per layer: channel axis → number of experts; 1 for an FFN without experts."""
        found: list[dict[str, int]] = [{} for _ in range(self.num_hidden_layers)]
        for role in self.roles.values():
            if role.slot.ffn_output and role.layer is not None and role.slot.width:
                routed = role.slot.of_expert or role.slot.packed
                found[role.layer][role.slot.width] = self.experts if routed else 1
        return tuple(found)

    @cached_property
    def dropped(self) -> list[str]:
        """Names of the tensors that no output has, with ``{expert}`` for the experts' numbers."""
        names = (name for name, role in self.roles.items() if role.dropped)
        return list(dict.fromkeys(re.sub(r"experts\.\d+\.", "experts.{expert}.", n) for n in names))

    def axis_cost(self, key: str) -> int:
        """Parameters that one row (VOCAB), expert (EXPERTS) or channel of a width costs.

        With ``with_experts``, a channel costs what it does in the experts that are left.
        """
        if key == VOCAB:
            found = [(dim, count) for slot, count in self._counts() for dim in slot.dims if dim]
            rows = self.vocab_size
            return sum(n // (rows - self.missing(d)) for d, n in found if self.key_of(d) == VOCAB)
        count = self.experts_left if key == EXPERTS else 0
        return self.weights[key] // (count or self.length(key))

    def length(self, key: str) -> int:
        """Rows (VOCAB), experts of a layer (EXPERTS), or channels of a width, in the source."""
        if key == VOCAB:
            return self.vocab_size
        return self.experts if key == EXPERTS else self.widths[key]

    def parameters(self, vocab_size: int, widths: Mapping[str, int]) -> int:
        """Parameters of the model with these sizes, tied embeddings counted once.

        The paper's eq. 1 and 2 are two of the terms: one row of the vocabulary costs D parameters
        (2D if untied), one channel 3·L·D. The product of experts and channels is in ``axis_cost``.
        """
        return (
            self.groups.total()
            - (self.vocab_size - vocab_size) * self.axis_cost(VOCAB)
            - sum((self.widths[key] - widths[key]) * self.axis_cost(key) for key in self.widths)
        )

    @cached_property
    def groups(self) -> Counter[str]:
        """Parameters per group of the census; their sum is ``parameters`` at the full sizes."""
        counts: Counter[str] = Counter()
        for slot, count in self._counts():
            counts[slot.group] += count
        return counts

    def values_of(self, tensor: TensorRef) -> int:
        """Return how many values a tensor holds; an element may hold several codes."""
        opaque = self.checkpoint.opaque
        if opaque is not None and self.roles[tensor.name].opaque:
            return tensor.parameters * opaque.values_of(tensor.dtype)
        return tensor.parameters

    def shape_of(self, tensor: TensorRef) -> tuple[int, ...]:
        """Return the shape that a tensor has in the unquantized model."""
        role, opaque = self.roles[tensor.name], self.checkpoint.opaque
        if opaque is not None and role.opaque and not role.scales:
            return opaque.shape_of(tensor.shape, tensor.dtype)
        return tensor.shape

    def steps_of(self, tensor: TensorRef) -> tuple[int, ...]:
        """Return how many positions an entry of a stored tensor stands for, per dimension.

        0: for all of them, or none can be removed.
        """
        role, every = self.roles[tensor.name], len(tensor.shape)
        if not role.opaque:
            return (1,) * every
        if role.slot.packed:
            return (1, *(0,) * (every - 1))
        return steps_of(self.checkpoint, tensor) or (0,) * every

    @cached_property
    def by_slot(self) -> Counter[Slot]:
        """Parameters per slot, in all experts and in the layers that count."""
        counts: Counter[Slot] = Counter()
        for tensor in self.counted:
            counts[self.roles[tensor.name].slot] += self.values_of(tensor)
        return counts

    def _counts(self) -> Iterator[tuple[Slot, int]]:
        """Yield the parameters per slot in the experts that count."""
        for slot, count in self.by_slot.items():
            fewer = self.experts_left and slot.counts_experts and self.family.experts
            yield slot, count * self.experts_left // self.experts if fewer else count

    def key_of(self, dim: Dim | None) -> str | None:
        """VOCAB, EXPERTS, or config.json's key of a width; None where ``dim`` is never pruned."""
        if dim is None:
            return None
        if dim.axis in (VOCAB, TEXT_VOCAB):
            return VOCAB
        if dim.axis == EXPERTS:
            return EXPERTS if self.family.experts else None
        width = self.family.widths.get(dim.axis)
        return width.key if width else None

    def unit(self, dim: Dim) -> int:
        """Positions on the dimension per row (VOCAB), expert, or unit of its width."""
        alone = dim.axis in (VOCAB, TEXT_VOCAB, EXPERTS)
        return dim.copies * (1 if alone else self.times(dim.axis))

    def missing(self, dim: Dim) -> int:
        """Rows of the vocabulary that a dimension lacks, at its end: they are always kept."""
        return self.rows_beside_text if dim.axis == TEXT_VOCAB else 0

    @cached_property
    def rows_beside_text(self) -> int:
        """Rows at the vocabulary's end that a table of text alone lacks; 0 where there is none."""
        tensors = self.checkpoint.tensors
        of_text = (n for n, r in self.roles.items() if Dim(TEXT_VOCAB) in r.slot.dims[:1])
        counts = [tensors[name].shape[0] for name in of_text if tensors[name].shape]
        return max(0, self.vocab_size - min(counts)) if counts else 0

    @cached_property
    def weights(self) -> Counter[str]:
        """VOCAB, EXPERTS, or key of a width → parameters of all tensors on that axis."""
        found: Counter[str] = Counter()
        for slot, count in self._counts():
            keys = {self.key_of(dim) for dim in slot.dims} - {None}
            if slot.of_expert and self.family.experts:
                keys.add(EXPERTS)
            for key in keys:
                found[str(key)] += count
        return found
