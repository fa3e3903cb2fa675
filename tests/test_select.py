"""The kernel that is selected, and the reasons why the candidates before it are not."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.vllm_layers import STATIC, TENSOR, TOKEN
from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.kernels import base, build, cpu, exact, select, stock


@pytest.mark.parametrize(
    ("platform", "capability", "is_exact", "scheme", "selected"),
    [
        ("cpu", None, True, TOKEN, "vllm"),
        ("cpu", None, True, TENSOR, "onednn-tensor"),
        ("cpu", None, True, STATIC, "onednn-tensor"),
        ("cpu", None, False, TOKEN, "compiled"),
        ("cpu", None, False, TENSOR, "compiled"),
        ("cpu", None, False, STATIC, "compiled"),
        ("cuda", 75, True, TOKEN, "vllm"),
        ("cuda", 90, True, STATIC, "vllm"),
        ("cuda", 90, True, TENSOR, "cutlass-tensor"),
        ("cuda", 100, True, TOKEN, "triton"),
        ("cuda", 120, True, STATIC, "triton"),
        ("cuda", 120, True, TENSOR, "triton"),
        ("cuda", None, True, TOKEN, "vllm"),
    ],
)
def test_the_first_kernel_that_can_serve_is_selected(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    capability: int | None,
    is_exact: bool,
    scheme: Scheme,
    selected: str,
) -> None:
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: is_exact)
    monkeypatch.setattr(build, "why_not", lambda: None)
    monkeypatch.setattr(exact, "compiled_is_exact", lambda: True)
    request = base.Request("layer", scheme, True, torch.bfloat16, platform, capability)
    reasons = select.explain_kernels(request)
    assert next(name for name, reason in reasons if reason is None) == selected
    assert all(reason for name, reason in reasons[: [name for name, _ in reasons].index(selected)])


def test_no_kernel_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmoothQuantError, match="no kernels for platform 'other'"):
        select.select_kernel(base.Request("layer", TOKEN, True, torch.bfloat16, "other"))
    monkeypatch.setitem(select.CANDIDATES, ("cuda", 8), select.CANDIDATES["cuda", 8][:2])
    with pytest.raises(SmoothQuantError, match=r"vllm: .*; cutlass-tensor: writes float16 or bfloat16"):
        select.select_kernel(base.Request("layer", TENSOR, True, torch.float32, "cuda", 90))


@pytest.mark.parametrize("scheme", [TOKEN, TENSOR, STATIC])
@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.bfloat16, (40, 64)), (torch.bfloat16, (64, 1000)), (torch.float32, (64, 64))], ids=str
)
def test_cutlass_gets_nothing_that_it_does_not_support(
    scheme: Scheme, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    request = base.Request("layer", scheme, True, dtype, "cuda", 90, *sizes)
    assert [name for name, reason in select.explain_kernels(request) if reason is None] == ["triton"]


def test_turing_has_no_kernel_for_other_sizes() -> None:
    """tests/helpers/triton_ptx.py shows that Triton cannot compile the product for it."""
    with pytest.raises(SmoothQuantError, match=r"multiples of 16.*triton: Triton has no INT8 product below .* 8\.0"):
        select.select_kernel(base.Request("layer", TOKEN, True, torch.float16, "cuda", 75, 40, 64))


# --- AMX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX, and with VNNI and a compiler. Nothing is measured."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for check in ("onednn_is_exact", "compiled_is_exact"):
        monkeypatch.setattr(exact, check, lambda: True)
    monkeypatch.setattr(build, "why_not", lambda: None)


# Sizes [out, in], the first of which vLLM's AMX operator takes.
SIZES = [(4096, 4096), (48, 32), (40, 4096), (4096, 1000), (4096, 48)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vllms_amx_operator_gets_no_float32(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, amx: None, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    """It refuses float32. Our condition is compared with what vLLM's class does with a weight of these sizes."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel as Theirs

    called: list[str] = []
    for path in ("sgl", "onednn"):
        monkeypatch.setattr(Theirs, f"process_weights_for_{path}", lambda self, layer, path=path: called.append(path))
    monkeypatch.setenv("VLLM_CPU_SGL_KERNEL", "1")  # vLLM 0.26 uses the operator on request only
    layer = torch.nn.Module()
    layer.weight = base.frozen(torch.zeros(sizes, dtype=torch.int8))
    layer.weight_scale = base.frozen(torch.ones(sizes[0], 1))
    stock.VllmChoice(base.Request("layer", TOKEN, True, torch.bfloat16, "cpu")).prepare(layer)

    request = base.Request("layer", TOKEN, True, dtype, "cpu", None, *sizes)
    reasons = dict(select.explain_kernels(request))
    chosen = next(name for name, reason in reasons.items() if reason is None)
    if called == ["sgl"] and dtype == torch.float32:
        assert chosen == "compiled"
        assert reasons["vllm"] == "vLLM's AMX operator computes in bfloat16 and float16, not torch.float32"
        monkeypatch.setattr(build, "why_not", lambda: "no compiler")
        chosen = next(name for name, reason in select.explain_kernels(request) if reason is None)
        assert chosen == "float32-integers"
    else:
        assert chosen == "vllm"
    assert called == ["sgl" if sizes in SIZES[:2] else "onednn"]


@pytest.mark.parametrize("scheme", [TENSOR, STATIC])
def test_onednn_takes_float32_with_amx(amx: None, scheme: Scheme) -> None:
    reasons = dict(select.explain_kernels(base.Request("layer", scheme, True, torch.float32, "cpu")))
    assert reasons["onednn-tensor"] is None


# --- where nothing can be measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [TOKEN, TENSOR, STATIC])
def test_a_kernel_is_selected_on_the_meta_device(scheme: Scheme) -> None:
    """vLLM builds layers there that it skips, such as the towers of a multimodal model without images."""
    exact.onednn_is_exact.cache_clear()
    exact.compiled_is_exact.cache_clear()
    request = base.Request("layer", scheme, True, torch.float32, "cpu")
    with torch.device("meta"):
        chosen = select.select_kernel(request).name
        measured = exact.onednn_is_exact(), exact.compiled_is_exact() if build.why_not() is None else None
    exact.onednn_is_exact.cache_clear()
    exact.compiled_is_exact.cache_clear()
    assert chosen == select.select_kernel(request).name
    assert measured == (exact.onednn_is_exact(), exact.compiled_is_exact() if build.why_not() is None else None)


@pytest.mark.parametrize("operator", exact.ONEDNN_OPERATORS)
def test_a_vllm_without_onednn_selects_another_kernel(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """Builds for Apple silicon and RISC-V have none."""
    others = {name: getattr(torch.ops._C, name) for name in exact.ONEDNN_OPERATORS if name != operator}
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(**others))
    monkeypatch.setattr(build, "why_not", lambda: "no compiler")
    exact.onednn_is_exact.cache_clear()
    for scheme, name in ((TOKEN, "vllm"), (TENSOR, "onednn-tensor"), (STATIC, "onednn-tensor")):
        reasons = dict(select.explain_kernels(base.Request("layer", scheme, True, torch.bfloat16, "cpu")))
        assert reasons[name] == "this vLLM is built without oneDNN's INT8 GEMM"
        assert reasons["float32-integers"] is None
    exact.onednn_is_exact.cache_clear()


# --- wide layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [TOKEN, TENSOR, STATIC])
def test_our_product_gets_no_layer_that_its_sums_cannot_hold(monkeypatch: pytest.MonkeyPatch, scheme: Scheme) -> None:
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: False)
    warnings: list[str] = []
    monkeypatch.setattr(select.logger, "warning", lambda text, *values: warnings.append(text % values))
    select._warn_slow.cache_clear()
    monkeypatch.setattr(build, "why_not", lambda: None)
    monkeypatch.setattr(exact, "compiled_is_exact", lambda: True)
    for in_features, chosen in ((2**16, "compiled"), (2**16 + 1, "float32-integers"), (73728, "float32-integers")):
        request = base.Request("layer", scheme, True, torch.bfloat16, "cpu", in_features=in_features)
        assert select.select_kernel(request).name == chosen
    assert "our sums hold 65,536 products, and the layer has 73,728 inputs" in warnings[-1]
    wide = torch.nn.Module()
    wide.weight = torch.zeros(1, 2**16 + 1, dtype=torch.int8)
    with pytest.raises(SmoothQuantError, match="at most 65536 inputs"):
        cpu.Compiled(base.Request("layer", scheme, True, torch.bfloat16, "cpu")).prepare(wide)
