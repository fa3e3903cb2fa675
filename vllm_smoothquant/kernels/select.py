"""The candidates of each platform in order, and the reasons why a candidate was not selected.

To add a kernel: write a `Kernel` (base.py) in a file of its own and add it to CANDIDATES. Nothing else refers to it.

Sources: vllm/model_executor/kernels/linear/scaled_mm/{cpu,cutlass,triton}.py of vLLM 0.26 to 0.33. The script
packaging/check_vllm.py compares them with what the kernels use. docs/cuda.md gives the reasons for the CUDA order.
"""

import functools

from ..format.errors import SmoothQuantError
from .base import Kernel, Request, logger
from .cpu import Compiled, Float32Integers, OneDnnTensor
from .cuda import CutlassTensor, Triton
from .four_bits import Int4, MixedPrecision
from .stock import VllmChoice

# (platform, bits of a weight) -> kernels
CANDIDATES: dict[tuple[str, int], tuple[type[Kernel], ...]] = {
    ("cpu", 8): (VllmChoice, OneDnnTensor, Compiled, Float32Integers),
    ("cpu", 4): (MixedPrecision, Int4),
    ("cuda", 8): (VllmChoice, CutlassTensor, Triton),
    ("cuda", 4): (MixedPrecision,),
}


def explain_kernels(request: Request) -> list[tuple[str, str | None]]:
    """(name, reason) of every candidate of the request's platform in order; the reason is None if it can serve."""
    candidates = CANDIDATES.get((request.platform, request.bits), ())
    return [(kernel.name, kernel.rejects(request)) for kernel in candidates]


def select_kernel(request: Request) -> Kernel:
    """The first candidate that can serve; a SmoothQuantError with every reason if none can."""
    reasons = explain_kernels(request)
    for (name, reason), kernel in zip(reasons, CANDIDATES.get((request.platform, request.bits), ()), strict=True):
        if reason is None:
            logger.debug("%s: %s", request.layer, name)
            if kernel is Float32Integers:
                _warn_slow("; ".join(f"{name}: {reason}" for name, reason in reasons if reason))
            return kernel(request)
        logger.debug("%s: not %s: %s", request.layer, name, reason)
    raise SmoothQuantError(
        request.layer,
        f"a kernel for {request.scheme}",
        "; ".join(f"{name}: {reason}" for name, reason in reasons) or f"no kernels for platform {request.platform!r}",
        "serve on a CPU or an NVIDIA GPU, or calibrate with other --activations",
    )


@functools.cache
def _warn_slow(reasons: str) -> None:
    logger.warning("float32 computes the INT8 products, exactly but no faster than floating point: %s", reasons)
