"""Least squares into down_proj, against the textbook solution."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.refit import GramSums, error, refit, refit_if_better

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
    found = refit(weight, gram_of(act), kept, ridge)
    of_kept = GramSums(channels, CPU, kept)
    of_kept.add(act)
    assert torch.allclose(refit(weight, of_kept, kept, ridge), found, rtol=1e-4, atol=1e-4)

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
    assert torch.equal(refit(weight, gram_of(act), torch.arange(6)), weight)


def test_channels_that_never_fire_do_no_harm() -> None:
    weight, kept = torch.randn(3, 6), torch.tensor([1, 4])
    assert torch.equal(refit(weight, GramSums(6, CPU), kept), weight[:, kept])


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
