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
from .stock import VllmChoice

CANDIDATES: dict[str, tuple[type[Kernel], ...]] = {
    "cpu": (VllmChoice, OneDnnTensor, Compiled, Float32Integers),
    "cuda": (VllmChoice, CutlassTensor, Triton),
}


def explain_kernels(request: Request) -> list[tuple[str, str | None]]:
    """(name, reason) of every candidate of the request's platform in order; the reason is None if it can serve."""
    return [(kernel.name, kernel.rejects(request)) for kernel in CANDIDATES.get(request.platform, ())]


def select_kernel(request: Request) -> Kernel:
    """The first candidate that can serve; a SmoothQuantError with every reason if none can."""
    reasons = explain_kernels(request)
    for (name, reason), kernel in zip(reasons, CANDIDATES.get(request.platform, ()), strict=True):
        if reason is None:
            logger.debug("%s: %s", request.layer, name)
            if kernel is Float32Integers:
                _warn_slow("; ".join(f"{name}: {reason}" for name, reason in reasons if reason))
            return kernel(request)
        logger.debug("%s: not %s: %s", request.layer, name, reason)
    raise SmoothQuantError(
        request.layer,
        f"a kernel for {request.scheme.input_activations}",
        "; ".join(f"{name}: {reason}" for name, reason in reasons) or f"no kernels for platform {request.platform!r}",
        "serve on a CPU or an NVIDIA GPU, or calibrate with other --activations",
    )


@functools.cache
def _warn_slow(reasons: str) -> None:
    logger.warning("float32 computes the INT8 products, exactly but no faster than floating point: %s", reasons)
