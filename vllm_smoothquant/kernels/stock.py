"""vLLM's own INT8 kernels, chosen by vLLM itself."""

from typing import Any

import torch

from . import exact
from .base import Kernel, Request, no_rows, packed_elsewhere
from .cuda import no_cutlass, quantize_on_cuda


class VllmChoice(Kernel):
    """vLLM's own INT8 kernels through its own chooser: per_token on all platforms, static per_tensor on CUDA.

    If it chooses CUTLASS, quantize_on_cuda quantises x, and vLLM's class only multiplies.
    """

    name = "vllm"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.dynamic and not request.per_token:
            return "vLLM has no kernel for dynamic per_tensor activations"
        if request.platform == "cpu" and not request.dynamic:
            return "vLLM's AMX kernel never reads input_scale: static would silently become dynamic"
        if request.platform == "cpu":
            return exact.why_not_onednn() or _no_amx(request)
        return no_cutlass(request) if request.platform == "cuda" else None

    def __init__(self, request: Request) -> None:
        from vllm import _custom_ops as vllm_ops
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel

        super().__init__(request)
        self.kernel = init_int8_linear_kernel(
            is_channelwise=request.channelwise,
            is_static_input_scheme=not request.dynamic,
            input_symmetric=True,
            module_name=request.layer,
        )
        # By name, because Triton's class is a subclass of this one and --linear-backend may choose it.
        self.smooths = type(self.kernel).__name__ == "CutlassInt8ScaledMMLinearKernel"
        self.multiply = vllm_ops.cutlass_scaled_mm if self.smooths else None

    def prepare(self, layer: Any) -> None:
        self.out_features = layer.weight.shape[0]
        placeholder = packed_elsewhere(layer.weight.data)
        self.kernel.process_weights_after_loading(layer)
        # oneDNN keeps the address of the scales, and vLLM puts another parameter here when it reloads weights.
        self.weight_scale = layer.weight_scale.data
        if layer.weight is None:  # vLLM's oneDNN kernel has a packed copy
            layer.weight = placeholder

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if no_rows(x):
            return x.new_empty(0, self.out_features)
        if self.multiply is None:
            y: torch.Tensor = self.kernel.apply_weights(layer, x.to(self.dtype), bias)
        else:
            integers, scale = quantize_on_cuda(layer, x, self.activations)
            y = self.multiply(integers, layer.weight, scale, layer.weight_scale, self.dtype, bias)
        return y.to(x.dtype)


def _no_amx(request: Request) -> str | None:
    """The reason why vLLM's AMX operator, which its CPU class calls for some sizes, cannot serve `request`."""
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

    if request.dtype in (torch.bfloat16, torch.float16):
        return None
    takes_sizes = check_cpu_sgl_kernel(request.out_features, request.in_features, torch.int8)
    return f"vLLM's AMX operator computes in bfloat16 and float16, not {request.dtype}" if takes_sizes else None
