"""Checks that integer products are exact, computed once on the CPU that serves."""

import torch

from .base import measured
from .ops import int8_linear

INEXACT = "oneDNN's INT8 GEMM saturates on this CPU (no VNNI) and would silently give wrong sums"
ABSENT = "this vLLM is built without oneDNN's INT8 GEMM"
ONEDNN_OPERATORS = (
    "create_onednn_scaled_mm_handler", "release_dnnl_matmul_handler", "onednn_scaled_mm",
    "static_scaled_int8_quant", "dynamic_scaled_int8_quant",
)  # fmt: skip


def why_not_onednn() -> str | None:
    """The reason why vLLM's oneDNN INT8 GEMM cannot serve here; None if it can."""
    if onednn_is_exact():
        return None
    return INEXACT if _has_onednn() else ABSENT


def _has_onednn() -> bool:
    from vllm import _custom_ops  # noqa: F401  it loads the operators

    return all(hasattr(torch.ops._C, name) for name in ONEDNN_OPERATORS)


@measured
def onednn_is_exact() -> bool:
    """Whether vLLM's oneDNN INT8 GEMM gives exact sums on this CPU, measured with extreme values of both operands.

    Without VNNI, x86 adds pairs of products in 16 bits and clips them: sums with any |weight| above 64 may be wrong,
    and neither oneDNN nor vLLM reports it. One token and several tokens are tested. False where vLLM is built without.
    """
    from vllm import _custom_ops as vllm_ops

    if not _has_onednn():
        return False
    n = k = 64
    # Pass dtype and device explicitly: vLLM changes torch's defaults while it builds a model.
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for tokens in (1, 16):
        weight = torch.full((n, k), -127, dtype=torch.int8, device="cpu")
        weight[::2] = 127
        handler = vllm_ops.create_onednn_scaled_mm(weight.t(), one, torch.float32, False, False, 1)
        x = torch.full((tokens, k), 127, dtype=torch.int8, device="cpu")
        out = torch.empty(tokens, n, dtype=torch.float32, device="cpu")
        torch.ops._C.onednn_scaled_mm(out, x, one, None, None, None, handler.handler_tensor)
        if not torch.equal(out.double(), x.double() @ weight.double().t()):
            return False
    return True


@measured
def compiled_is_exact() -> bool:
    """Whether Compiled gives exact sums on this CPU, measured with extreme values and sizes that no tile divides."""
    n, in_features = 7, 100  # n tokens and n outputs
    number = torch.arange(n, device="cpu").reshape(-1, 1)
    weight = torch.where(number % 2 == 0, -128, 127 - number).expand(-1, in_features).to(torch.int8).contiguous()
    x = torch.where(number % 2 == 0, -128.0, 127.0).expand(-1, in_features)
    one = torch.ones(n, dtype=torch.float32, device="cpu")
    y = int8_linear(x.to(torch.float32), weight, one, weight.sum(1, dtype=torch.int32), one[:1], None, False)
    return torch.equal(y.double(), x.double() @ weight.double().t())
