"""The rounding rule and the reference product, with which all fast kernels are compared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_smoothquant.format import int8

values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)

matrices = st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(
        st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(torch.tensor)
)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@given(weight=matrices)
@settings(max_examples=150, deadline=None)
def test_weight_round_trip_is_within_half_a_step(strategy: str, weight: torch.Tensor) -> None:
    integers, scale = int8.quantize_weight(weight, strategy)
    assert integers.dtype == torch.int8
    assert scale.shape == ((weight.shape[0], 1) if strategy == "channel" else (1,))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    # Half a step, and the rounding of a float32 division near 127: 127 * 2**-24 of a step.
    assert ((integers.float() * scale - weight).abs() <= scale * (0.5 + 1e-5)).all()
    # absmax maps to 127: the whole range is used, and -128 never appears.
    assert integers.min() >= -127
    for row, original in zip(integers, weight, strict=True) if strategy == "channel" else [(integers, weight)]:
        # Values below 127 times the smallest normal float32 become 0.
        assert row.abs().max() == (127 if original.abs().max() / 127 >= 2**-126 else 0)


@pytest.mark.parametrize("strategy", ["token", "tensor"])
@given(x=matrices)
@settings(max_examples=100, deadline=None)
def test_dynamic_scales_cover_all_values_that_share_them(strategy: str, x: torch.Tensor) -> None:
    scale = int8.input_scale(x, strategy)
    assert scale.shape == ((x.shape[0], 1) if strategy == "token" else (1,))
    # The largest value maps to 127, so nothing is clipped.
    assert (x.abs() / scale).max() <= 127 * (1 + 1e-6)


def test_halves_round_to_even_and_static_scales_clip() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.5, 1e9, -127.5, -128.5, -1e9])
    expected = [0, 2, 2, 0, -2, 127, 127, 127, -128, -128, -128]
    assert int8.quantize(x, torch.ones(1)).tolist() == expected


def test_a_row_of_zeros_decodes_to_zeros() -> None:
    integers, scale = int8.quantize_weight(torch.zeros(2, 4), "channel")
    assert scale.tolist() == [[1.0], [1.0]]
    assert not integers.any()


def test_a_nan_is_not_hidden() -> None:
    weight = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    assert torch.isnan(int8.quantize_weight(weight, "channel")[1]).tolist() == [[True], [False]]


def test_the_product_is_exact_where_float32_is_not() -> None:
    # 2**16 products of 127 * 127 and one of 1 * 1: float32 loses the last one.
    n = 2**16 + 1
    x = torch.full((1, n), 127, dtype=torch.int8)
    w = torch.full((1, n), 127, dtype=torch.int8)
    x[0, 0] = w[0, 0] = 1
    assert int8.int8_matmul(x, w).item() == 2**16 * 127 * 127 + 1
    assert (x.float() @ w.float().t()).item() != 2**16 * 127 * 127 + 1


@pytest.mark.parametrize("strategy", ["token", "tensor", "static"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_linear_reference_approximates_the_floating_point_layer(weights: str, strategy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator)
    w = torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator)
    factor = torch.rand(64, generator=generator) + 0.5
    integers, scale = int8.quantize_weight(w * factor, weights)
    static = int8.input_scale(x / factor, "tensor") if strategy == "static" else None
    y = int8.linear_reference(
        x,
        integers,
        scale,
        strategy="tensor" if static is not None else strategy,
        input_scale_static=static,
        smoothing_factor=factor,
        bias=bias,
    )
    exact = torch.nn.functional.linear(x, w, bias)
    assert y.shape == exact.shape
    assert y.dtype == exact.dtype
    # Each of 64 products has an error of at most half a step of either factor; independent errors add up as sqrt(64).
    step_x = (x / factor).abs().max() / 127
    step_w = scale.max()
    noise = (step_x * (w * factor).abs().mean() + step_w * (x / factor).abs().mean()) * 64**0.5
    assert (y - exact).abs().mean() < noise
    assert (y - exact).abs().mean() > noise / 100  # the reference does round


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="'channel' or 'tensor'"):
        int8.quantize_weight(torch.ones(2, 2), "group")
    with pytest.raises(ValueError, match="'token' or 'tensor'"):
        int8.input_scale(torch.ones(2, 2), "channel")
