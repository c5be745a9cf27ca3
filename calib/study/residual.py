"""A residual stream with fewer columns: of one rotation, or its own channels. Only tried.

All layers read and write one stream of ``hidden_size`` channels. ``rotate`` turns it into the
principal axes of calibration text and cuts the last ones; norm weights are folded into the matrices
that read the stream, which untie a tied head. ``hidden`` keeps the channels of the largest norm
after the stream's norms (Minitron, arXiv 2407.14679), as they are.

With each norm's weight times √(H / H′) and its epsilon times H / H′, the smaller model computes
what the dense one does with its stream projected to what is kept. That is what a trial runs. So it
needs no matrices of other sizes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from calib.scoring.tasks import AskedTasks
from calib.streaming.batches import Stream
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.empty_model import parameter_shapes
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from calib.study.table import HIDDEN, ROTATE, STREAM_METHODS
from calib.study.trial import Trial, Variant
from calib.text.heldout import Encoded
from surgery.errors import BudgetError, FamilyError
from surgery.layout.layout import Layout

MULTIPLE = 8
"""What is kept is a multiple of this."""

BEFORE_BLOCKS = ("input_layernorm", "post_attention_layernorm")
"""Norms whose output only the matrices of an attention or an FFN read."""

ROWS = 4096
"""Tokens that are projected, or whose products are added in float32, at a time."""

ALIKE = 0.02
"""Largest relative difference that rounding makes, in bfloat16, too."""


@dataclass(frozen=True)
class StreamCut:
    """What a candidate keeps of the residual stream."""

    method: str
    """One of ``STREAM_METHODS``."""
    size: int
    """H′."""
    parameters: int
    """Of the smaller model; a rotated head is a matrix of its own."""


@dataclass(frozen=True)
class ResidualStream:
    """The parameters of the library's model that carry H."""

    layout: Layout
    size: int
    """H."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all parameters."""
    dims: Mapping[str, int]
    """Those that carry H, each with that dimension."""

    @classmethod
    def of(cls, layout: Layout) -> "ResidualStream":
        """Compare two models without weights, of which one has twice the ``hidden_size``.

        Raises:
            FamilyError: more than the stream follows from ``hidden_size``.
        """
        size = layout.by_name[layout.family.embedding].shape[1]
        config, heads = layout.config, layout.config.get("num_attention_heads")
        if layout.runs_whole or config.get("hidden_size") != size or not isinstance(heads, int):
            raise _refused(layout, "has no hidden_size of its own for all its layers", size)
        fixed = {"head_dim": config.get("head_dim") or size // heads}
        shapes, larger = (
            parameter_shapes(layout, {"hidden_size": times * size, **fixed}) for times in (1, 2)
        )
        if {n: len(s) for n, s in shapes.items()} != {n: len(s) for n, s in larger.items()}:
            raise _refused(layout, "has other parameters at another hidden_size", size)
        dims: dict[str, int] = {}
        for name, shape in shapes.items():
            pairs = enumerate(zip(shape, larger[name], strict=True))
            changed = [dim for dim, (one, other) in pairs if one != other]
            if len(changed) > 1 or any(shape[dim] != size for dim in changed):
                raise _refused(layout, "takes other sizes from hidden_size, as its heads'", name)
            if changed:
                dims[name] = changed[0]
        return cls(layout, size, shapes, dims)

    def norms(self, index: int) -> list[str]:
        """Return the paths of a layer's norms of the stream."""
        inside = f"{self.layout.layer_path(index)}."
        return [
            name.removeprefix(inside).removesuffix(".weight")
            for name in self.dims
            if name.startswith(inside) and name.endswith(".weight")
            if len(self.shapes[name]) == 1
        ]

    def check(self, method: str) -> None:
        """Refuse a model whose stream cannot lose columns by ``method``.

        Norms must be RMS norms, and only layers and the head may read the stream. To be rotated,
        the weights of norms must fold into what reads the stream.

        Raises:
            FamilyError: it says why.
        """
        layout, inner = self.layout, f"{self.layout.family.layers}."
        ends = (layout.family.embedding, layout.family.head)
        for name in self.dims:
            if not name.startswith(inner) and name not in ends and len(self.shapes[name]) > 1:
                raise _refused(layout, "has a stream that more than its layers reads", name)
        for index in range(layout.num_hidden_layers):
            norms, inside = self.norms(index), f"{layout.layer_path(index)}."
            if not norms or any(f"{inside}{name}.bias" in self.dims for name in norms):
                problem = "is not made of RMS norms: others subtract the mean of all channels"
                raise _refused(layout, problem, ", ".join(norms) or "no norm with a weight")
            if method == ROTATE and not {*norms} <= {*BEFORE_BLOCKS}:
                problem = "has a norm that is not just before an attention or an FFN"
                raise _refused(layout, problem, ", ".join(norms), method)

    def parameters(self, size: int, method: str) -> int:
        """Return the parameters of the model with ``size`` columns."""
        layout = self.layout
        carried = sum(int(np.prod(self.shapes[name])) for name in self.dims)
        untied = layout.vocab_size * size if method == ROTATE and layout.tied else 0
        removed = carried // self.size * (self.size - size)
        return layout.parameters(layout.vocab_size, layout.widths) - removed + untied

    def cut(self, ratio: float, method: str) -> StreamCut:
        """Return the cut that is nearest to the ratio, an untied head included.

        Raises:
            FamilyError: as ``check``.
            BudgetError: there is none.
        """
        self.check(method)
        layout = self.layout
        wanted = (1 - ratio) * layout.parameters(layout.vocab_size, layout.widths)
        counts = {n: self.parameters(n, method) for n in range(MULTIPLE, self.size, MULTIPLE)}
        if not counts or wanted < self.parameters(0, method):
            problem, fix = "has too few channels to meet the ratio", "choose a smaller ratio"
            raise BudgetError(method, problem, found=f"{ratio:g}", fix=fix)
        size = min(counts, key=lambda n: abs(counts[n] - wanted))
        return StreamCut(method, size, counts[size])


def check_rotate(layout: Layout) -> None:
    """Refuse a model whose stream cannot be rotated, as ``ResidualStream.check``."""
    ResidualStream.of(layout).check(ROTATE)


def check_hidden(layout: Layout) -> None:
    """Refuse a model whose stream cannot lose channels, as ``ResidualStream.check``."""
    ResidualStream.of(layout).check(HIDDEN)


def _refused(layout: Layout, problem: str, found: object, *methods: str) -> FamilyError:
    names = " and ".join(methods or STREAM_METHODS)
    return FamilyError(layout.where, problem, found=found, fix=f"leave out the method {names}")


class StreamSums:
    """What a pass of calibration text shows of the stream, summed over all its norms."""

    def __init__(self, stream: ResidualStream) -> None:
        """Start at zero."""
        size, self.stream = stream.size, stream
        self.covariance = torch.zeros((size, size), dtype=torch.float64)
        """Σ x xᵀ over the inputs x of norms, each of length 1."""
        self.importance = torch.zeros(size, dtype=torch.float64)
        """Σ over norms of √Σ (norm(x)_i)²."""

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add what a norm makes of some text, ``(tokens, H)`` each."""
        for rows in before.split(ROWS):
            unit = nn.functional.normalize(rows.float(), dim=-1)
            self.covariance += (unit.T @ unit).double().cpu()
        self.importance += after.double().square().sum(0).sqrt().cpu()

    def projection(self, cut: StreamCut) -> "Projection":
        """Return the projection of the stream to what is kept."""
        if cut.method == HIDDEN:
            kept = self.importance.argsort(descending=True, stable=True)[: cut.size]
            return Projection(torch.eye(len(self.importance))[:, kept.sort().values])
        _, axes = torch.linalg.eigh(self.covariance)
        return Projection(axes[:, -cut.size :].flip(-1))


class Projection:
    """x → x Q Qᵀ."""

    def __init__(self, basis: torch.Tensor) -> None:
        """Take Q ``[H, H′]``, whose columns are orthonormal."""
        self.basis = basis

    def apply_(self, states: torch.Tensor) -> None:
        """Project hidden states ``(…, H)`` in place, some rows at a time."""
        basis = self.basis.to(states.device, states.dtype)
        for rows in states.view(-1, states.shape[-1]).split(ROWS):
            rows.copy_((rows @ basis) @ basis.T)


@torch.no_grad()
def measure_stream(
    stream: ResidualStream, windows: Sequence[np.ndarray], settings: PassSettings
) -> StreamSums:
    """Run ``windows`` through the dense model and sum what its norms read and give.

    Raises:
        FamilyError: a norm does more than to scale.
    """
    sums, text, layout = StreamSums(stream), Stream(windows), stream.layout
    with WeightReader(layout.checkpoint, settings.device, settings.dtype) as reader:
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed([text])
        for index in decoder.layers():
            with ExitStack() as stack:
                for path in stream.norms(index):
                    norm = decoder.layer(index).get_submodule(path)
                    _check_scales(layout, norm)
                    stack.enter_context(_seen(norm, sums.add))
                decoder.run(index, text)
    return sums


def _check_scales(layout: Layout, norm: nn.Module) -> None:
    """Refuse a norm that does more than to scale: states of one length by the same numbers."""
    weight = norm.get_parameter("weight")
    draws = torch.Generator().manual_seed(0)
    states = torch.rand((2, len(weight)), generator=draws) + 0.5
    states = nn.functional.normalize(states, dim=-1).to(weight.device, weight.dtype)
    factors = (norm(states[:, None])[:, 0] / states).float()
    if not torch.allclose(factors[0], factors[1], rtol=ALIKE, atol=ALIKE * float(factors.std())):
        problem = "has a norm that is no RMS norm: it does more than to scale"
        raise _refused(layout, problem, type(norm).__name__)


@contextmanager
def _seen(norm: nn.Module, see: Callable[[torch.Tensor, torch.Tensor], object]) -> Iterator[None]:
    """Call ``see`` with what a norm reads and gives until the block ends."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], after: torch.Tensor) -> None:
        see(inputs[0].flatten(0, -2), after.flatten(0, -2))

    handle = norm.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _projected(norm: nn.Module, projection: Projection) -> Iterator[None]:
    """Project what a norm reads, and with it the stream, in place until the block ends."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        projection.apply_(inputs[0])

    handle = norm.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class NarrowTrial(Trial):
    """Runs held-out text through the model whose stream has lost columns."""

    def __init__(
        self,
        variant: Variant,
        heldout: Encoded,
        sums: StreamSums,
        cut: StreamCut,
        asked: AskedTasks | None = None,
    ) -> None:
        """Prepare a trial whose stream is projected wherever a layer writes to it."""
        super().__init__(variant, heldout, None, asked=asked)
        self._projection, self._stream = sums.projection(cut), sums.stream

    def run(self, decoder: StreamedDecoder, index: int) -> None:
        """Run the text through a layer that writes to the columns that are kept alone."""
        for text in self.scored.values() if index == 0 else []:
            self._projection.apply_(text.states.before)
        with ExitStack() as stack:
            for path in self._stream.norms(index):
                norm = decoder.layer(index).get_submodule(path)
                stack.enter_context(_projected(norm, self._projection))
            self.run_scored(decoder, index, {})
        for text in self.scored.values():
            self._projection.apply_(text.states.before)
