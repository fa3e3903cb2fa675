"""Kernels for CPUs: vLLM's oneDNN operators per tensor, our own compiled product, and a float32 fallback."""

import functools
from typing import Any

import torch

from ..format import int8
from . import build, exact
from .base import Kernel, Request, logger
from .ops import int8_linear, onednn_tensor_int8


class OneDnnTensor(Kernel):
    """per_tensor activations on CPU, static or dynamic, through vLLM's oneDNN operators (ops.onednn_tensor_int8)."""

    name = "onednn-tensor"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.per_token:
            return "only per_tensor activations"
        return None if exact.onednn_is_exact() else exact.INEXACT

    def __init__(self, request: Request) -> None:
        self.dtype = request.dtype

    def prepare(self, layer: Any) -> None:
        from vllm import _custom_ops as vllm_ops

        # The handler keeps the address of the scales, not a reference: they must stay where they are.
        self.weight_scale = layer.weight_scale.data.contiguous()
        layer.weight_scale = torch.nn.Parameter(self.weight_scale, requires_grad=False)
        self.out_features = layer.weight.shape[0]
        self.handler = vllm_ops.create_onednn_scaled_mm(
            layer.weight.data.t(),
            self.weight_scale,
            self.dtype,
            False,  # not per_token: it reads one input scale at every call, so that one may be a measured one
            False,  # no zero points
            32,
        )
        # The handler has packed a copy; release ours.
        layer.weight = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return onednn_tensor_int8(x, self.handler.handler_tensor, self.out_features, layer.input_scale, bias)


class Compiled(Kernel):
    """Our own product, exact in integers, compiled where it runs (compiled.py); `name` is the instructions it uses."""

    @classmethod
    def rejects(cls, request: Request) -> str | None:
        if build.target() != cls.name:
            return f"this CPU is one for {build.target() or 'none of ours'}"
        found = build.int8_linear()
        if isinstance(found, str):
            return found
        return None if exact.compiled_is_exact() else f"wrong sums on this CPU: please report this, {build.SOURCE.name}"

    def __init__(self, request: Request) -> None:
        self.per_token = request.per_token

    def prepare(self, layer: Any) -> None:
        assert layer.weight.shape[1] <= build.MAX_IN_FEATURES, layer.weight.shape
        layer.weight = torch.nn.Parameter(layer.weight.data.contiguous(), requires_grad=False)
        scale = layer.weight_scale.data.reshape(-1).expand(layer.weight.shape[0]).contiguous()
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        # Row by row, as it were: torch would make an int32 copy of the whole matrix first.
        sums = [rows.sum(1, dtype=torch.int32) for rows in layer.weight.data.split(256)]
        layer.weight_sum = torch.nn.Parameter(torch.cat(sums), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear(
            x, layer.weight, layer.weight_scale, layer.weight_sum, layer.input_scale, bias, self.per_token
        )


class Vnni(Compiled):
    """For CPUs on which vLLM cannot multiply with AMX; select.py takes it only where it is faster than vLLM's own."""

    name = "vnni"
    only_if_faster = True

    @classmethod
    def rejects(cls, request: Request) -> str | None:
        return "vLLM multiplies with AMX here" if torch.cpu._is_amx_tile_supported() else super().rejects(request)


class Avx2(Compiled):
    """Where oneDNN's sums are wrong (see `exact.onednn_is_exact`)."""

    name = "avx2"


class Float32Integers(Kernel):
    """The same integers in float32: where oneDNN's INT8 GEMM is wrong and ours cannot be compiled.

    float32 holds every sum below 2**24 exactly (in <= 1040 at full range) and rounds longer ones by 6e-8. Weights stay
    int8 and are widened layer by layer as they are used: the memory is saved, the time is not, the result is right.
    """

    name = "float32-integers"

    @staticmethod
    def rejects(request: Request) -> str | None:
        return None

    def __init__(self, request: Request) -> None:
        self.strategy = request.scheme.input_activations.strategy
        _warn_slow()

    def prepare(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(layer.weight_scale.data.reshape(1, -1), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from .ops import widened_linear

        # Plain torch around it: Inductor fuses that with what comes before and after.
        scale = layer.input_scale if layer.input_scale is not None else int8.input_scale(x, self.strategy)
        integers = torch.round(x.to(torch.float32) / scale).clamp(int8.QMIN, int8.QMAX)
        y = widened_linear(integers, layer.weight) * scale * layer.weight_scale
        return (y if bias is None else y + bias).to(x.dtype)


@functools.cache
def _warn_slow() -> None:
    logger.warning(
        "%s, and ours is not at hand (%s); computing the same integers in float32: correct, but not faster than "
        "floating point",
        exact.INEXACT,
        build.int8_linear(),
    )
