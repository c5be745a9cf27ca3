"""2SSP (arXiv 2501.17771): channels by the norm of their activations, then whole attentions.

A standard config.json has no place for layers without an attention. So this is only tried.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from calib.scoring.score import count_bits, predictions_of
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import pruned_parameters
from calib.streaming.hidden_states import HiddenStates
from calib.streaming.settings import PassSettings
from calib.streaming.stand_ins import silenced
from calib.streaming.weights import WeightReader
from surgery.errors import BudgetError, FamilyError
from surgery.families.schema import FFN
from surgery.layout.layout import Layout
from surgery.planning.sizes import Sizes, whole
from surgery.process import Stopwatch
from surgery.stats.channels import Kept

ALPHA = 1.5
"""How the ratio is divided between the stages (section 4.3 of the paper)."""


@dataclass(frozen=True)
class TwoStage:
    """What the two stages remove at a ratio."""

    sizes: Sizes
    """With I' of the first stage."""
    attentions: int
    """That the second stage removes."""


def two_stage_sizes(layout: Layout, ratio: float) -> TwoStage:
    """Divide a ratio of all parameters as the paper's equation 5 does.

    Of L layers, L · r^(ffn / attention / α) lose their attention, where r is the share of the
    layers' parameters that is to go. The channels have the rest.

    Raises:
        FamilyError, BudgetError: the model has no such layers, or too few channels.
    """
    check_two_stage(layout)
    (key,) = layout.widths
    attention, count = attention_parameters(layout, 0), layout.num_hidden_layers
    goal = ratio * layout.parameters(layout.vocab_size, layout.widths)
    layers = sum(ref.parameters for layer in layout.of_layer for ref in layer.values())
    cost = layout.axis_cost(key)
    ffn = cost * layout.widths[key] / count
    attentions = round(count * (goal / layers) ** (ffn / attention / ALPHA))
    width = layout.widths[key] - round((goal - attentions * attention) / cost)
    if not 0 < width <= layout.widths[key]:
        raise BudgetError(
            "2ssp",
            "has too few channels to meet the ratio",
            found=f"{ratio:g}",
            fix="choose a smaller ratio",
        )
    return TwoStage(replace(whole(layout), widths={key: width}), attentions)


def check_two_stage(layout: Layout) -> None:
    """Refuse a model whose layers are not an attention and one dense FFN each.

    Raises:
        FamilyError: it names the method.
    """
    if layout.experts or list(layout.widths) != [layout.family.widths[FFN].key]:
        raise FamilyError(
            layout.where, "has no single dense FFN in each layer", fix="leave out the method 2ssp"
        )
    for index in range(layout.num_hidden_layers):
        attention_module(layout, index)


def attention_module(layout: Layout, index: int) -> str:
    """Return the name that a layer has for its attention, such as self_attn.

    Raises:
        FamilyError: it has none, or several.
    """
    slots = [layout.roles[ref.name].slot for ref in layout.of_layer[index].values()]
    paths = [slot.name.partition("{layer}.")[2] for slot in slots if slot.group == "attention"]
    names = {path.partition(".")[0] for path in paths}
    if len(names) != 1:
        raise FamilyError(
            f"{layout.where}: layer {index}",
            "does not have one attention",
            found=", ".join(sorted(names)) or "none",
            fix="leave out the method 2ssp",
        )
    return names.pop()


def attention_parameters(layout: Layout, index: int) -> int:
    """Return the parameters of a layer's attention."""
    start = f".{attention_module(layout, index)}."
    refs = layout.of_layer[index].items()
    return sum(ref.parameters for name, ref in refs if start in name)


def without_attention(layout: Layout, index: int, layer: nn.Module) -> AbstractContextManager[None]:
    """Let the attention of a layer add nothing to the residual stream until the block ends."""
    return silenced(layer.get_submodule(attention_module(layout, index)))


def attentions_by_perplexity(
    layout: Layout,
    windows: Sequence[np.ndarray],
    kept: Kept,
    count: int,
    settings: PassSettings,
    watch: Stopwatch | None = None,
) -> list[int]:
    """Return the layers that lose their attention: one at a time, that which is missed least.

    Each takes one pass, in which all that could be next are tried. A trial begins at its layer with
    the states of the model that has lost none more.

    Args:
        layout: The model.
        windows: Calibration text; the paper takes one window.
        kept: The channels that the first stage keeps, by layer.
        count: Attentions to remove.
        settings: How the layers compute.
        watch: Gets the seconds of "choose", those of reading weights left out.
    """
    watch = watch or Stopwatch()
    removed: list[int] = []
    while len(removed) < count:
        bits = _without_one_more(layout, windows, kept, removed, settings, watch)
        removed.append(min(bits, key=lambda index: bits[index]))
    return removed


def _without_one_more(
    layout: Layout,
    windows: Sequence[np.ndarray],
    kept: Kept,
    removed: Sequence[int],
    settings: PassSettings,
    watch: Stopwatch,
) -> Mapping[int, float]:
    """Return layer → bits of the windows without its attention and without those removed."""
    base, trials = Stream(windows), dict[int, Stream]()
    with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed([base])
        for index in decoder.layers():
            with watch.timed("choose"):
                weights = _pruned(decoder, index, kept[index])
                layer, gone = decoder.layer(index), index in removed
                if not gone:
                    trials[index] = _copy(base)
                for number, stream in [(-1, base), *trials.items()]:
                    silent = gone or number == index
                    block = without_attention(layout, index, layer) if silent else nullcontext()
                    with block:
                        decoder.run(index, stream, weights=weights)
        rows = np.arange(layout.vocab_size)
        asked = {number: predictions_of(stream, rows) for number, stream in trials.items()}
        with watch.timed("choose"):
            count_bits(decoder, [each for found in asked.values() for each in found.values()])
    return {
        number: float(sum(each.bits().sum() for each in found.values()))
        for number, found in asked.items()
    }


def _pruned(
    decoder: StreamedDecoder, index: int, kept: Mapping[str, list[np.ndarray]]
) -> dict[str, torch.Tensor]:
    """Return the parameters of a layer's kept channels."""
    (ffn_module,) = decoder.ffn_modules(index)
    dims = decoder.channel_dims(index, FFN)
    return pruned_parameters(decoder.layer(index), ffn_module, dims, kept[FFN], {})


def _copy(stream: Stream) -> Stream:
    """Return a stream with the same states, which passes the next layers on its own."""
    states = HiddenStates()
    states.before = stream.states.before.clone()
    states.after, states.passed = states.before, stream.states.passed
    batches = [
        replace(batch, states=states, passed_on=dict(batch.passed_on)) for batch in stream.batches
    ]
    return Stream(stream.windows, states, batches)
