"""Least squares into down_proj, against the textbook solution."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.refit import (
    Examples,
    GramSums,
    NormalEquations,
    PrunedPrefix,
    error,
    others,
    refit_if_better,
)
from calib.streaming.batches import Stream, spilled
from calib.streaming.decoder import StreamedDecoder
from calib.streaming.ffn import FfnModule, pruned_parameters
from calib.streaming.settings import PassSettings
from calib.streaming.weights import WeightReader
from calib.study.reconstruction import RATES, reconstruct
from surgery.families.schema import FFN
from tests.support import tiny
from tests.support.plans import layout_of

CPU = torch.device("cpu")


def activations(seed: int, tokens: int, channels: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=rng)
    return torch.randn(tokens, channels, generator=rng) @ mixing


def gram_of(act: torch.Tensor) -> GramSums:
    gram = GramSums(act.shape[1], CPU)
    for part in act.split(7):
        gram.add(part)
    return gram


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), channels=st.integers(2, 12), ridge=st.floats(1e-4, 1.0))
def test_refit_solves_the_ridge_problem(seed: int, channels: int, ridge: float) -> None:
    act = activations(seed, 60, channels)
    weight = torch.randn(5, channels, generator=torch.Generator().manual_seed(seed + 1))
    kept = torch.arange(channels)[torch.arange(channels) % 3 != 1]
    found = gram_of(act).normal_equations(weight, kept).solve(weight[:, kept], ridge)
    of_kept, removed = NormalEquations(len(kept), 5, CPU), others(kept, channels)
    of_kept.add(act[:, kept], act[:, removed] @ weight[:, removed].T)
    again = of_kept.solve(weight[:, kept], ridge)
    assert torch.allclose(again, found, rtol=1e-4, atol=1e-4)

    inside, every = act[:, kept].double().numpy(), act.double().numpy()
    before = weight[:, kept].double().numpy()
    penalty = np.sqrt(ridge * np.mean(np.sum(inside**2, axis=0)))
    rows = np.vstack([inside, penalty * np.eye(len(kept))])
    wanted = np.vstack([every @ weight.double().numpy().T, penalty * before.T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    assert np.allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_error_is_that_of_the_outputs() -> None:
    act, weight = activations(1, 40, 6), torch.randn(3, 6)
    kept, pruned = torch.tensor([0, 2, 5]), torch.randn(3, 3)
    expected = (act @ weight.T - act[:, kept] @ pruned.T).double().square().sum()
    assert np.isclose(error(weight, pruned, kept, gram_of(act)), float(expected), rtol=1e-4)


def test_nothing_removed_nothing_changes() -> None:
    act, weight = activations(2, 40, 6), torch.randn(3, 6)
    every = torch.arange(6)
    assert torch.equal(gram_of(act).normal_equations(weight, every).solve(weight), weight)


def test_channels_that_never_fire_do_no_harm() -> None:
    weight, kept = torch.randn(3, 6), torch.tensor([1, 4])
    own = weight[:, kept]
    assert torch.equal(GramSums(6, CPU).normal_equations(weight, kept).solve(own), own)


def test_sums_of_more_channels_than_a_block_are_whole() -> None:
    part, missing = activations(5, 40, 600), activations(6, 40, 3)
    sums = NormalEquations(600, 3, CPU)
    sums.add(part, missing)
    assert torch.allclose(sums.inner.tril(), (part.T @ part).tril(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("spills", [False, True])
@pytest.mark.parametrize(
    ("key", "alone"), [("llama", True), ("phi3", True), ("gpt2", True), ("gemma3_text", False)]
)
def test_a_prefix_goes_through_the_pruned_layers(
    tmp_path: Path, key: str, alone: bool, spills: bool, windows: int
) -> None:
    """However much of a layer runs again: with windows to judge by and without, in files too."""
    layout = layout_of(tiny.save(tmp_path / "model", key))
    rng = np.random.default_rng(3)
    texts = [[rng.integers(0, 400, 24) for _ in range(3)] for _ in range(windows)]
    dense, plain = ([Stream(each) for each in texts] for _ in range(2))
    prefix = PrunedPrefix(dense)
    streams = [*dense, *plain, *prefix.streams]
    settings = PassSettings(CPU, torch.float32)
    with (
        WeightReader(layout.checkpoint, CPU, torch.float32) as reader,
        spilled(streams, tmp_path if spills else None),
    ):
        decoder = StreamedDecoder(layout, reader, settings)
        decoder.embed(streams)
        for index in decoder.layers():
            (ffn_module,) = decoder.ffn_modules(index)
            kept = np.arange(layout.channels_of(ffn_module.axis))[::2].copy()
            for stream in dense:
                decoder.run(index, stream)
            columns = torch.from_numpy(kept)
            fitted = prefix.refit(decoder, index, ffn_module, columns, torch.float32)
            dims = decoder.channel_dims(index, ffn_module.axis)
            better = {} if fitted is None else {(ffn_module.axis, 0): fitted}
            weights = pruned_parameters(decoder.layer(index), ffn_module, dims, [kept], better)
            prefix.advance(decoder, index, weights)
            for stream in plain:
                decoder.run(index, stream, weights=weights)
            assert (prefix.split == index) == alone
            for one, other in zip(plain, prefix.streams, strict=True):
                assert torch.allclose(one.states.before, other.states.before, atol=1e-5)


def test_what_other_windows_do_not_confirm_is_not_used() -> None:
    weight, kept = torch.randn(3, 6), torch.tensor([0, 1, 2])
    fitted, same = gram_of(activations(3, 200, 6)), gram_of(activations(3, 200, 6))
    assert refit_if_better(weight, kept, [fitted, same], torch.float32) is not None
    alone = torch.zeros(200, 6)
    alone[:, 0] = torch.randn(200)  # with the others silent, only the old column is right
    assert refit_if_better(weight, kept, [fitted, gram_of(alone)], torch.float32) is None


def test_rounding_to_the_file_s_dtype_is_judged_too() -> None:
    weight, kept = torch.randn(3, 6).bfloat16().float(), torch.tensor([0, 1, 2])
    found = refit_if_better(weight, kept, [gram_of(activations(4, 200, 6))], torch.bfloat16)
    assert found is not None
    assert found.dtype == torch.bfloat16


WIDTH, CHANNELS = 16, 24


class Ffn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(WIDTH, CHANNELS, bias=False)
        self.down_proj = torch.nn.Linear(CHANNELS, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(hidden)))
        return found


@pytest.mark.parametrize("size", [2.0**-8, 1.0, 2.0**4])
@pytest.mark.parametrize("rates", [RATES, RATES[:1], RATES[1:], (1e4,)])
def test_training_depends_on_no_scale_of_the_weights(size: float, rates: tuple[float, ...]) -> None:
    """As SmolLM2's weights are ten times as large as Qwen's; a rate that harms is not used."""
    rng = torch.Generator().manual_seed(0)
    layer, wanted = torch.nn.Module(), Ffn().requires_grad_(False)
    layer.mlp = Ffn().requires_grad_(False)
    for module in (layer.mlp, wanted):
        for weight in module.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
    hidden = torch.randn(2, 512, WIDTH, generator=rng)
    examples = [Examples(each, wanted(each)) for each in hidden]
    scaled = [Examples(each.hidden, each.target * size) for each in examples]
    begin = {f"mlp.{name}": value for name, value in layer.mlp.named_parameters()}
    down = "mlp.down_proj.weight"
    place = FfnModule(FFN, "mlp.down_proj", routed=False, alone=True)
    made, other = (
        reconstruct(layer, place, weights, texts, torch.float32, rates)
        for weights, texts in ((begin, examples), (begin | {down: begin[down] * size}, scaled))
    )
    assert (made is None) == (other is None) == (rates == (1e4,))
    if made is not None and other is not None:
        assert made.rate == other.rate == max(rates)
        torch.testing.assert_close(
            other.weights[down] / size, made.weights[down], rtol=1e-3, atol=1e-4
        )
