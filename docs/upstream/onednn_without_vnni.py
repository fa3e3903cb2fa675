"""vLLM's oneDNN INT8 product as on an x86 CPU without VNNI. Both settings change nothing on a CPU with AVX2 only."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN then uses no instruction of later CPUs
import torch

torch.cpu._is_avx512_supported = lambda: False  # vLLM then loads its library for AVX2, vllm/_C_AVX2.abi3.so
from vllm import _custom_ops as ops  # noqa: E402

ONE = torch.ones(1)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    handler = ops.create_onednn_scaled_mm(weight.t(), ONE, torch.float32, False, False)
    return ops.onednn_scaled_mm(handler, x, torch.empty(len(x), len(weight)), ONE, None, None, None).double()


def rounded(values: torch.Tensor) -> torch.Tensor:
    return (values / values.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)


for number in (64, 65, 127):
    x, weight = torch.full((1, 64), 127, dtype=torch.int8), torch.full((1, 64), number, dtype=torch.int8)
    print(f"64 products of 127 x {number}: {product(x, weight).item():.0f}, right is {64 * 127 * number}")

torch.manual_seed(0)
for name, weight in (("normal", torch.randn(256, 576)), ("uniform", torch.rand(256, 576) * 2 - 1)):
    x, weight = rounded(torch.randn(16, 576)), rounded(weight)
    right = x.double() @ weight.double().t()
    error = product(x, weight) - right
    wrong, size = (error != 0).double().mean(), error.norm() / right.norm()
    print(f"{name} weights, 576 inputs: {wrong:.1%} of the sums are wrong, relative error {size:.3f}")
