"""Plans with channels chosen by chance, and the dense model that each must equal."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from surgery.apply.edits import kept_parts
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.families.schema import EXPERT, Dim
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.choice import SizeChoice
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.request import CutRequest
from surgery.planning.sizes import Sizes
from surgery.stats.channel_stats import AxisSums, ChannelStats, StatsInfo
from surgery.stats.channels import ChannelOptions
from surgery.vocabulary.order import rarity_of
from tests.support import tiny


def layout_of(path: Path) -> Layout:
    return read_layout(Checkpoint.open(path))


def random_stats(layout: Layout, seed: int = 0) -> ChannelStats:
    """Statistics in which chance decides, different in each layer and expert."""
    rng = np.random.default_rng(seed)
    source = layout.checkpoint
    info = StatsInfo(
        source.fingerprint, "", 1, 1, 1, [layout.vocab_size], "float32", weights=source.weights
    )
    layers: list[dict[str, AxisSums]] = []
    for axes in layout.ffn_outputs:
        layers.append({})
        for axis, experts in axes.items():
            sums = rng.random((1, experts, layout.channels_of(axis)))
            layers[-1][axis] = AxisSums(sums, sums, np.full((1, experts), 1000), sums[0], sums[0])
    counts = np.ones(layout.vocab_size, dtype=np.int64)
    return ChannelStats(info, layers, counts, np.zeros_like(counts), rng.random(len(layers)))


def random_plan(
    path: Path,
    vocab_size: int,
    widths: int | Mapping[str, int] | float,
    seed: int = 0,
    *,
    experts: int = 0,
    layers: Sequence[Sequence[int]] = (),
) -> Plan:
    """Plan a cut of ``path`` to ``widths``: one for all, one each, or a share of each."""
    layout = layout_of(path)
    if isinstance(widths, float):
        widths = {key: max(1, round(widths * size)) for key, size in layout.widths.items()}
    elif isinstance(widths, int):
        widths = dict.fromkeys(layout.widths, widths)
    sizes = Sizes(vocab_size, widths, layers=layers, experts=experts)
    return plan_to(layout, sizes, random_stats(layout, seed))


def plan_to(layout: Layout, sizes: Sizes, stats: ChannelStats | None) -> Plan:
    """Plan a cut to ``sizes``, channels by all tokens alike, experts by chance."""
    channels = ChannelOptions(criterion="act2", expert_criterion="random")
    request = CutRequest(channels=channels)
    return plan_cut(layout, SizeChoice(rarity_of(layout), sizes, request=request), stats)


def masked_dense(source: Path, plan: Plan, output: Path) -> Path:
    """Copy ``source`` with zeros where the removed channels go into each down_proj.

    Removed experts have zeros everywhere in it; ``without_experts`` keeps routers from them.
    """
    layout = layout_of(source)
    kept = kept_parts(plan, layout)
    shutil.copytree(source, output)
    for file in sorted(output.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            place = layout.roles[name]
            if place.slot.ffn_output and place.layer is not None and place.slot.width:
                axis = place.slot.width
                chosen = kept[place.layer].of_source(axis, layout.experts)
                dim = place.slot.dims.index(Dim(axis))
                parts = tensor if place.slot.packed else [tensor]
                dim -= place.slot.packed
                first = place.expert or 0 if axis == EXPERT else 0
                for number, part in enumerate(parts):
                    gone = np.setdiff1d(np.arange(part.shape[dim]), chosen[first + number])
                    part.index_fill_(dim, torch.from_numpy(gone), 0)
        save_file(tensors, file, {"format": "pt"})
    return output


def without_experts(model: Any, plan: Plan, source: Path) -> None:
    """Let the routers of ``model`` choose none of the experts that ``plan`` removes.

    Logits of removed experts are −inf, and so are their correction biases.
    """
    layout = layout_of(source)
    for layer, kept in enumerate(kept_parts(plan, layout)):
        gone = [e for e in range(layout.experts) if e not in kept.experts]
        if not len(kept.experts) or not gone:
            continue
        inside = f".layers.{layer}."
        modules = [(n, m) for n, m in model.named_modules() if inside in n]
        (router,) = (m for n, m in modules if is_router(n, m, layout.experts))
        router.forward = with_masked_logits(router.forward, gone)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if inside in name and name.endswith(("correction_bias", "expert_bias")):
                tensor.data[..., gone] = float("-inf")


def is_router(name: str, module: Any, experts: int) -> bool:
    weight = getattr(module, "weight", None)
    named = name.endswith((".gate", ".router", ".wg", ".router.proj"))
    return named and weight is not None and weight.shape[0] == experts


def with_masked_logits(forward: Any, gone: list[int]) -> Any:
    linear = torch.nn.functional.linear

    def masked(*inputs: Any) -> torch.Tensor:
        logits = linear(*inputs)
        logits[..., gone] = float("-inf")
        return logits

    def run(*inputs: Any, **named: Any) -> Any:
        with patch("torch.nn.functional.linear", masked):
            return forward(*inputs, **named)

    return run


def assert_equals_masked_dense(source: Path, output: Path, plan: Plan, key: str = "llama") -> None:
    kept = torch.from_numpy(plan.ids().kept)
    dense = tiny.load(masked_dense(source, plan, output.with_name("masked")), key)
    if plan.after.experts != plan.before.experts:
        without_experts(dense, plan, source)
    pruned = tiny.load(output, key)
    new = torch.randint(len(kept), (2, 40), generator=torch.Generator().manual_seed(1))
    expected = tiny.logits_of(dense, kept[new])[..., kept]
    found = tiny.logits_of(pruned, new)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.05  # logits that could not differ would prove nothing
    shutil.rmtree(output.with_name("masked"))
