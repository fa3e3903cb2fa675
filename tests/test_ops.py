"""Custom operators and our compiled product against plain integer products."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.vllm_layers import IN, TOKEN, compile_for
from vllm_smoothquant.format import int8
from vllm_smoothquant.kernels import base, build, cpu, exact, ops, select


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_onednn_operator_passes_opcheck(dtype: torch.dtype, static: bool, bias: bool) -> None:
    from vllm import _custom_ops as vllm_ops

    gc.collect()  # handlers of other tests read a tensor when they are freed, which fails in opcheck's fake mode
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-63, 64, (48, IN), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator)
    handler = vllm_ops.create_onednn_scaled_mm(weight.t(), scale, dtype, False, False, 4)
    arguments = (
        torch.randn(5, IN, generator=generator).to(dtype),
        handler.handler_tensor,
        48,
        torch.tensor([0.02]) if static else None,
        torch.randn(48, generator=generator).to(dtype) if bias else None,
    )
    results = torch.library.opcheck(ops.onednn_tensor_int8, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    assert ops.onednn_tensor_int8(arguments[0][:0], *arguments[1:]).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 4, 16), (67, 13, 100), (131, 33, 2048)], ids=str)
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, target: str, shape: tuple[int, int, int], scheme: str, dtype: torch.dtype
) -> None:
    """Every remainder of a tile, the extremes of int8, a bias; the tolerance is the float32 rounding of the scaling."""
    compile_for(target, monkeypatch)
    gc.collect()  # as in test_the_onednn_operator_passes_opcheck
    tokens, out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    weight[0] = -128
    x[0] = -x[0].abs().max()
    weight_scale = torch.rand(out_features, generator=generator)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    static = torch.tensor([0.011]) if scheme == "static" else None
    arguments = (x, weight, weight_scale, weight.sum(1, dtype=torch.int32), static, bias, scheme == "token")
    y = ops.int8_linear(*arguments)
    assert y.dtype == dtype
    strategy = "token" if scheme == "token" else "tensor"
    reference = int8.linear_reference(
        x.double(), weight, weight_scale, strategy=strategy, input_scale_static=static, bias=bias.double()
    )
    # The sum becomes float32, is scaled twice, and the bias is added: four roundings, each 2**-24 relative. Rounding to
    # the output's dtype is half a unit in the last place.
    size = (reference - bias).abs() + bias.abs()
    bound = 4 * 2**-24 * size + (torch.finfo(dtype).eps / 2 * y.double().abs() if dtype != torch.float32 else 0)
    assert ((y.double() - reference).abs() <= bound).all()
    results = torch.library.opcheck(ops.int8_linear, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_holds_the_longest_sums(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """2**16 products of extremes: up to 2**30 in magnitude, nearly 2**31 with the OFFSET of int8_tile.h."""
    compile_for(target, monkeypatch)
    x = torch.tensor([127.0, -128.0, 1.0]).reshape(3, 1).expand(3, build.MAX_IN_FEATURES).contiguous()
    weight = (
        torch.tensor([-128, 127, 1, -1, 0]).reshape(5, 1).expand(5, build.MAX_IN_FEATURES).to(torch.int8).contiguous()
    )
    one = torch.ones(5)
    y = ops.int8_linear(x, weight, one, weight.sum(1, dtype=torch.int32), one[:1], None, False)
    # float32 has 24 bits, which is exact for all of these sums except 127 * 127's.
    assert torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=2**-24, atol=0)


def test_our_product_takes_other_dtypes_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("avx2", monkeypatch)
    weight = torch.randint(-128, 128, (5, 20), dtype=torch.int8)
    x, bias, sums = torch.randn(3, 20), torch.randn(5), weight.sum(1, dtype=torch.int32)
    for narrow in (x.half(), x.bfloat16()):  # the second: a bfloat16 model with a bias in float32
        y = ops.int8_linear(narrow, weight, torch.ones(5), sums, None, bias, True)
        wide = ops.int8_linear(narrow.float(), weight, torch.ones(5), sums, None, bias, True)
        assert torch.equal(y, wide.to(narrow.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_keeps_nan_and_takes_no_tokens(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype
) -> None:
    """Integers cannot show a NaN: the output row of its token must, and no other row."""
    compile_for(target, monkeypatch)
    weight, weight_scale = torch.ones(3, 20, dtype=torch.int8), torch.ones(3)
    sums = weight.sum(1, dtype=torch.int32)
    x = torch.randn(4, 20).to(dtype)
    x[2, 7] = float("nan")
    for static, per_token, bad in ((None, True, [2]), (torch.ones(1), False, [2]), (None, False, [0, 1, 2, 3])):
        y = ops.int8_linear(x, weight, weight_scale, sums, static, None, per_token)
        assert y.isnan().all(dim=1).nonzero().flatten().tolist() == bad
        assert y.isnan().any(dim=1).sum() == len(bad)
    assert ops.int8_linear(x[:0], weight, weight_scale, sums, None, None, False).shape == (0, 3)


def test_the_product_compiles_for_all_instruction_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import envs

    if build.target() is None:
        pytest.skip("the product is for x86")
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path))
    assert len({build.build(target) for target in build.TARGETS}) == len(build.TARGETS)


def test_a_failed_compilation_selects_the_next_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, a failing compiler, a CPU without AVX2: select uses the next kernel and gives the reason."""
    from vllm import envs

    compile_for("avx2", monkeypatch)
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path))
    uncached = build.int8_linear.__wrapped__
    request = base.Request("layer", TOKEN, True, torch.bfloat16, "cpu")
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: False)
    monkeypatch.setattr(build, "int8_linear", uncached)
    for compiler, reason in ((str(tmp_path / "none"), "No such file"), ("false", "could not compile")):
        monkeypatch.setenv("CXX", compiler)
        reasons = dict(select.explain_kernels(request))
        assert reason in (reasons["avx2"] or "")
        assert reasons["float32-integers"] is None
    assert list((tmp_path / "smoothquant").iterdir()) == []
    monkeypatch.delenv("CXX")
    assert callable(uncached())
    monkeypatch.setattr(build, "target", lambda: None)
    assert uncached() == "needs an x86 CPU with AVX2"


def test_a_product_with_wrong_sums_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong as oneDNN's sums without VNNI are: pairs of products are clipped to 16 bits."""
    compile_for("avx2", monkeypatch)
    monkeypatch.setattr(exact, "compiled_is_exact", uncached := exact.compiled_is_exact.__wrapped__)
    request = base.Request("layer", TOKEN, True, torch.float32, "cpu")
    assert cpu.Avx2.rejects(request) is None

    def clips(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        products = x[:, None] * weight[None]
        return products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)

    monkeypatch.setattr(exact, "int8_linear", clips)
    assert not uncached()
    assert "wrong sums" in (cpu.Avx2.rejects(request) or "")


def test_widened_products_are_integer_products() -> None:
    generator = torch.Generator().manual_seed(0)
    # The larger weight first, because the smaller one then uses its buffer. in = 1024 keeps every sum below 2**24.
    for out_features, in_features in ((64, 1024), (48, 32)):
        x = torch.randint(-128, 128, (5, in_features), generator=generator, dtype=torch.int8)
        weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        y = ops.widened_linear(x.float(), weight)
        assert torch.equal(y.double(), int8.int8_matmul(x, weight))
        results = torch.library.opcheck(ops.widened_linear, (x.float(), weight))
        assert set(results.values()) == {"SUCCESS"}, results


def test_the_dynamic_scale_equals_the_reference() -> None:
    x = torch.randn(7, 33)
    for value in (x, -x, x.bfloat16(), torch.zeros(2, 3)):
        assert torch.equal(ops.dynamic_tensor_scale(value), int8.input_scale(value, "tensor"))
