"""The interface of a kernel: the request of a layer, and the class that serves it.

    y = (q_x @ q_w^T) * s_x * s_w^T + bias          an integer product, scaled once at the end

Shapes and dtypes: x [tokens, in] in the model's dtype; q_w int8 [out, in]; s_w float32 [out, 1] or [1]; s_x float32
[tokens, 1] (per_token) or [1] (per_tensor). Real = int * scale.

`prepare` gets the layer after loading: `weight` int8 [out, in], `weight_scale` as above, `input_scale` [1] or None. It
may change the layout of the weight, but it never keeps two copies. `apply` computes y for a two-dimensional x.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..format.config import Scheme

logger = logging.getLogger("vllm.smoothquant")  # a child of "vllm", so that VLLM_LOGGING_LEVEL and its handler apply


@dataclass(frozen=True)
class Request:
    """What a layer needs from a kernel.

    channelwise: s_w is [out, 1]. capability: 90 for compute capability 9.0; None if the platform is not CUDA.
    aligned: in and out of this rank are multiples of 16.
    """

    layer: str
    scheme: Scheme
    channelwise: bool
    dtype: torch.dtype
    platform: str
    capability: int | None = None
    aligned: bool = True

    @property
    def dynamic(self) -> bool:
        return self.scheme.input_activations.dynamic

    @property
    def per_token(self) -> bool:
        return self.scheme.input_activations.strategy == "token"


def request_here(
    layer: str, scheme: Scheme, channelwise: bool, dtype: torch.dtype, out_features: int, in_features: int
) -> Request:
    """The request of `layer` on the platform that vLLM runs on; the weight of this rank is [out, in]."""
    from vllm.platforms import current_platform

    platform = "cuda" if current_platform.is_cuda() else "cpu" if current_platform.is_cpu() else "other"
    capability = current_platform.get_device_capability() if platform == "cuda" else None
    aligned = out_features % 16 == 0 and in_features % 16 == 0
    return Request(layer, scheme, channelwise, dtype, platform, capability.to_int() if capability else None, aligned)


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class Kernel(ABC):
    """One way to compute y. `name` identifies it in explain_kernels and in the debug log.

    smooths: `apply` divides x by the layer's smoothing_factor itself; otherwise linear.py divides before the call.
    only_if_faster: select.py takes this kernel only if it measures it faster than the next candidate.
    """

    name: ClassVar[str]
    smooths = False
    only_if_faster = False

    @staticmethod
    @abstractmethod
    def rejects(request: Request) -> str | None:
        """The reason why this kernel cannot serve `request`; None if it can."""

    def __init__(self, request: Request) -> None:
        self.activations = request.scheme.input_activations
        self.dtype = request.dtype

    @abstractmethod
    def prepare(self, layer: Any) -> None:
        """Take the loaded tensors of `layer`."""

    @abstractmethod
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute y [tokens, out] in x's dtype from x [tokens, in] and bias [out] or None."""
