"""Run Triton kernels, ours and vLLM's, in Triton's interpreter on the CPU. tests/test_cuda.py starts this.

    python -m tests.helpers.triton_interpreter IN OUT

IN: a file with lists of arguments of our operators "quantize_per_token" and "triton_int8_mm", which calls vLLM's GEMM,
or of `experts`, which calls vLLM's kernel for routed experts. OUT: their results, and what opcheck says of operators.
"""

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch

FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
GEMM = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"


def interpret() -> None:
    """Make Triton interpret the kernels of this process. Call it before anything imports Triton."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, add = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fadd

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        # The interpreter rounds to bfloat16 towards 0, GPUs to nearest.
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def create_fadd(self: Any, a: Any, b: Any) -> Any:
        # The interpreter adds the bits of bfloat16 as integers. vLLM 0.26's GEMM adds its bias in bfloat16.
        if a.dtype.scalar != tl.bfloat16:
            return add(self, a, b)
        return cast_impl(self, add(self, cast(self, a, tl.float32), cast(self, b, tl.float32)), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fadd = create_fadd


@functools.cache
def import_gemm(name: str = GEMM) -> ModuleType:
    """vLLM's Triton GEMM, or its module `name`. Without a GPU, vLLM imports it with a placeholder for Triton."""
    import triton
    import vllm.triton_utils

    placeholders = vllm.triton_utils.triton, vllm.triton_utils.tl
    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
    assert name not in sys.modules
    module = importlib.import_module(name)
    vllm.triton_utils.triton, vllm.triton_utils.tl = placeholders
    return module


def experts(
    x: torch.Tensor, gate_up: torch.Tensor, gate_up_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor,
    chosen: torch.Tensor, weights: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Routed experts as vLLM's TritonExperts computes them: both products by its kernel, in the layout of our plugin.

    x float32 [tokens, hidden]; gate_up int8 [experts, 2 * inner, hidden], down [experts, hidden, inner]; scales
    [experts, rows, 1]; chosen int64 and weights float32 [tokens, choices]. Integers of activations and SiLU are
    torch's, because the interpreter has no libdevice, with which vLLM's kernel rounds; so is the sorting by expert.
    """
    import triton.language as tl

    from vllm_smoothquant.format import int8

    module = import_gemm(FUSED_MOE)
    block, (tokens, choices), count = 16, chosen.shape, len(gate_up)
    config = {"BLOCK_SIZE_M": block, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
    order, experts_of = [], []
    for expert in range(count):
        pairs = (chosen.flatten() == expert).nonzero().flatten().tolist()
        pairs += [chosen.numel()] * (-len(pairs) % block)  # padding, which the kernel passes over
        order += pairs
        experts_of += [expert] * (len(pairs) // block)
    ids, blocks = torch.tensor(order, dtype=torch.int32), torch.tensor(experts_of, dtype=torch.int32)
    padded = torch.tensor([len(order)], dtype=torch.int32)

    def product(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, last: bool) -> torch.Tensor:
        step = int8.input_scale(values, "token")
        out = torch.zeros(tokens, choices, weight.shape[1])
        module.invoke_fused_moe_triton_kernel(
            int8.quantize(values, step), weight, out, step, scale, weights if last else None, ids, blocks, padded, last,
            1 if last else choices, config, tl.float32, False, True, False, False, True,
        )  # fmt: skip
        return out

    gate, up = product(x, gate_up, gate_up_scale, False).chunk(2, dim=-1)
    hidden = (torch.nn.functional.silu(gate) * up).flatten(0, 1)
    return product(hidden, down, down_scale, True).sum(1)


def main(source: str, target: str) -> None:
    interpret()
    if "experts" in (requests := torch.load(source)):
        torch.save({"experts": {"results": [experts(*case) for case in requests["experts"]]}}, target)
        return
    import_gemm()
    from vllm_smoothquant.kernels import ops

    answer = {}
    for name, cases in requests.items():
        operator = getattr(ops, name)
        opcheck = torch.library.opcheck(operator, cases[0])
        answer[name] = {"results": [operator(*case) for case in cases], "opcheck": set(opcheck.values())}
    torch.save(answer, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
