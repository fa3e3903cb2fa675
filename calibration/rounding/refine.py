"""Better scales for 4-bit weights whose integers GPTQ has chosen.

    minimise |(W - q scale) X|^2 over the scales of the groups of a row      H = X X^T over the calibration tokens
    A scale = b        A_gh = q_g^T H_gh q_h        b_g = q_g^T (H w)_g        g, h: groups of inputs

GPTQ moves weights after the scales were chosen, and the errors of groups depend on each other through H: the scales
that were best for each group before are not the best of a row after.

Source: Kim et al., Two-Stage Grid Optimization (arXiv 2602.02126), its second stage, there by coordinate descent.
"""

import torch

# Of b's and A's diagonal: how strongly the solution is held at the scales before, where the tokens do not determine it.
HOLD = 1e-3
# Elements of A that are in memory at once.
MAX_ELEMENTS = 2**25


def refine_scale(
    weight: torch.Tensor, hessian: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """float32 [out, groups], values of bfloat16: scales of `integers` with a smaller error of the output than `scale`.

    weight [out, in]; hessian [in, in]; integers [out, in]; scale [out, groups], kept for the rows that do not gain.
    """
    rows = max(1, MAX_ELEMENTS // scale.shape[1] ** 2)
    parts = zip(weight.split(rows), integers.split(rows), scale.split(rows), strict=True)
    return torch.cat([_refine(w.float(), hessian, q.float(), s) for w, q, s in parts])


def _refine(weight: torch.Tensor, hessian: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    groups = scale.shape[1]

    def sums(values: torch.Tensor) -> torch.Tensor:
        return (values * q).unflatten(1, (groups, -1)).sum(-1)

    parts = zip(q.chunk(groups, 1), hessian.chunk(groups), strict=True)
    a = torch.stack([sums(part @ rows) for part, rows in parts], dim=1).double()
    before, b = scale.double(), sums(weight @ hessian).double()
    hold = HOLD * a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    held = a + torch.diag_embed(hold.expand_as(b))
    after = torch.linalg.solve(held, b + hold * before).to(torch.bfloat16).double()

    def loss(s: torch.Tensor) -> torch.Tensor:
        """The error of each row, less a constant."""
        return ((a @ s[..., None])[..., 0] * s - 2 * b * s).sum(1)

    ratio = after / before
    gains = (loss(after) < loss(before)) & ((ratio > 0.5) & (ratio < 2)).all(1)
    return torch.where(gains[:, None], after, before).float()
