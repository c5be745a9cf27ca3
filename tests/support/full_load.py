"""What streaming must equal: the whole model loaded by transformers, hooks on its modules."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calib.streaming.batches import Routed, Tokens
from calib.streaming.empty_model import Conversion
from surgery.families.schema import EXPERT
from surgery.layout.layout import Layout
from surgery.tokenizer.tokenizer_file import load_tokenizer
from tests.support import tiny
from tests.support.plans import layout_of

Activations = list[dict[str, list[tuple[int, Tokens, torch.Tensor]]]]
"""Per layer: channel axis → (expert, its tokens, input of its down_proj) as they came."""


@dataclass
class FullLoad:
    """What hooks have seen."""

    activations: Activations
    cosines: list[float]
    """Of each layer: Σ over tokens of the cosine between its input and output."""
    norms: list[dict[str, torch.Tensor]]
    """Per layer: channel axis → float64 ``(experts, I)``, of the columns of its down_proj."""
    ids: torch.Tensor
    """int64 ``(windows, tokens)`` that are running."""
    outputs: list[list[tuple[int, Tokens, Routed]]]
    """Per layer: (expert, its tokens, what it puts out for them) as they came."""
    scores: torch.Tensor | None = None
    """What Llama 4's router gave last."""

    def router(self, _: Any, __: Any, output: Any) -> None:
        self.scores = output[0]

    def dense(self, layer: int, axis: str) -> Any:
        return lambda _, inputs: self.activations[layer][axis].append(
            (0, Tokens.of(self.ids), inputs[0].flatten(0, -2).clone())
        )

    def routed(self, layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            for expert, tokens, act in expert_activations(module, *inputs, *named.values()):
                shown = (expert, Tokens.at(self.ids, tokens), act)
                self.activations[layer][EXPERT].append(shown)
            for expert, tokens, routed in expert_outputs(
                module, self.scores, *inputs, *named.values()
            ):
                self.outputs[layer].append((expert, Tokens.at(self.ids, tokens), routed))

        return hook

    def whole(self, layer: int) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else named["hidden_states"]
            after = output[0] if isinstance(output, tuple | list) else output
            states = before.double().flatten(2), after.double().flatten(2)
            cosines = torch.cosine_similarity(states[0], states[1], dim=-1)
            self.cosines[layer] += float(cosines.sum())

        return hook


def hooked(path: Path, key: str, windows: Sequence[np.ndarray]) -> FullLoad:
    """Run all windows of one length together; see every layer and what goes into its down_proj."""
    model, layout = tiny.load(path, key), layout_of(path)
    depth = layout.num_hidden_layers
    found = FullLoad(
        [defaultdict(list) for _ in range(depth)],
        [0.0] * depth,
        [{} for _ in range(depth)],
        torch.empty(0),
        [[] for _ in range(depth)],
    )
    modules, conversion = dict(model.named_modules()), Conversion(model)

    def path_of(name: str) -> str:
        """The parameter of the whole model that a tensor of the language model becomes."""
        return conversion.target(layout.by_name[name].name)[0]

    for layer, tensors in enumerate(layout.of_layer):
        for axis, name in watched_modules(layout, tensors):
            module = modules[path_of(name).removesuffix(".weight")]
            module.register_forward_pre_hook(found.dense(layer, axis))
            columns = module.weight if isinstance(module, nn.Linear) else module.weight.T
            found.norms[layer][axis] = columns.detach().double().norm(dim=0)[None]
        first, between, _ = path_of(next(iter(tensors))).partition(f".{layer}.")
        prefix = first + between
        modules[prefix.rstrip(".")].register_forward_hook(found.whole(layer), with_kwargs=True)
        for name, module in modules.items():
            if name.startswith(prefix) and name.endswith("feed_forward.router"):
                module.register_forward_hook(found.router)
            if name.startswith(prefix) and name.endswith(".experts"):
                module.register_forward_pre_hook(found.routed(layer), with_kwargs=True)
                inner = (
                    2 if getattr(module, "is_transposed", not hasattr(module, "has_gate")) else 1
                )
                found.norms[layer][EXPERT] = module.down_proj.detach().double().norm(dim=inner)
    for length in dict.fromkeys(map(len, windows)):
        found.ids = torch.from_numpy(np.stack([w for w in windows if len(w) == length]))
        with torch.no_grad():
            tiny.logits_of(model, found.ids)
    return found


def window_norms(
    seen: list[tuple[int, Tokens, torch.Tensor]], experts: int, channels: int
) -> np.ndarray:
    """float64 ``(experts, I)``: Σ over windows of the norm of each channel's activations."""
    total = np.zeros((experts, channels))
    for expert, tokens, act in seen:
        for window in tokens.windows.unique():
            total[expert] += np.linalg.norm(act[tokens.windows == window].double().numpy(), axis=0)
    return total


def watched_modules(layout: Layout, tensors: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(axis, tensor) of every down_proj of a layer that is no expert's."""
    for name, ref in tensors.items():
        slot = layout.roles[ref.name].slot
        if slot.ffn_output and slot.width and slot.width != EXPERT:
            yield slot.width, name


def expert_activations(
    module: Any, hidden: torch.Tensor, index: Any = None, *_: Any
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, tokens, activations) from an experts module's own weights and its input."""
    for expert in range(module.num_experts):
        weight = getattr(module, "gate_up_proj", None)
        weight = (module.up_proj if weight is None else weight)[expert].detach()
        if index is None:  # Llama 4: all tokens for each expert, those of others zero
            rows = hidden.view(module.num_experts, -1, module.hidden_size)[expert]
            tokens = rows.abs().sum(-1).nonzero().flatten()
            gate, up = (rows[tokens] @ weight).chunk(2, dim=-1)
            act = up * module.act_fn(gate)
        else:
            tokens = (index == expert).any(-1).nonzero().flatten()
            gate_up = hidden[tokens] @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                gate_up = gate_up + module.gate_up_proj_bias[expert].detach()
            act = module._apply_gate(gate_up) if module.has_gate else module.act_fn(gate_up)
        if len(tokens):
            yield expert, tokens, act


@torch.no_grad()
def expert_outputs(
    module: Any, scores: Any, hidden: torch.Tensor, index: Any = None, weights: Any = None
) -> Iterator[tuple[int, torch.Tensor, Routed]]:
    """(expert, tokens, output) as the library's own code computes it for one expert at a time."""
    if index is None:  # Llama 4: the router's scores have scaled the experts' input
        outputs = module.forward(hidden).view(module.num_experts, -1, hidden.shape[-1])
        for expert, rows in enumerate(hidden.view(*outputs.shape)):
            tokens = rows.abs().sum(-1).nonzero().flatten()
            gate = scores[tokens, expert]
            yield expert, tokens, Routed(outputs[expert, tokens], gate, torch.ones_like(gate))
        return
    for expert in range(module.num_experts):
        rank, tokens = (expert == index.T).nonzero(as_tuple=True)  # in the library's order
        if len(tokens):
            alone, ones = torch.full((len(tokens), 1), expert), torch.ones(len(tokens), 1)
            output = module.forward(hidden[tokens], alone, ones)
            gate = weights[tokens, rank]
            yield expert, tokens, Routed(output, gate, gate)


def full_load_bits(path: Path, key: str, texts: Sequence[str]) -> float:
    """Σ −log2 p over ``texts``, each behind bos, by one forward pass each."""
    model, tokenizer, bits = tiny.load(path, key), load_tokenizer(path), 0.0
    bos = model.config.get_text_config().bos_token_id
    for text in texts:
        ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids]
        with torch.no_grad():
            logits = tiny.logits_of(model, torch.tensor([ids]))[0, :-1].double()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        bits += float(nats) / math.log(2)
    return bits
