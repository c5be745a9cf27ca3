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

from calib.streaming.batches import Routed, Tokens
from surgery.families.schema import Dim
from surgery.layout.layout import Layout

IMPLEMENTATION = "compact_surgery"
"""Name under which the library's models call ``routed_experts``."""

ExpertHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Called with the expert, the tokens routed to it (int64 ``(n,)``), and the input of its down_proj
``(n, I)``. A tensor that it returns replaces this input."""

OutputHook = Callable[[int, torch.Tensor, Routed], object]
"""Called with the expert, the tokens routed to it (int64 ``(n,)``), and what it puts out."""


@contextmanager
def hooked_experts(
    block: nn.Module, experts: nn.Module, hook: ExpertHook, outputs: OutputHook | None = None
) -> Iterator[None]:
    """Call ``hook`` with the input of every expert's down_proj, and ``outputs`` with its output.

    The library calls ``routed_experts`` for classes that use its ExpertsInterface. Llama 4's class
    does not use it: its router scales a copy of all tokens for every expert. ``block`` is the
    module that holds the experts and their router.
    """
    experts.hook, experts.outputs = hook, outputs  # type: ignore[assignment]
    uses_interface, handle = hasattr(experts, "has_gate"), None
    if not uses_interface:
        scores: list[torch.Tensor] = []
        router = block.get_submodule("router")
        handle = router.register_forward_hook(lambda _, __, made: scores.append(made[0]))
        experts.forward = lambda hidden: _scaled_experts(experts, hidden, scores.pop())
    try:
        yield
    finally:
        del experts.hook, experts.outputs
        if handle is not None:
            handle.remove()
            del experts.forward


def routed_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run each expert on its tokens, in the order of the library's own loop.

    Args:
        self: The library's experts module, which holds all experts' weights.
        hidden_states: ``(tokens, D)``.
        top_k_index: int64 ``(tokens, k)``: experts of each token.
        top_k_weights: ``(tokens, k)``: weights of their outputs.
    """
    result = torch.zeros_like(hidden_states)
    chosen = nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
    for expert in chosen[: self.num_experts].sum(dim=(-1, -2)).nonzero().flatten().tolist():
        rank, tokens = torch.where(chosen[expert])
        act = _activation(self, expert, hidden_states[tokens])
        changed = self.hook(expert, tokens, act)
        out = _linear(self, "down_proj", expert, act if changed is None else changed)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        gate = top_k_weights[tokens, rank]
        if self.outputs is not None:
            self.outputs(expert, tokens, Routed(out, gate, gate))
        out = out * gate[:, None]
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


def _scaled_experts(module: Any, hidden_states: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Llama 4: every expert gets all tokens; tokens of other experts are zeros.

    ``scores`` ``(tokens, experts)`` are the router's, which have scaled the tokens already.
    """
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
        if len(tokens) and module.outputs is not None:
            gate = scores[tokens, expert]
            routed = Routed(results[-1][tokens], gate, torch.ones_like(gate))
            module.outputs(expert, tokens, routed)
    return torch.cat(results)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)

PIECE_VALUES = 1 << 23
"""Values of one FFN activation at a time, tokens × I: 32 MiB in fp32.

With a quarter of this, a window of 2,048 tokens of the 8B shape took 1.3 × the time.
"""

ActivationHook = Callable[[str, int, Tokens, torch.Tensor], torch.Tensor | None]
"""Called with the channel axis, the expert (0 in a dense FFN), n tokens, and the input of down_proj
``(n, I)``. A tensor that it returns replaces this input."""


@dataclass(frozen=True)
class FfnModule:
    """A module of a layer that has channels."""

    axis: str
    """One of ``surgery.families.schema.WIDTHS``."""
    path: str
    """Of the down_proj, or of the experts, inside the layer."""
    routed: bool
    """Whether it holds experts."""
    alone: bool = False
    """Whether the module above it holds this FFN and nothing else, so that it can run in pieces."""


RoutedOutputHook = Callable[[int, Tokens, Routed], object]
"""Called with the expert, n tokens, and what it puts out for them."""


@contextmanager
def hooked_ffn(
    layer: nn.Module,
    ffn_modules: Sequence[FfnModule],
    ids: torch.Tensor,
    hook: ActivationHook,
    outputs: RoutedOutputHook | None = None,
) -> Iterator[None]:
    """Call ``hook`` with the activations of all ``ffn_modules`` while ``layer`` runs.

    Args:
        layer: The library's decoder layer.
        ffn_modules: Of this layer.
        ids: int64 ``(windows, tokens)``: the tokens that the layer runs on.
        hook: May read and replace the activations.
        outputs: May read what routed experts put out.
    """
    with ExitStack() as stack:
        for ffn_module in ffn_modules:
            module = layer.get_submodule(ffn_module.path)
            above, _, _ = ffn_module.path.rpartition(".")
            if ffn_module.routed:
                block = layer.get_submodule(above)
                stack.enter_context(_routed(ffn_module.axis, block, module, ids, hook, outputs))
            else:
                ffn = layer.get_submodule(above) if ffn_module.alone else None
                stack.enter_context(_dense(ffn_module, module, ffn, ids, hook))
        yield


@contextmanager
def _routed(
    axis: str,
    block: nn.Module,
    module: nn.Module,
    ids: torch.Tensor,
    hook: ActivationHook,
    outputs: RoutedOutputHook | None,
) -> Iterator[None]:
    def expert_hook(expert: int, tokens: torch.Tensor, act: torch.Tensor) -> torch.Tensor | None:
        return hook(axis, expert, Tokens.at(ids, tokens.cpu()), act)

    def output_hook(expert: int, tokens: torch.Tensor, routed: Routed) -> None:
        if outputs is not None:
            outputs(expert, Tokens.at(ids, tokens.cpu()), routed)

    with hooked_experts(block, module, expert_hook, output_hook if outputs is not None else None):
        yield


@contextmanager
def _dense(
    ffn_module: FfnModule,
    down_proj: nn.Module,
    ffn: nn.Module | None,
    ids: torch.Tensor,
    hook: ActivationHook,
) -> Iterator[None]:
    """Hook a dense FFN, and let it compute a piece of the tokens at a time if ``ffn`` is given.

    An FFN treats each token alone, so pieces change nothing but the size of its activations. At
    I = 14,336, those of a window of 2,048 tokens take 350 MB whole and 90 MB in pieces.
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


@dataclass(frozen=True)
class FfnCall:
    """What an FFN was given and what it gave, ``(tokens, D)`` each."""

    hidden: torch.Tensor
    output: torch.Tensor


def ffn_above(layer: nn.Module, ffn_module: FfnModule) -> nn.Module:
    """Return the module that holds an FFN which is ``alone``: its gate, up and down."""
    return layer.get_submodule(ffn_module.path.rpartition(".")[0])


@contextmanager
def seen_ffn(layer: nn.Module, ffn_module: FfnModule) -> Iterator[list[FfnCall]]:
    """Collect the calls of an FFN that is ``alone`` and takes nothing but hidden states."""
    calls: list[FfnCall] = []
    if not ffn_module.alone or ffn_module.routed:
        yield calls
        return

    def hook(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], made: Any) -> None:
        if len(inputs) == 1 and not named and isinstance(made, torch.Tensor):
            calls.append(FfnCall(inputs[0].flatten(0, -2), made.flatten(0, -2)))

    handle = ffn_above(layer, ffn_module).register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def no_hook(axis: str, expert: int, tokens: Tokens, act: torch.Tensor) -> None:
    """Leave activations as they are."""


def pieces(windows: int, tokens: int, channels: int) -> list[slice]:
    """Split ``tokens`` into equal pieces whose activation has about ``PIECE_VALUES`` at most."""
    count = min(tokens, -(-windows * tokens * channels // PIECE_VALUES))
    edges = [tokens * piece // count for piece in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _channels(down_proj: nn.Module) -> int:
    """Return the input channels of a Linear ``[D, I]`` or a Conv1D ``[I, D]``."""
    weight = down_proj.get_parameter("weight")
    return weight.shape[1] if isinstance(down_proj, nn.Linear) else weight.shape[0]


ExpertKey = tuple[str, int]
"""Channel axis and expert; 0 for a dense FFN."""


def down_name(ffn_module: FfnModule) -> str:
    """Return the name of the down_proj parameter inside the layer."""
    return f"{ffn_module.path}.down_proj" if ffn_module.routed else f"{ffn_module.path}.weight"


def down_matrices(
    layer: nn.Module, ffn_module: FfnModule, weight: torch.Tensor
) -> list[torch.Tensor]:
    """Return views ``[D, I]`` of ``weight``, one per expert; its shape is the parameter's.

    A Conv1D holds ``[I, D]``. Experts are stacked on the first axis; those of classes without
    ``is_transposed``, such as Llama 4's, hold ``[I, D]`` each.
    """
    module = layer.get_submodule(ffn_module.path)
    if ffn_module.routed:
        transposed = getattr(module, "is_transposed", True)
        return [matrix.T if transposed else matrix for matrix in weight]
    return [weight if isinstance(module, nn.Linear) else weight.T]


def masked_down_proj(
    layer: nn.Module,
    ffn_module: FfnModule,
    kept: Sequence[np.ndarray],
    refitted: Mapping[ExpertKey, torch.Tensor],
) -> torch.Tensor:
    """Return down_proj with zero columns for removed channels, which masks its input.

    Args:
        layer: The library's.
        ffn_module: Of the layer.
        kept: The kept channels of each expert.
        refitted: ``[D, K]`` for experts whose kept columns are replaced.
    """
    own = layer.get_parameter(down_name(ffn_module)).data
    new = torch.zeros_like(own)
    pairs = zip(*(down_matrices(layer, ffn_module, weight) for weight in (own, new)), strict=True)
    for expert, (before, after) in enumerate(pairs):
        columns = torch.from_numpy(kept[expert]).to(own.device)
        better = refitted.get((ffn_module.axis, expert))
        after[:, columns] = (
            before[:, columns] if better is None else better.to(own.device, own.dtype)
        )
    return new


def pruned_parameters(
    layer: nn.Module,
    ffn_module: FfnModule,
    channel_dims: Mapping[str, int],
    kept: Sequence[np.ndarray],
    refitted: Mapping[ExpertKey, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return parameters of ``layer`` with which the FFN computes its kept channels alone.

    An FFN of linear maps, gate and up apart, gets matrices of the pruned sizes. At I' = 0.58 I, a
    layer of SmolLM2-135M takes three quarters of the time. Others get ``masked_down_proj``.

    Args:
        layer: The library's.
        ffn_module: Of the layer.
        channel_dims: The parameters that carry the FFN's axis, each with its dimension.
        kept: The kept channels of each expert.
        refitted: ``[D, K]`` for experts whose kept columns are replaced.
    """
    down = down_name(ffn_module)
    above = ffn_module.path.rpartition(".")[0]
    owners = {name: layer.get_submodule(name.rpartition(".")[0]) for name in channel_dims}
    plain = all(isinstance(each, nn.Linear) and n.startswith(above) for n, each in owners.items())
    if ffn_module.routed or down not in channel_dims or not plain:
        return {down: masked_down_proj(layer, ffn_module, kept, refitted)}
    found = {}
    for name, dim in channel_dims.items():
        own = layer.get_parameter(name).data
        found[name] = own.index_select(dim, torch.from_numpy(kept[0]).to(own.device))
    better = refitted.get((ffn_module.axis, 0))
    if better is not None:
        found[down] = better.to(found[down].device, found[down].dtype)
    return found


def down_proj_tensors(layout: Layout, index: int) -> list[str]:
    """Return the file's names of a layer's down_proj tensors."""
    names = (ref.name for ref in layout.of_layer[index].values())
    return [n for n in names if layout.roles[n].slot.ffn_output and layout.roles[n].slot.width]


def file_matrices(
    layout: Layout, name: str, tensor: torch.Tensor, experts: np.ndarray | None = None
) -> dict[ExpertKey, torch.Tensor]:
    """Return views ``[D, channels]`` of ``tensor``, laid out as the source's tensor ``name``.

    ``experts`` are those that a packed tensor holds, by their numbers in the source; None is all.
    """
    role = layout.roles[name]
    axis, dims = role.slot.width, list(role.slot.dims)
    assert axis is not None
    packed = role.slot.packed
    transposed = dims.index(Dim(axis)) - packed == 0
    matrices = list(tensor) if packed else [tensor]
    numbers = [role.expert or 0]
    if packed:
        numbers = list(range(len(tensor))) if experts is None else experts.tolist()
    parts = zip(numbers, matrices, strict=True)
    return {(axis, expert): part.T if transposed else part for expert, part in parts}
