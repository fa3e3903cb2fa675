"""4-bit weights: the rounding rule, the packing in files, and the plain product.

    q = clamp(round(w / scale), -8, 7)      signed 4 bits, one scale for each group of inputs of each output channel
    y = x @ (q * scale)^T                   the real weight is q * scale

Shapes: weight [out, in], scale float32 [out, in / group_size]. Scales have values that bfloat16 holds, because kernels
for 4 bits read them in the model's dtype. A scale may be negative, so that -8 stands for a positive weight.

Packed: int32 [out, in / 8]. A word has eight neighbouring inputs, the first in its lowest bits, each as q + 8. This is
the layout of compressed-tensors' "pack-quantized", which vLLM's kernels repack.
"""

import torch

from . import int8

QMAX, QMIN = 7, -8
# Inputs with one scale. Kernels take no other sizes.
GROUP_SIZES = (128, 64, 32)
IN_WORD = 8


def group_scale(weight: torch.Tensor, group_size: int, range_factor: float | torch.Tensor = 1.0) -> torch.Tensor:
    """float32 [out, groups]: the scale that maps `range_factor` times w_max to -8, negative if w_max is positive.

    w_max: the weight of the largest magnitude of a group. range_factor: below 1, it is clipped; a number, or
    [out, groups]. A group of zeros gets the scale 1.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (torch.where(-low >= high, low, high) * range_factor / QMIN).to(torch.bfloat16).float()
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] with values from -8 to 7. weight [out, in]; scale [out, groups]."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return torch.round(groups / scale[..., None]).clamp_(QMIN, QMAX).flatten(1).to(torch.int8)


def dequantize(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: integers * scale."""
    return (integers.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def pack(integers: torch.Tensor) -> torch.Tensor:
    """int32 [out, in / 8] of int8 `integers` [out, in]."""
    unsigned = (integers.to(torch.int32) - QMIN).unflatten(1, (-1, IN_WORD))
    shifts = torch.arange(0, 4 * IN_WORD, 4, dtype=torch.int32, device=integers.device)
    # The bits do not overlap, so that the sum is their union; int64 because the highest bit is a sign in int32.
    return (unsigned.long() << shifts).sum(-1).to(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] of int32 `packed` [out, in / 8]."""
    shifts = torch.arange(0, 4 * IN_WORD, 4, dtype=torch.int32, device=packed.device)
    return (((packed[..., None] >> shifts) & 15) + QMIN).flatten(1).to(torch.int8)


def linear_reference(
    x: torch.Tensor,
    integers: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    per_token: bool,
    smoothing_factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a layer with 4-bit weights: x [..., in] to [..., out] in x's dtype, summed in float64.

    per_token: x is rounded to int8 with a dynamic scale for each token, as for 8-bit weights; otherwise it is not
    rounded. smoothing_factor [in] divides x first; bias [out] is added last.
    """
    tokens = x.reshape(-1, x.shape[-1]).to(torch.float32)
    if smoothing_factor is not None:
        tokens = tokens / smoothing_factor
    reals = tokens.double()
    if per_token:
        scale = int8.input_scale(tokens, "token")
        reals = int8.quantize(tokens, scale).double() * scale.double()
    y = reals @ dequantize(integers, weight_scale).double().t()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype).reshape(*x.shape[:-1], integers.shape[0])
