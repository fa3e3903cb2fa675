"""The 8-bit layers of simulate.py with gradients: how the output as served depends on the smoothing factors.

Integers are rounded again at each step. Backwards, x passes the rounding as if it were not there, but its scale does
not: d (q * scale) / d scale = q - x / scale, the error of each integer, by which learning sees what rounding costs.

Source: the straight-through estimator for x, and the gradient of a scale, of LSQ (Esser et al., arXiv 1902.08153, eq. 3
and 5).
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_smoothquant.format import int8

from . import simulate
from .simulate import LayerScheme


class _Rounded(torch.autograd.Function):
    """One function, because autograd through its parts takes twice as long for a weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = (x / scale).round_().clamp_(int8.QMIN, int8.QMAX).mul_(scale)
        ctx.save_for_backward(x, scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, y = ctx.saved_tensors
        return gradients[0], ((y - x).mul_(gradients[0]) / scale).sum_to_size(scale.shape)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The integers of x under `scale`, times `scale`. Values of x beyond the largest integer: see `clipped`."""
    return _Rounded.apply(x, scale)


def clipped(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x within the range of int8 under a static `scale`: what is clipped has no gradient, and the scale has its."""
    return x.clamp(scale * int8.QMIN, scale * int8.QMAX)


def rounded_weight(weight: torch.Tensor, strategy: str) -> torch.Tensor:
    """The integers of `weight` float32 [out, in] as int8.quantize_weight rounds them, times their scale."""
    shared = (0, 1) if strategy == "tensor" else 1
    return rounded(weight, int8.absmax_scale(weight.abs().amax(shared, keepdim=True)))


def output(module: nn.Module, x: torch.Tensor, layer: LayerScheme, absmax: torch.Tensor) -> torch.Tensor:
    """simulate.output, differentiable in x and in the factors of `layer`.

    absmax: max|X_j| of the layer's input, float32 [in]; a static range is that of the input divided by the factors.
    Only the arguments are kept for the backward pass, which computes the rest again: a model's rounded weights would
    take more memory than the model.
    """

    def run(x: torch.Tensor, columns: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
        served = LayerScheme(layer.scheme, columns, rows, transposed=layer.transposed)
        x, activations = simulate.divided_input(x, served), layer.scheme.input_activations
        if activations.rounded and not activations.dynamic:
            largest = (absmax if columns is None else absmax / columns).amax()
            static = int8.absmax_scale(largest).to(x.device)
            x = rounded(clipped(x, static), static)
        elif (scale := simulate.input_scale(x, served)) is not None:
            x = rounded(x, scale)
        y = x @ rounded_weight(simulate.weight_matrix(module, served), layer.scheme.weights.strategy).t()
        return y if rows is None else y * rows.to(y.device)

    y = checkpoint(run, x, layer.input_factor, layer.output_factor, use_reentrant=False)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias.float()
