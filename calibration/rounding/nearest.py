"""Scales of 4-bit weights, and rounding to the nearest integer.

    scale = range_factor * absmax / 7       for each group with the smallest sum over k of h_k (w_k - q_k scale)^2

h_k is the mean square of input k, if it is known, and 1 otherwise. A factor below 1 clips the largest weights of a
group so that the many small ones are rounded finer.

Source: the clipping search of AWQ (Lin et al., arXiv 2306.00978, section 3.2 and its code), there by block outputs.
"""

import torch

from vllm_smoothquant.format import int4

RANGE_FACTORS = tuple(1 - 0.04 * step for step in range(11))


def best_scale(weight: torch.Tensor, group_size: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [out, groups]: the best scale of each group of `weight` [out, in]. importance: h, float32 [in]."""
    weight = weight.float()
    h = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(weight.device)
    best, least = torch.empty(0), torch.empty(0)
    for factor in RANGE_FACTORS:
        scale = int4.group_scale(weight, group_size, factor)
        error = (int4.dequantize(int4.quantize(weight, scale), scale) - weight).square() * h
        loss = error.unflatten(1, (-1, group_size)).sum(-1)
        if not len(best):
            best, least = scale, loss
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best
