"""Intervals in which a smoothing factor lies, by the tensors that are stored (verify_source.py)."""

import torch


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of `values` to the next ones of `dtype`, at most; constant below its smallest normal number."""
    return torch.finfo(dtype).eps * values.abs().clamp(min=torch.finfo(dtype).smallest_normal)


def bounds(a: torch.Tensor, b: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high): the common part, along `dim`, of intervals with the ends a and b in either order.

    low is at least 0. An end that is not finite bounds nothing.
    """
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    finite = torch.isfinite(a) & torch.isfinite(b)
    return torch.where(finite, a, 0.0).amax(dim).clamp(min=0), torch.where(finite, b, torch.inf).amin(dim)


def inverse_bounds(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bounds of s along dim 1, where a and b are the ends for 1 / s. An end at or below 0 bounds nothing."""
    low, high = bounds(a, torch.where(torch.maximum(a, b) > 0, b, torch.nan), dim=1)
    return 1 / high, torch.where(low > 0, 1 / low, torch.inf)
