"""Run Triton kernels, ours and vLLM's, in Triton's interpreter on the CPU. tests/test_cuda.py starts this.

    python -m tests.helpers.triton_interpreter IN OUT

IN: a file with lists of arguments of our operators "quantize_per_token" and "triton_int8_mm", which calls vLLM's GEMM.
OUT: their results, and what opcheck says of each operator.
"""

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch

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
def import_gemm() -> ModuleType:
    """vLLM's Triton GEMM. Without a GPU, vLLM imports it with a placeholder for Triton."""
    import triton
    import vllm.triton_utils

    placeholders = vllm.triton_utils.triton, vllm.triton_utils.tl
    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
    assert GEMM not in sys.modules
    gemm = importlib.import_module(GEMM)
    vllm.triton_utils.triton, vllm.triton_utils.tl = placeholders
    return gemm


def main(source: str, target: str) -> None:
    interpret()
    import_gemm()
    from vllm_smoothquant.kernels import ops

    answer = {}
    for name, cases in torch.load(source).items():
        operator = getattr(ops, name)
        opcheck = torch.library.opcheck(operator, cases[0])
        answer[name] = {"results": [operator(*case) for case in cases], "opcheck": set(opcheck.values())}
    torch.save(answer, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
