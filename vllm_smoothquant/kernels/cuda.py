"""Kernels for CUDA: CUTLASS per tensor, vLLM's Triton product, and the quantisation of activations before both."""

from typing import Any

import torch

from ..format import int8
from ..format.config import InputActivations
from ..format.errors import SmoothQuantError
from .base import Kernel, Request, frozen, no_rows
from .ops import quantize_per_token, real_rows, triton_int8_mm


class CutlassTensor(Kernel):
    """Dynamic per_tensor on CUDA: absmax of the batch, quantise, CUTLASS. Nothing waits for the device.

    One absmax couples all requests of a batch. This is the meaning of the scheme, and why per_token is the default.
    """

    name = "cutlass-tensor"
    smooths = True

    @staticmethod
    def rejects(request: Request) -> str | None:
        if not request.dynamic or request.per_token:
            return "only dynamic per_tensor activations"
        return no_cutlass(request)

    def __init__(self, request: Request) -> None:
        from vllm import _custom_ops as vllm_ops

        super().__init__(request)
        if request.dynamic and not request.per_token:
            _refuse_context_parallel(request)
        self.multiply = vllm_ops.cutlass_scaled_mm

    def prepare(self, layer: Any) -> None:
        self.out_features = layer.weight.shape[0]
        layer.weight = frozen(layer.weight.data.t())  # a view [in, out], column-major, as both GEMMs expect it
        layer.weight_scale = frozen(layer.weight_scale.data)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if no_rows(x):
            return x.new_empty(0, self.out_features)
        integers, scale = quantize_on_cuda(layer, x, self.activations)
        return self.multiply(integers, layer.weight, scale, layer.weight_scale, self.dtype, bias).to(x.dtype)


class Triton(CutlassTensor):
    """vLLM's Triton GEMM, for all schemes: compute capability 10.0 and above, or what CUTLASS does not take.

    It loads the end of a row with a mask and no value for the elements behind it. Triton makes them zero, so `in` need
    not be a multiple of a tile; tests/test_cuda.py reads this in the code that Triton generates.
    """

    name = "triton"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.capability is not None and request.capability < 80:
            return "Triton has no INT8 product below compute capability 8.0"
        return None

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.multiply = triton_int8_mm


def no_cutlass(request: Request) -> str | None:
    """The reason why vLLM's CUTLASS INT8 GEMM cannot serve `request`, although its `is_supported` returns true."""
    if (request.capability or 0) >= 100:
        return "CUTLASS's INT8 kernels stop below compute capability 10.0"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"writes float16 or bfloat16, not {request.dtype}"
    return None if request.aligned else "CUTLASS needs in and out to be multiples of 16"


def _refuse_context_parallel(request: Request) -> None:
    """Ranks that share a sequence see only the slots of their own tokens: real_rows would take others for padding."""
    from vllm.config import get_current_vllm_config

    parallel = get_current_vllm_config().parallel_config
    ranks = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    if ranks > 1:
        expected = "1 rank of context parallelism with dynamic per_tensor activations"
        fix = "serve without context parallelism, or calibrate with a scale per token"
        raise SmoothQuantError(request.layer, expected, str(ranks), fix)


def quantize_on_cuda(layer: Any, x: torch.Tensor, activations: InputActivations) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, in] / smoothing_factor, rounded: int8 [tokens, in] and its float32 scale, [tokens, 1] or one element.

    Compiled, it is plain torch, because Inductor fuses that with the norm or the activation function before it. An
    operator would be a kernel of its own that reads and writes x once more. Eager, it uses the fewest kernels possible.
    """
    from vllm import _custom_ops as vllm_ops

    compiling = torch.compiler.is_compiling()
    inverse = getattr(layer, "inverse_smoothing_factor", None)
    per_token = activations.strategy == "token"
    if per_token and not compiling and inverse is not None:
        return quantize_per_token(x, inverse)
    if inverse is not None:
        x = x * inverse  # float32: rounded once, below
    scale = None
    if not activations.dynamic:
        scale = layer.input_scale
    elif not per_token:
        # Padding rows of a CUDA graph hold old values and must not count, but NaN in a real row must reach the scale.
        rows = torch.where(real_rows(layer.weight_scale, x.shape[0]), x.abs().amax(dim=1), 0)
        scale = int8.absmax_scale(rows.amax().reshape(1))
    elif compiling:
        scale = int8.input_scale(x, "token")
    if compiling:
        assert scale is not None
        return int8.quantize(x, scale), scale
    integers, scale, _ = vllm_ops.scaled_int8_quant(x.contiguous(), scale)
    return integers, scale
