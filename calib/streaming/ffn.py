"""The FFNs of a layer, dense or of experts: their down_proj, and hooks on its input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from calib.streaming.batches import Tokens
from surgery.families.schema import STACK, Dim
from surgery.layout.layout import Layout

IMPLEMENTATION = "compact_surgery"
"""Name under which the library's models call ``routed_experts``."""

ExpertHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Called with the expert, the tokens routed to it (int64 ``(n,)``) and their input of its down_proj
``(n, I)``; what it returns, if anything, goes into down_proj instead."""


@contextmanager
def hooked_experts(experts: nn.Module, hook: ExpertHook) -> Iterator[None]:
    """Show ``hook`` the input of every expert's down_proj.

    The library calls ``routed_experts`` for classes that take part in its ExpertsInterface. Llama
    4's does not: its router scales a copy of all tokens for every expert instead.
    """
    experts.hook = hook  # type: ignore[assignment]
    takes_part = hasattr(experts, "has_gate")
    if not takes_part:
        experts.forward = lambda hidden: _scaled_experts(experts, hidden)
    try:
        yield
    finally:
        del experts.hook
        if not takes_part:
            del experts.forward


def routed_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run each expert on its tokens, in the order of the library's own loop.

    Args:
        self: The library's experts module, which holds all experts' weights.
        hidden_states: ``(tokens, D)``.
        top_k_index: int64 ``(tokens, k)``: experts of each token.
        top_k_weights: ``(tokens, k)``: what their results count.
    """
    result = torch.zeros_like(hidden_states)
    chosen = nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
    for expert in chosen[: self.num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist():
        place, tokens = torch.where(chosen[expert])
        act = _activation(self, expert, hidden_states[tokens])
        changed = self.hook(expert, tokens, act)
        out = _linear(self, "down_proj", expert, act if changed is None else changed)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        out = out * top_k_weights[tokens, place, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


def _activation(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    if module.has_gate:
        gated: torch.Tensor = module._apply_gate(_linear(module, "gate_up_proj", expert, hidden))
        return gated
    return module.act_fn(_linear(module, "up_proj", expert, hidden))


def _linear(module: Any, name: str, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    out = hidden @ weight if module.is_transposed else nn.functional.linear(hidden, weight)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out


def _scaled_experts(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Llama 4: every expert gets all tokens, those of other experts as zeros."""
    hidden = hidden_states.view(module.num_experts, -1, module.hidden_size)
    results = []
    for expert, rows in enumerate(hidden):
        gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        act = up * module.act_fn(gate)
        tokens = rows.any(dim=-1).nonzero().flatten()
        if len(tokens):
            changed = module.hook(expert, tokens, act[tokens])
            if changed is not None:
                act[tokens] = changed
        results.append(act @ module.down_proj[expert])
    return torch.cat(results)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)

PIECE_VALUES = 1 << 23
"""Values of one FFN activation at a time, tokens × I: 32 MiB in fp32.

In pieces of a quarter of this, a window of 2,048 tokens of the 8B shape took 1.3 × the time.
"""

ActivationHook = Callable[[str, int, Tokens, torch.Tensor], torch.Tensor | None]
"""Called with the channel axis, the expert (0 in a dense FFN), n tokens and what of them goes into
down_proj ``(n, I)``; what it returns, if anything, goes there instead."""


@dataclass(frozen=True)
class FfnModule:
    """A module of a layer that has channels."""

    axis: str
    """One of ``surgery.families.schema.WIDTHS``."""
    path: str
    """Of the down_proj, or of the experts, inside the layer."""
    routed: bool
    """Whether it is experts."""


@contextmanager
def hooked_ffn(
    layer: nn.Module, ffn_modules: Sequence[FfnModule], ids: torch.Tensor, hook: ActivationHook
) -> Iterator[None]:
    """Show ``hook`` the activations of all ``ffn_modules`` while ``layer`` runs.

    Args:
        layer: The library's decoder layer.
        ffn_modules: Of this layer.
        ids: int64 ``(windows, tokens)``: what the layer runs on.
        hook: Sees, and may change, the activations.
    """
    with ExitStack() as stack:
        for ffn_module in ffn_modules:
            module = layer.get_submodule(ffn_module.path)
            if ffn_module.routed:
                stack.enter_context(_routed(ffn_module, module, ids, hook))
            else:
                above, _, _ = ffn_module.path.rpartition(".")
                ffn = layer.get_submodule(above) if above and len(ffn_modules) == 1 else None
                stack.enter_context(_dense(ffn_module, module, ffn, ids, hook))
        yield


@contextmanager
def _routed(
    ffn_module: FfnModule, module: nn.Module, ids: torch.Tensor, hook: ActivationHook
) -> Iterator[None]:
    def see_expert(expert: int, places: torch.Tensor, act: torch.Tensor) -> torch.Tensor | None:
        return hook(ffn_module.axis, expert, Tokens.at(ids, places.cpu()), act)

    with hooked_experts(module, see_expert):
        yield


@contextmanager
def _dense(
    ffn_module: FfnModule,
    down_proj: nn.Module,
    ffn: nn.Module | None,
    ids: torch.Tensor,
    hook: ActivationHook,
) -> Iterator[None]:
    """Let ``ffn``, if it is a module of its own, work on pieces of its tokens.

    An FFN takes each token by itself, so pieces change nothing but the size of its activations:
    at I = 14,336 those of a window of 2,048 tokens take 350 MB whole and 90 MB in pieces.
    """
    part = slice(0, ids.shape[1])

    def in_pieces(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal part
        parts = pieces(hidden.shape[0], hidden.shape[1], channels)
        if len(parts) == 1:
            part = parts[0]
            return whole(hidden)
        result = torch.empty_like(hidden)
        for part in parts:
            result[:, part] = whole(hidden[:, part])
        return result

    def pre_hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        act = inputs[0]
        changed = hook(ffn_module.axis, 0, Tokens.of(ids, part), act.flatten(0, -2))
        return None if changed is None else (changed.view(act.shape), *inputs[1:])

    handle = down_proj.register_forward_pre_hook(pre_hook)
    if ffn is not None:
        whole, channels = ffn.forward, _channels(down_proj)
        ffn.forward = in_pieces
    try:
        yield
    finally:
        handle.remove()
        if ffn is not None:
            del ffn.forward


def pieces(windows: int, tokens: int, channels: int) -> list[slice]:
    """Cut ``tokens`` into equal pieces whose activation has at most about ``PIECE_VALUES``."""
    count = min(tokens, -(-windows * tokens * channels // PIECE_VALUES))
    edges = [tokens * piece // count for piece in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _channels(down_proj: nn.Module) -> int:
    """Channels that go into a Linear ``[D, I]`` or a Conv1D ``[I, D]``."""
    weight = down_proj.get_parameter("weight")
    return weight.shape[1] if isinstance(down_proj, nn.Linear) else weight.shape[0]


ExpertKey = tuple[str, int]
"""Channel axis and expert, 0 for an FFN that is no expert."""


def down_name(ffn_module: FfnModule) -> str:
    """The parameter, by its name inside the layer."""
    return f"{ffn_module.path}.down_proj" if ffn_module.routed else f"{ffn_module.path}.weight"


def down_matrices(
    layer: nn.Module, ffn_module: FfnModule, weight: torch.Tensor
) -> list[torch.Tensor]:
    """Return ``weight``, shaped as a module's parameter, as views ``[D, I]``: one per expert.

    A Conv1D holds ``[I, D]``; experts lie behind one another, and those of classes without
    ``is_transposed``, such as Llama 4's, hold ``[I, D]`` each.
    """
    module = layer.get_submodule(ffn_module.path)
    if ffn_module.routed:
        transposed = getattr(module, "is_transposed", True)
        return [matrix.T if transposed else matrix for matrix in weight]
    return [weight if isinstance(module, nn.Linear) else weight.T]


def cut_weight(
    layer: nn.Module,
    ffn_module: FfnModule,
    kept: Sequence[np.ndarray],
    refitted: Mapping[ExpertKey, torch.Tensor],
) -> torch.Tensor:
    """Return a unit's down_proj with zeros for the channels that go: a mask of its input.

    Args:
        layer: The library's.
        ffn_module: Of the layer.
        kept: Per expert the channels that stay.
        refitted: ``[D, K]`` for those whose columns are others than before.
    """
    own = layer.get_parameter(down_name(ffn_module)).data
    new = torch.zeros_like(own)
    pairs = zip(*(down_matrices(layer, ffn_module, weight) for weight in (own, new)), strict=True)
    for expert, (before, after) in enumerate(pairs):
        stays = torch.from_numpy(kept[expert]).to(own.device)
        better = refitted.get((ffn_module.axis, expert))
        after[:, stays] = before[:, stays] if better is None else better.to(own.device, own.dtype)
    return new


def down_proj_tensors(layout: Layout, index: int) -> list[str]:
    """The file's names of a layer's down_projs."""
    names = (ref.name for ref in layout.of_layer[index].values())
    return [n for n in names if layout.roles[n].slot.ffn_output and layout.roles[n].slot.width]


def file_matrices(layout: Layout, name: str, tensor: torch.Tensor) -> dict[ExpertKey, torch.Tensor]:
    """Return ``tensor``, laid out as the file's tensor ``name``, as views ``[D, channels]``."""
    place = layout.roles[name]
    axis, dims = place.slot.width, list(place.slot.dims)
    assert axis is not None
    packed = Dim(STACK) in dims
    transposed = dims.index(Dim(axis)) - packed == 0
    parts = enumerate(tensor) if packed else [(place.expert or 0, tensor)]
    return {(axis, expert): part.T if transposed else part for expert, part in parts}
