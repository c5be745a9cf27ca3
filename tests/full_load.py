"""What streaming must equal: the whole model loaded by transformers, hooks on its modules."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.family import EXPERT
from surgery.layout import Layout
from surgery.tokenizer import load_tokenizer
from tests import tiny
from tests.plans import layout_of

Seen = list[dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]]]
"""Per layer: channel axis → (expert, token ids, input of its down_proj) as they came."""


def hooked_activations(path: Path, key: str, windows: Sequence[np.ndarray]) -> Seen:
    """Run all windows of one length together and see what goes into every down_proj."""
    model, layout = tiny.load(path, key), layout_of(path)
    seen: Seen = [defaultdict(list) for _ in layout.watched]
    ids = torch.empty(0)

    def dense(layer: int, axis: str) -> Any:
        return lambda _, inputs: seen[layer][axis].append(
            (0, ids.flatten(), inputs[0].flatten(0, -2).clone())
        )

    def routed(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            for expert, tokens, act in expert_activations(module, *inputs, *named.values()):
                seen[layer][EXPERT].append((expert, ids.flatten()[tokens], act))

        return hook

    modules = dict(model.named_modules())
    for layer, tensors in enumerate(layout.of_layer):
        for axis, name in watched_modules(layout, tensors):
            modules[name_in(modules, name)].register_forward_pre_hook(dense(layer, axis))
        prefix = name_in(modules, f"{layout.family.layers}.{layer}.")
        for name, module in modules.items():
            if name.startswith(prefix) and name.endswith(".experts"):
                module.register_forward_pre_hook(routed(layer), with_kwargs=True)
    for length in dict.fromkeys(map(len, windows)):
        ids = torch.from_numpy(np.stack([w for w in windows if len(w) == length]))
        with torch.no_grad():
            model(input_ids=ids)
    return seen


def watched_modules(layout: Layout, tensors: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(axis, module) of every down_proj of a layer that is no expert's."""
    for name, ref in tensors.items():
        slot = layout.places[ref.name].slot
        if slot.watched and slot.width and slot.width != EXPERT:
            yield slot.width, name.removesuffix(".weight")


def name_in(modules: dict[str, Any], name: str) -> str:
    """What a module of the language model is called inside a wrapper."""
    if "model.language_model" in modules:
        return "model.language_model." + name.removeprefix("model.")
    return f"language_model.{name}" if "language_model.model" in modules else name


def expert_activations(
    module: Any, hidden: torch.Tensor, index: Any = None, *_: Any
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, tokens, activations) from an experts module's own weights and its input."""
    for expert in range(module.num_experts):
        weight = module.gate_up_proj[expert].detach()
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
            act = module._apply_gate(gate_up)
        if len(tokens):
            yield expert, tokens, act


def full_load_bits(path: Path, key: str, texts: Sequence[str]) -> float:
    """Σ −log2 p over ``texts``, each behind bos, by one forward pass each."""
    model, tokenizer, bits = tiny.load(path, key), load_tokenizer(path), 0.0
    bos = model.config.get_text_config().bos_token_id
    for text in texts:
        ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        bits += float(nats) / math.log(2)
    return bits
