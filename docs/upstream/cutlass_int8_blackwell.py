"""What vLLM's INT8 kernel classes for CUDA say about compute capabilities. Needs no GPU."""

from types import SimpleNamespace

from vllm.model_executor.kernels.linear.scaled_mm import cutlass, triton

cutlass.current_platform = triton.current_platform = SimpleNamespace(is_cuda=lambda: True, is_cuda_alike=lambda: True)
for kernel in (cutlass.CutlassInt8ScaledMMLinearKernel, triton.TritonInt8ScaledMMLinearKernel):
    for capability in (90, 100, 120):
        print(f"{kernel.__name__}.is_supported({capability}): {kernel.is_supported(capability)}")
