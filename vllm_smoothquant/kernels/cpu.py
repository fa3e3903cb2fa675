"""Kernels for CPUs: vLLM's oneDNN operators per tensor, our own compiled product, and a float32 fallback."""

from typing import Any

import torch

from ..format import int8
from ..format.errors import SmoothQuantError
from . import build, exact
from .base import Kernel, Request, frozen, no_rows, packed_elsewhere
from .ops import int8_linear, onednn_tensor_int8, widened_linear


class OneDnnTensor(Kernel):
    """per_tensor activations on CPU, static or dynamic, through vLLM's oneDNN operators (ops.onednn_tensor_int8)."""

    name = "onednn-tensor"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.per_token:
            return "only per_tensor activations"
        return exact.why_not_onednn()

    def prepare(self, layer: Any) -> None:
        from vllm import _custom_ops as vllm_ops

        # The handler keeps the address of the scales, not a reference: they must not move or be freed.
        self.weight_scale = layer.weight_scale.data.contiguous()
        layer.weight_scale = frozen(self.weight_scale)
        self.out_features = layer.weight.shape[0]
        self.handler = vllm_ops.create_onednn_scaled_mm(
            layer.weight.data.t(),
            self.weight_scale,
            self.dtype,
            False,  # not dynamic per_token: the handler reads one input scale at each call, static or measured
            False,  # no zero points
            32,
        )
        layer.weight = packed_elsewhere(layer.weight.data)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The handler writes outputs of this dtype whatever the output tensor's is: past its end if that is narrower.
        converted = x.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        handler = self.handler.handler_tensor
        return onednn_tensor_int8(converted, handler, self.out_features, layer.input_scale, bias).to(x.dtype)


class Compiled(Kernel):
    """Our own product, exact in integers, compiled where it runs (build.py), for what vLLM's kernels do not serve.

    That is every layer on a CPU on which oneDNN's sums are wrong (exact.onednn_is_exact), and float32 with AMX.
    """

    name = "compiled"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.in_features > build.MAX_IN_FEATURES:
            return f"our sums hold {build.MAX_IN_FEATURES:,} products, and the layer has {request.in_features:,} inputs"
        if reason := build.why_not():
            return reason
        return None if exact.compiled_is_exact() else f"wrong sums on this CPU: please report this, {build.SOURCE.name}"

    def prepare(self, layer: Any) -> None:
        if layer.weight.shape[1] > build.MAX_IN_FEATURES:  # unlike the request
            expected, fix = f"at most {build.MAX_IN_FEATURES} inputs", "please report this"
            raise SmoothQuantError("weight", expected, f"{list(layer.weight.shape)}", fix)
        layer.weight = frozen(layer.weight.data.contiguous())
        layer.weight_scale = frozen(layer.weight_scale.data.reshape(-1).expand(layer.weight.shape[0]).contiguous())
        # In chunks of 256 rows: summing at once would make an int32 copy of the matrix.
        sums = [rows.sum(1, dtype=torch.int32) for rows in layer.weight.data.split(256)]
        layer.weight_sum = frozen(torch.cat(sums))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        per_token = self.activations.strategy == "token"
        return int8_linear(x, layer.weight, layer.weight_scale, layer.weight_sum, layer.input_scale, bias, per_token)


def why_not_experts() -> str | None:
    """The reason why our product for routed experts does not serve on this CPU; None if it does."""
    if torch.cpu._is_amx_tile_supported():
        return "vLLM multiplies with AMX here"
    return build.why_not()


class Float32Integers(Kernel):
    """The same integers in float32, where neither oneDNN nor our product can serve. Its sums are exact for any `in`.

    Weights stay int8 and are widened part by part when they are used: this saves memory and is right, but it saves no
    time.
    """

    name = "float32-integers"

    @staticmethod
    def rejects(request: Request) -> str | None:
        return None

    def prepare(self, layer: Any) -> None:
        layer.weight = frozen(layer.weight.data)
        layer.weight_scale = frozen(layer.weight_scale.data.reshape(1, -1))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if no_rows(x):
            return x.new_empty(0, layer.weight.shape[0])
        # Plain torch around the operator, because Inductor fuses it with the operations before and after.
        scale = layer.input_scale if layer.input_scale is not None else int8.input_scale(x, self.activations.strategy)
        integers = torch.round(x.to(torch.float32) / scale).clamp(int8.QMIN, int8.QMAX)
        y = widened_linear(integers, layer.weight) * scale * layer.weight_scale
        return (y if bias is None else y + bias).to(x.dtype)
