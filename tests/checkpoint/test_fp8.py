"""FP8: every code, bf16 rounding, and windows of dequantized weights, against torch."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.checkpoint.fp8 import (
    E4M3,
    E5M2,
    E8M0,
    SCALE_DTYPES,
    decode_scales,
    dequantize,
    from_bf16,
    scale_grid,
    to_bf16,
)

CODES = np.arange(256, dtype=np.uint8)


def of_codes(codes: NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(dtype)


def bits(tensor: torch.Tensor) -> NDArray[np.uint16]:
    return tensor.view(torch.uint16).numpy()


def assert_same(found: NDArray[np.uint16], expected: NDArray[np.uint16]) -> None:
    """Equal bit by bit; which bits a NaN has depends on the processor that torch runs on."""
    nan = np.isnan(from_bf16(expected))
    np.testing.assert_array_equal(np.isnan(from_bf16(found)), nan)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (E8M0, torch.float8_e8m0fnu),
    ],
)
def test_every_code(values: NDArray[np.float32], dtype: torch.dtype) -> None:
    expected = of_codes(CODES, dtype).to(torch.float32).numpy()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)
    zeros = np.flatnonzero(expected == 0)
    np.testing.assert_array_equal(np.signbit(values[zeros]), np.signbit(expected[zeros]))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
@example([0x7F800000, 0xFF800000])  # ±inf
@example([0x7F800001, 0xFFFFFFFF, 0x7FC00000])  # NaN, also where rounding would carry it to inf
@example([0x3F808000, 0x3F818000, 0x3F808001])  # ties, down and up, and just above one
@example([0x00000001, 0x00008000, 0x00018000, 0x807FFFFF])  # subnormal
@example([0x7F7FFFFF])  # rounds to inf
def test_bf16_is_rounded_as_torch_rounds(words: list[int]) -> None:
    values = np.array(words, np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    found = to_bf16(values)
    assert_same(found, bits(expected))
    np.testing.assert_array_equal(from_bf16(bits(expected)), expected.float().numpy())


def test_every_bf16_survives_the_way_to_float32_and_back() -> None:
    all_bits = np.arange(65536, dtype=np.uint16)
    assert_same(to_bf16(from_bf16(all_bits)), all_bits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F32", torch.float32),
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_scales_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    scales = torch.tensor([0.001, 2.0**-14, 0.5, 1.0]).to(dtype)
    found = decode_scales(scales.view(torch.uint8).numpy(), name)
    assert name in SCALE_DTYPES
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, scales.float().numpy())


def expanded(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


sizes = st.integers(1, 70)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], slice, slice]:
    """Shape of a weight, shape of its blocks, and a window, which may be empty."""
    shape = draw(sizes), draw(sizes)
    block = draw(st.sampled_from([(1, 1), (4, 4), (16, 5), (1, 32), (128, 128), shape]))
    first = [draw(st.integers(0, size)) for size in shape]
    last = [draw(st.integers(begin, size)) for begin, size in zip(first, shape, strict=True)]
    return shape, block, slice(first[0], last[0]), slice(first[1], last[1])


@given(windows(), st.integers(0, 2**32 - 1), st.booleans())
def test_window_equals_torch_and_the_whole(
    window: tuple[tuple[int, int], tuple[int, int], slice, slice], seed: int, e5m2: bool
) -> None:
    shape, block, rows, cols = window
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, np.uint8)
    # Scales of every size, so that products are subnormal, overflow or tie as well.
    grid = scale_grid(shape, block)
    scales = np.ldexp(rng.random(grid, np.float32), rng.integers(-140, 128, grid)).astype("f4")
    values, dtype = (E5M2, torch.float8_e5m2) if e5m2 else (E4M3, torch.float8_e4m3fn)
    weight = of_codes(codes, dtype).float()
    expected = (weight * expanded(torch.from_numpy(scales), shape, block)).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = dequantize(codes, scales, 0, 0, block, values)
        part = dequantize(codes[rows, cols], scales, rows.start, cols.start, block, values)
    assert_same(whole, bits(expected))
    np.testing.assert_array_equal(part, whole[rows, cols])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_what_transformers_loads(scale_dtype: torch.dtype) -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (256, 384), dtype=torch.uint8)
    scales = (torch.rand(2, 3) * 0.01).to(scale_dtype)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(384, 256, dtype=torch.bfloat16)})
    loaded = integration.Fp8Dequantize(None).convert(
        {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales},
        full_layer_name="up.weight",
        model=model,
    )["up.weight"]
    assert loaded.dtype == torch.bfloat16
    found = dequantize(codes.numpy(), scales.float().numpy(), 0, 0, (128, 128))
    assert_same(found, bits(loaded))
