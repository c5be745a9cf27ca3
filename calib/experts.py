"""Routed experts, one at a time, the input of each one's down_proj in view."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "compact_surgery"
"""Name under which the library's models call ``routed_experts``."""

SeeExpert = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Called with the expert, the tokens routed to it (int64 ``(n,)``) and their input of its down_proj
``(n, I)``; what it returns, if anything, goes into down_proj instead."""


@contextmanager
def watched_experts(experts: nn.Module, see: SeeExpert) -> Iterator[None]:
    """Show ``see`` the input of every expert's down_proj.

    The library calls ``routed_experts`` for classes that take part in its ExpertsInterface. Llama
    4's does not: its router scales a copy of all tokens for every expert instead.
    """
    experts.see = see  # type: ignore[assignment]
    takes_part = hasattr(experts, "has_gate")
    if not takes_part:
        experts.forward = lambda hidden: _scaled_experts(experts, hidden)
    try:
        yield
    finally:
        del experts.see
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
        changed = self.see(expert, tokens, act)
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
            changed = module.see(expert, tokens, act[tokens])
            if changed is not None:
                act[tokens] = changed
        results.append(act @ module.down_proj[expert])
    return torch.cat(results)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
