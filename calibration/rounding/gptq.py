"""GPTQ: round the columns of a weight one after the other; each later column takes over a part of the error so far.

    minimise |(W - W^) X|^2 = trace((W - W^) H (W - W^)^T)          H = X X^T over the calibration tokens, [in, in]
    error of column k:   e = (w_k - q_k scale) / U_kk               U: upper Cholesky factor of H^-1, H = H + damping
    columns after k:     w_j = w_j - e U_kj

Columns are rounded in the order of decreasing H_kk, because the first ones have most columns left to correct them. The
scales are chosen before, so that the groups stay those of the file's order and no permutation is stored.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1 and section 3.3; the order: "act-order" of its code.
"""

import torch

from vllm_smoothquant.format import int4

from .nearest import STEPS

# Added to H's diagonal, relative to its mean (section 3.3).
DAMPING = 0.01
# Columns whose corrections of later columns are applied at once: matrix products instead of many vector products.
BLOCK = 128


def round_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """int8 [out, in] with values of 4 bits. weight [out, in]; hessian [in, in]; scale [out, groups] (int4.py).

    zero_point: as scale, if integers go from -zero_point to 15 - zero_point (nearest.py).
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w = weight.float()[:, order].clone()
    zero_point = torch.full_like(scale, -int4.QMIN) if zero_point is None else zero_point
    steps, zeros = (
        each.float().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)[:, order]
        for each in (scale, zero_point)
    )
    factor = _inverse_factor(hessian[order][:, order])
    q = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for k in range(start, stop):
            q[:, k] = torch.round(w[:, k] / steps[:, k]).clamp_(-zeros[:, k], STEPS - zeros[:, k])
            error = (w[:, k] - q[:, k] * steps[:, k]) / factor[k, k]
            w[:, k:stop] -= error[:, None] * factor[k, k:stop]
            errors[:, k - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return q[:, order.argsort()].to(torch.int8)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of `hessian`, which is damped until it has one.

    An input that is always 0 gives a row of zeros, which the damping makes independent of the others.
    """
    damping = max(float(DAMPING * hessian.diagonal().mean()), torch.finfo(torch.float32).tiny)
    damped = hessian.double()
    while True:
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10
