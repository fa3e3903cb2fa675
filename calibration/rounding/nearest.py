"""Scales of 4-bit weights, and rounding to the nearest integer.

    scale = -range_factor * w_max / 8       for each group with the smallest sum over k of h_k (w_k - q_k scale)^2

w_max is the weight of the largest magnitude: of the integers from -8 to 7 it gets -8, so that a scale may be negative.
h_k is the mean square of input k, if it is known, and 1 otherwise. A factor below 1 clips the largest weights of a
group so that the many small ones are rounded finer.

With zero points, integers of a group go from -zero_point to 15 - zero_point, which 4 unsigned bits store as integer +
zero_point. The scale then needs to cover only the range from the group's smallest weight to its largest:

    scale = range_factor * (max - min) / 15       zero_point = round(-range_factor * min / scale)

The format has none: docs/zero_points.md measures what they would gain.

Source: the clipping search of AWQ (Lin et al., arXiv 2306.00978, section 3.2 and its code), there by block outputs; its
weights have zero points.
"""

from collections.abc import Callable

import torch

from vllm_smoothquant.format import int4

RANGE_FACTORS = tuple(1 - 0.04 * step for step in range(11))
STEPS = int4.QMAX - int4.QMIN
# (scale, zero point), float32 [out, groups] each; without zero points the middle, 8.
Grid = tuple[torch.Tensor, torch.Tensor]


def best_scale(
    weight: torch.Tensor, group_size: int, importance: torch.Tensor | None = None, *, signed: bool = True
) -> torch.Tensor:
    """float32 [out, groups]: the best scale of each group of `weight` [out, in]. importance: h, float32 [in].

    signed: False: none is negative, and 7 is for the largest magnitude. True: none that is negative is larger than the
    largest that is not, because Marlin makes integers of scales by their maximum.
    """
    scale, _ = _best(weight, _signed if signed else _positive, group_size, importance)
    large = scale < -scale.max()
    if (rows := large.any(1)).any():
        positive = best_scale(weight[rows], group_size, importance, signed=False)
        scale[rows] = torch.where(large[rows], positive, scale[rows])
    return scale


def best_zero_points(
    weight: torch.Tensor, group_size: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [out, groups] each: the best scale of each group of `weight` [out, in] and its zero point, 0 to 15."""
    return _best(weight, _shifted, group_size, importance)


def quantize(weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] with values from -zero_point to 15 - zero_point. weight [out, in]; the others [out, groups]."""
    lowest = -zero_point[..., None]
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return torch.round(groups / scale[..., None]).clamp(lowest, lowest + STEPS).flatten(1).to(torch.int8)


def _best(
    weight: torch.Tensor,
    grid: Callable[[torch.Tensor, int, float], Grid],
    group_size: int,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.float()
    h = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(weight.device)
    best, zeros, least = torch.empty(0), torch.empty(0), torch.empty(0)
    for factor in RANGE_FACTORS:
        scale, zero_point = grid(weight, group_size, factor)
        error = (int4.dequantize(quantize(weight, scale, zero_point), scale) - weight).square() * h
        loss = error.unflatten(1, (-1, group_size)).sum(-1)
        if not len(best):
            best, zeros, least = scale, zero_point, loss
        better = loss < least
        best, zeros = torch.where(better, scale, best), torch.where(better, zero_point, zeros)
        least = torch.where(better, loss, least)
    return best, zeros


def _signed(weight: torch.Tensor, group_size: int, range_factor: float) -> Grid:
    scale = int4.group_scale(weight, group_size, range_factor)
    return scale, torch.full_like(scale, -int4.QMIN)


def _positive(weight: torch.Tensor, group_size: int, range_factor: float) -> Grid:
    scale, middle = _signed(weight, group_size, range_factor * int4.QMIN / int4.QMAX)
    return scale.abs(), middle


def _shifted(weight: torch.Tensor, group_size: int, range_factor: float) -> Grid:
    groups = weight.unflatten(1, (-1, group_size))
    # 0 is inside, because a weight of 0 must stay 0.
    low, high = groups.amin(-1).clamp(max=0) * range_factor, groups.amax(-1).clamp(min=0) * range_factor
    scale = ((high - low) / STEPS).to(torch.bfloat16).float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).clamp(0, STEPS)
