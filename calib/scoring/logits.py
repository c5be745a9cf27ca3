"""Compare the logits of a pruned model and of the dense model with the same channels masked."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import positions
from calib.streaming.ffn import (
    ExpertKey,
    down_name,
    down_proj_tensors,
    file_matrices,
    masked_down_proj,
)
from calib.streaming.layer_groups import LayerGroups
from calib.streaming.stand_ins import masked_router, swapped
from calib.streaming.weights import WeightReader, choose_device
from surgery.apply.edits import kept_parts, layer_groups
from surgery.checkpoint.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.layout.build import read_layout
from surgery.layout.layout import Layout
from surgery.planning.plan import Plan

WINDOWS = 4
TOKENS = 64
TOLERANCE = 1e-4
"""Relative to the largest logit, in fp32."""


@dataclass(frozen=True)
class Equality:
    """The difference between two models' logits on the same tokens."""

    tokens: int
    largest: float
    """max |difference| / max |value|."""
    allowed: float = TOLERANCE
    values: str = "logit"
    """What was compared: "logit", or "hidden state" where the model predicts no token."""

    @property
    def check(self) -> str:
        """Name of the check in ``VerifyReport``."""
        return f"{self.values}s equal the masked dense model's"

    @property
    def ok(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.largest <= self.allowed

    def line(self) -> str:
        """Return the difference, the tolerance and the number of tokens, as text for people."""
        return (
            f"largest difference {self.largest:.2g} of the largest {self.values}, "
            f"{f'at most {self.allowed:.0e}' if self.allowed else 'none'} allowed, "
            f"over {self.tokens} tokens"
        )

    def faults(self) -> list[str]:
        """Return the fault as a check of ``VerifyReport`` lists it; empty if the two are equal."""
        return [] if self.ok else [self.line()]


def compare_forward(plan: Plan, dense: Layout, pruned: Layout, device: torch.device) -> Equality:
    """Run seeded random kept tokens through both models in fp32 and compare their logits.

    Of models that predict no token, the last hidden states are compared: they must be equal bit for
    bit where only the vocabulary was pruned.

    The dense model has zeros in down_proj for the removed channels, and only the logits of kept
    tokens are computed: this is what COMPACT's pruning means (paper Algorithm 1). Its routers
    cannot choose removed experts. Where the plan replaces tensors or converts FP8 to bf16, the
    dense model does the same. Removed layers are skipped; collapsing takes the memory of three
    layers.
    """
    ids = plan.ids()
    kept = ids.kept
    tokens = min(TOKENS, positions(dense) or TOKENS)
    chosen = np.random.default_rng(0).integers(0, len(kept), (WINDOWS, tokens))
    fp8 = torch.bfloat16 if plan.dequantize else None
    masked = LayerGroups(layer_groups(plan, dense), _MaskedLayers(plan, dense).change)
    values = "logit" if dense.predicts else "hidden state"
    with WeightReader(dense.checkpoint, device, torch.float32, dequantize=fp8) as reader:
        expected = _outputs(StreamedDecoder(dense, reader), kept[chosen], kept, masked.run)
    with WeightReader(pruned.checkpoint, device, torch.float32) as reader:
        found = _outputs(StreamedDecoder(pruned, reader), chosen, np.arange(len(kept)))
    difference = (expected - found).abs().max() / expected.abs().max()
    exact = not dense.predicts and plan.before.widths == plan.after.widths and not plan.layers
    return Equality(chosen.size, float(difference), 0.0 if exact else TOLERANCE, values)


def compare_logits(plan: Plan, source: Path, directory: Path, device: str) -> Equality:
    """Compare the logits of ``directory`` with those of the masked dense model at ``source``.

    Raises:
        PlanError: its weights were trained.
    """
    if plan.replaced is not None and plan.replaced.trained:
        raise PlanError(
            directory,
            "was trained, so that its logits are no longer the masked dense model's",
            fix="compare scores instead",
        )
    paths = (source, directory)
    dense, pruned = (read_layout(Checkpoint.open(path, plan.family)) for path in paths)
    return compare_forward(plan, dense, pruned, choose_device(device))


class _MaskedLayers:
    """The dense model's layers without what the plan removes.

    down_proj has zero columns for removed channels, and the router does not choose removed experts.
    """

    def __init__(self, plan: Plan, dense: Layout) -> None:
        self._layout = dense
        self._sources = [group[0] for group in layer_groups(plan, dense)]
        self._kept = kept_parts(plan, dense)
        self._refs = plan.replaced.refs() if plan.replaced else {}

    @contextmanager
    def change(self, decoder: StreamedDecoder, number: int, layer: nn.Module) -> Iterator[None]:
        """Mask ``layer``, which has index ``number`` in the output, until the block ends."""
        experts = self._kept[number].experts
        removed = np.setdiff1d(np.arange(self._layout.experts if len(experts) else 0), experts)
        with ExitStack() as stack:
            stack.enter_context(swapped(layer, self._weights(decoder, number, layer)))
            if len(removed):
                routers = decoder.routers(self._sources[number])
                masked = masked_router(layer, routers, torch.from_numpy(removed))
                stack.enter_context(masked)
            yield

    def _weights(
        self, decoder: StreamedDecoder, number: int, layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return the masked down_projs of a layer, and its other parameters that are replaced."""
        index, kept = self._sources[number], self._kept[number]
        replaced: dict[ExpertKey, torch.Tensor] = {}
        for name in down_proj_tensors(self._layout, index):
            role = self._layout.roles[name]
            ref = self._refs.get(kept.name_of(name, role, number)) if kept.keeps(role) else None
            if ref is not None:
                with safe_open(ref.path, framework="pt") as file:
                    tensor = file.get_tensor(ref.name)
                replaced |= file_matrices(self._layout, name, tensor, kept.experts)
        found: dict[str, torch.Tensor] = {}
        for ffn_module in decoder.ffn_modules(index):
            if ffn_module.axis in kept.channels:
                channels = kept.of_source(ffn_module.axis, self._layout.experts)
                down = masked_down_proj(layer, ffn_module, channels, replaced)
                if not ffn_module.routed:
                    found |= self._trained(decoder, number, layer, ffn_module.axis)
                found[down_name(ffn_module)] = down
        return found

    def _trained(
        self, decoder: StreamedDecoder, number: int, layer: nn.Module, axis: str
    ) -> dict[str, torch.Tensor]:
        """Return parameters of a dense FFN with the kept channels that the plan replaces."""
        index, kept = self._sources[number], self._kept[number]
        names, found = decoder.channel_tensors(index, axis), dict[str, torch.Tensor]()
        for parameter, dim in decoder.channel_dims(index, axis).items():
            name = names[parameter]
            ref = self._refs.get(kept.name_of(name, self._layout.roles[name], number))
            if ref is not None:
                channels = torch.from_numpy(kept.channels[axis][0])
                with safe_open(ref.path, framework="pt") as file:
                    new = file.get_tensor(ref.name)
                own = layer.get_parameter(parameter).data
                found[parameter] = own.index_copy(
                    dim, channels.to(own.device), new.to(own.device, own.dtype)
                )
        return found


def _outputs(
    decoder: StreamedDecoder,
    windows: np.ndarray,
    rows: np.ndarray,
    run: Callable[[StreamedDecoder, int, Stream], object] = StreamedDecoder.run,
) -> torch.Tensor:
    """Return logits ``(windows, tokens, len(rows))`` in fp32, on the CPU; or last hidden states."""
    stream = Stream(list(windows))
    decoder.embed([stream])
    for index in decoder.layers():
        run(decoder, index, stream)
    hidden = stream.batches[0].hidden
    if not decoder.layout.predicts:
        return decoder.outputs(hidden).cpu()
    blocks = [block.cpu() for _, _, block in decoder.logits([(hidden, rows)])]
    return torch.cat(blocks, dim=-1)
