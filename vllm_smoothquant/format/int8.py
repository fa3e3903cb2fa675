"""The one rounding rule, and the integer product with which every fast kernel is compared.

    q = clamp(round(x / scale), -128, 127)      int8, round half to even, symmetric (no zero point)
    scale = absmax / 127                        so real = q * scale
    y = (q_x @ q_w^T) * scale_x * scale_w^T     summed as integers, scaled once

Shapes: x [tokens, in], weight [out, in]. A scale multiplies integers to give reals. Scales are per_tensor [1],
per_token [tokens, 1] for activations, or per_channel [out, 1] for weights. Because absmax maps to 127, -128 appears
only if a static scale clips.

Plain torch, because calibration, the tests and the fallback kernels use it on any device.
Source: Xiao et al., SmoothQuant (arXiv 2211.10438), eq. 1 and section 2.
"""

import torch

QMAX = 127
QMIN = -128


def absmax_scale(absmax: torch.Tensor) -> torch.Tensor:
    """float32 scale that maps `absmax` (any shape, >= 0) to 127.

    An absmax of 0 gives the scale 1, because a scale must be finite and positive. An absmax too small for a normal
    float32 scale also gives 1, because the reciprocal would be infinite. NaN stays NaN, so that later checks see it.
    """
    scale = absmax.to(torch.float32) / QMAX
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 integers of `x` under `scale` (broadcast against x), computed in float32 for every dtype of x."""
    return torch.round(x.to(torch.float32) / scale).clamp_(QMIN, QMAX).to(torch.int8)


def quantize_weight(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `weight` [out, in]; returns int8 [out, in] and its float32 scale.

    strategy "channel" gives a scale of [out, 1] (one per output channel), "tensor" a scale of [1].
    """
    if strategy == "channel":
        scale = absmax_scale(weight.abs().amax(dim=1, keepdim=True))
    elif strategy == "tensor":
        scale = absmax_scale(weight.abs().amax().reshape(1))
    else:
        raise ValueError(f"weights strategy: expected 'channel' or 'tensor', got {strategy!r}")
    return quantize(weight, scale), scale


def input_scale(x: torch.Tensor, strategy: str) -> torch.Tensor:
    """Dynamic float32 scale of activations `x` [tokens, in]: "token" gives [tokens, 1], "tensor" gives [1]."""
    if strategy == "token":
        return absmax_scale(x.abs().amax(dim=-1, keepdim=True))
    if strategy == "tensor":
        return absmax_scale(x.abs().amax().reshape(1))
    raise ValueError(f"input_activations strategy: expected 'token' or 'tensor', got {strategy!r}")


def int8_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact integer product of int8 x [tokens, in] and int8 weight [out, in], as float64 [tokens, out].

    This is integer arithmetic on any device, because float64 holds every integer below 2**53 and |sum| <= 2**14 * in.
    """
    return x.to(torch.float64) @ weight.to(torch.float64).t()


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    strategy: str,
    input_scale_static: torch.Tensor | None = None,
    smoothing_factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a quantised linear layer: x [..., in] to [..., out] in x's dtype.

    weight int8 [out, in]; weight_scale [out, 1] or [1]; strategy "token" or "tensor" selects the dynamic scale of the
    activations if `input_scale_static` ([1]) is None; smoothing_factor [in] divides x first; bias [out] is added last.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if smoothing_factor is not None:
        tokens = tokens.to(torch.float32) / smoothing_factor
    scale = input_scale_static if input_scale_static is not None else input_scale(tokens, strategy)
    y = int8_matmul(quantize(tokens, scale), weight) * scale.double() * weight_scale.double().reshape(1, -1)
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
