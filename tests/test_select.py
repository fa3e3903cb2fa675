"""The kernel that is selected, and the reasons why the candidates before it are not."""

import time
from typing import Any

import pytest
import torch

from tests.helpers.vllm_layers import STATIC, TENSOR, TOKEN
from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.kernels import base, build, cpu, exact, select, timing


@pytest.mark.parametrize(
    ("platform", "capability", "is_exact", "scheme", "selected"),
    [
        ("cpu", None, True, TOKEN, "vllm"),
        ("cpu", None, True, TENSOR, "onednn-tensor"),
        ("cpu", None, True, STATIC, "onednn-tensor"),
        ("cpu", None, False, TOKEN, "avx2"),
        ("cpu", None, False, TENSOR, "avx2"),
        ("cpu", None, False, STATIC, "avx2"),
        ("cuda", 75, True, TOKEN, "vllm"),
        ("cuda", 90, True, STATIC, "vllm"),
        ("cuda", 90, True, TENSOR, "cutlass-tensor"),
        ("cuda", 100, True, TOKEN, "triton"),
        ("cuda", 120, True, STATIC, "triton"),
        ("cuda", 120, True, TENSOR, "triton"),
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
    monkeypatch.setattr(build, "target", lambda: None if is_exact else "avx2")
    request = base.Request("layer", scheme, True, torch.bfloat16, platform, capability)
    reasons = select.explain_kernels(request)
    assert next(name for name, reason in reasons if reason is None) == selected
    assert all(reason for name, reason in reasons[: [name for name, _ in reasons].index(selected)])


@pytest.mark.parametrize(("scheme", "rival"), [(TOKEN, "vllm"), (TENSOR, "onednn-tensor"), (STATIC, "onednn-tensor")])
def test_vnni_is_selected_if_it_is_faster(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, rival: str) -> None:
    """Timings of a CPU with VNNI are patched in, so nothing is measured here."""
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: True)
    monkeypatch.setattr(exact, "compiled_is_exact", lambda: True)
    monkeypatch.setattr(build, "target", lambda: "vnni")
    monkeypatch.setattr(build, "int8_linear", lambda: print)
    ratios = {1: 0.8, 16: 0.9, 256: 0.7}
    monkeypatch.setattr(timing, "_ratios", lambda kernel, other, request: ratios if other.name == rival else {})
    amx = False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    request = base.Request("layer", scheme, True, torch.bfloat16, "cpu")

    def reason() -> str | None:
        return dict(select.explain_kernels(request))["vnni"]

    assert reason() is None
    ratios[16] = 1.1
    assert reason() == f"measured here: 1.10 of the time of {rival!r} at 16 tokens"
    assert next(name for name, reason in select.explain_kernels(request) if reason is None) == rival
    amx = True
    assert "AMX" in (reason() or "")


def test_timing_finds_a_number_of_tokens_with_a_slower_kernel() -> None:
    """Two kernels that sleep: the first one is faster, except for 16 tokens."""

    class Sleeps(cpu.Float32Integers):
        def prepare(self, layer: Any) -> None:
            layer.weight = None

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            time.sleep(0.002 if len(x) == 16 else 0.0005)
            return x

    class Longer(Sleeps):
        name = "longer"

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            time.sleep(0.001)
            return x

    request = base.Request("layer", TOKEN, True, torch.float32, "cpu")
    reason = timing.slower_than(Sleeps, Longer, request)
    assert reason is not None
    assert reason.endswith("of the time of 'longer' at 16 tokens")
    assert timing.slower_than(Longer, Sleeps, request) != reason


def test_no_kernel_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmoothQuantError, match="no kernels for platform 'other'"):
        select.select_kernel(base.Request("layer", TOKEN, True, torch.bfloat16, "other"))
    monkeypatch.setitem(select.CANDIDATES, "cuda", select.CANDIDATES["cuda"][:2])
    with pytest.raises(SmoothQuantError, match=r"vllm: .*; cutlass-tensor: writes float16 or bfloat16"):
        select.select_kernel(base.Request("layer", TENSOR, True, torch.float32, "cuda", 90))


@pytest.mark.parametrize("scheme", [TOKEN, TENSOR, STATIC])
def test_cutlass_gets_no_sizes_that_it_does_not_support(scheme: Scheme) -> None:
    request = base.Request("layer", scheme, True, torch.bfloat16, "cuda", 90, aligned=False)
    assert [name for name, reason in select.explain_kernels(request) if reason is None] == ["triton"]
