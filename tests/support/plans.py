"""Plans with channels chosen by chance, and the dense model that each must equal."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from surgery.apply.edits import kept_channels
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.families.schema import EXPERT, STACK, Dim
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan
from surgery.planning.planner import plan_cut
from surgery.planning.request import CutRequest, SizeChoice
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
    path: Path, vocab_size: int, widths: int | Mapping[str, int] | float, seed: int = 0
) -> Plan:
    """Plan a cut of ``path`` to ``widths``: one for all, one each, or a share of each."""
    layout = layout_of(path)
    if isinstance(widths, float):
        widths = {key: max(1, round(widths * size)) for key, size in layout.widths.items()}
    elif isinstance(widths, int):
        widths = dict.fromkeys(layout.widths, widths)
    return plan_to(layout, Sizes(vocab_size, widths), random_stats(layout, seed))


def plan_to(layout: Layout, sizes: Sizes, stats: ChannelStats | None) -> Plan:
    """Plan a cut to ``sizes``, channels by all tokens alike."""
    request = CutRequest(channels=ChannelOptions(criterion="act2"))
    return plan_cut(layout, SizeChoice(rarity_of(layout), sizes, request=request), stats)


def masked_dense(source: Path, plan: Plan, output: Path) -> Path:
    """Copy ``source`` with zeros where the removed channels go into each down_proj."""
    layout = layout_of(source)
    kept = kept_channels(plan, layout)
    shutil.copytree(source, output)
    for file in sorted(output.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            place = layout.roles[name]
            if place.slot.ffn_output and place.layer is not None and place.slot.width:
                chosen = kept[place.layer][place.slot.width]
                dim = place.slot.dims.index(Dim(place.slot.width))
                parts = tensor if Dim(STACK) in place.slot.dims else [tensor]
                dim -= Dim(STACK) in place.slot.dims
                first = place.expert or 0 if place.slot.width == EXPERT else 0
                for number, part in enumerate(parts):
                    gone = np.setdiff1d(np.arange(part.shape[dim]), chosen[first + number])
                    part.index_fill_(dim, torch.from_numpy(gone), 0)
        save_file(tensors, file, {"format": "pt"})
    return output


def assert_equals_masked_dense(source: Path, output: Path, plan: Plan, key: str = "llama") -> None:
    kept = torch.from_numpy(plan.ids().kept)
    dense = tiny.load(masked_dense(source, plan, output.with_name("masked")), key)
    pruned = tiny.load(output, key)
    new = torch.randint(len(kept), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense(input_ids=kept[new]).logits[..., kept]
        found = pruned(input_ids=new).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.05  # logits that could not differ would prove nothing
    shutil.rmtree(output.with_name("masked"))
