"""The interface of a kernel: the request of a layer, and the class that serves it.

    y = (q_x @ q_w^T) * s_x * s_w^T + bias          an integer product, scaled once at the end

Shapes and dtypes: x [tokens, in] in the model's dtype; q_w int8 [out, in]; s_w float32 [out, 1] or [1]; s_x float32
[tokens, 1] (per_token) or [1] (per_tensor). Real = int * scale.

`prepare` gets the layer after loading: `weight` int8 [out, in], `weight_scale` as above, `input_scale` [1] or None;
with 4 bits, `weight_packed` int32 [out, in / 8] and `weight_scale` [out, groups] in the model's dtype. It may
change the layout of the weight, but it never keeps two copies. `apply` computes y for a two-dimensional x.
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..format.config import Scheme

T = TypeVar("T")

logger = logging.getLogger("vllm.smoothquant")  # a child of "vllm", so that VLLM_LOGGING_LEVEL and its handler apply


@dataclass(frozen=True)
class Request:
    """What a layer needs from a kernel.

    channelwise: s_w is [out, 1]. capability: 90 for compute capability 9.0; None if the platform is not CUDA.
    out_features, in_features: of the weight of this rank. The default is a size that every kernel takes.
    full_in_features: of all ranks; 0 if there is one rank.
    """

    layer: str
    scheme: Scheme
    channelwise: bool
    dtype: torch.dtype
    platform: str
    capability: int | None = None
    out_features: int = 4096
    in_features: int = 4096
    full_in_features: int = 0

    @property
    def dynamic(self) -> bool:
        return self.scheme.input_activations.dynamic

    @property
    def per_token(self) -> bool:
        return self.scheme.input_activations.strategy == "token"

    @property
    def bits(self) -> int:
        return self.scheme.weights.num_bits

    @property
    def aligned(self) -> bool:
        return self.out_features % 16 == 0 and self.in_features % 16 == 0


def request_here(
    layer: str, scheme: Scheme, channelwise: bool, dtype: torch.dtype, out_features: int, in_features: int,
    full_in_features: int = 0,
) -> Request:  # fmt: skip
    """The request of `layer` on the platform that vLLM runs on; the weight of this rank is [out, in]."""
    from vllm.platforms import current_platform

    platform = "cuda" if current_platform.is_cuda() else "cpu" if current_platform.is_cpu() else "other"
    capability = current_platform.get_device_capability() if platform == "cuda" else None
    number = capability.to_int() if capability else None
    return Request(layer, scheme, channelwise, dtype, platform, number, out_features, in_features, full_in_features)


def measured(function: Callable[..., T]) -> "functools._lru_cache_wrapper[T]":
    """Call `function` once for each of its arguments, on the CPU.

    vLLM builds layers with a default device, and those that it skips with "meta", on which nothing can be measured.
    """

    @functools.wraps(function)
    def on_cpu(*arguments: Any) -> T:
        with torch.device("cpu"):
            return function(*arguments)

    return functools.cache(on_cpu)


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def packed_elsewhere(weight: torch.Tensor) -> torch.nn.Parameter:
    """int8 [0, in] on the device of `weight` [out, in], to stand for it once a kernel has packed a copy.

    Not None, because vLLM reads `weight.device` and `weight.dtype` of a layer, for LoRA and for MLA.
    """
    return frozen(weight.new_empty(0, weight.shape[1]))


def no_rows(x: torch.Tensor) -> bool:
    """Whether x is known to have no rows. A graph for any number of rows is traced as if it had some, without a guard.

    vLLM's CUDA operators start one block for each row, and CUDA refuses to start none.
    """
    return statically_known_true(x.shape[0] == 0)


class Kernel(ABC):
    """One way to compute y. `name` identifies it in explain_kernels and in the debug log.

    smooths: `apply` divides x by the layer's smoothing_factor itself; otherwise linear.py divides before the call.
    """

    name: ClassVar[str]
    smooths = False

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
        """Compute y [tokens, out] in x's dtype from x [tokens, in] and bias [out] or None.

        tokens may be 0. x has the dtype of the request, or another one: vLLM reads the weights of a layer (MLA) as its
        product with an identity of float32.
        """
