"""Kernels for 4-bit weights: vLLM's own, and ours for x86 CPUs."""

from typing import Any

import torch

from ..format import int4
from ..format.errors import SmoothQuantError
from . import build
from .base import Kernel, Request, frozen, no_rows
from .ops import int4_linear

# A chunk of inputs, whose weights share 32 bytes (int4_tile.h).
CHUNK = 64
# A word of 4-bit weights that are all 0.
_ZEROS = int(int4.pack(torch.zeros(1, int4.IN_WORD, dtype=torch.int8)))
# Of a negative scale to the largest: 4096 times it must fit into 16 bits.
_MAX_RATIO = 7


class MixedPrecision(Kernel):
    """vLLM's own kernels through its own chooser. 8-bit activations: Marlin on CUDA, which rounds them per token."""

    name = "vllm-mixed-precision"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.platform == "cpu":
            if request.scheme.input_activations.rounded:
                return "vLLM rounds activations beside 4-bit weights on AMX only, in its own way"
            if request.dtype not in (torch.bfloat16, torch.float16):
                return f"vLLM's kernels for 4 bits compute in bfloat16 and float16, not {request.dtype}"
        try:
            chosen = _chosen(request)
        except ValueError as error:
            return " ".join(str(error).split())
        # vLLM 0.32 to 0.33 choose it on CPUs for which they are built without its operator (vLLM issue 55613).
        if chosen.__name__ == "CPUWNA16LinearKernel" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return "this vLLM is built without its operator for 4 bits, cpu_gemm_wna16"
        return None

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.kernel = _chosen(request)(
            _config(request), w_q_param_name="weight_packed", w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
        )  # fmt: skip
        self.out_features = request.out_features

    def prepare(self, layer: Any) -> None:
        layer.weight_zero_point = None
        if self.activations.rounded:
            bound_scales(layer.weight_packed.data, layer.weight_scale.data)
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if no_rows(x):
            return x.new_empty(0, self.out_features)
        y: torch.Tensor = self.kernel.apply_weights(layer, x.to(self.dtype), bias)
        return y.to(x.dtype)


def _config(request: Request) -> Any:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    shape = (request.in_features, request.out_features)
    rounded = request.scheme.input_activations.rounded
    return MPLinearLayerConfig(
        full_weight_shape=(request.full_in_features or request.in_features, request.out_features),
        partition_weight_shape=shape,
        weight_type=scalar_types.uint4b8,
        act_type=torch.int8 if rounded else request.dtype,
        group_size=request.scheme.weights.group_size,
        zero_points=False,
        out_type=request.dtype,
    )


def _chosen(request: Request) -> Any:
    """vLLM's class. Errors (ValueError): it has none, for the reasons that the text gives."""
    from vllm.model_executor.kernels.linear import MarlinLinearKernel, choose_mp_linear_kernel

    config = _config(request)
    if not request.scheme.input_activations.rounded:
        return choose_mp_linear_kernel(config)
    possible, reason = MarlinLinearKernel.can_implement(config)
    if request.capability is not None and request.capability < MarlinLinearKernel.get_min_capability():
        possible, reason = False, f"needs compute capability {MarlinLinearKernel.get_min_capability()}"
    if not possible:
        raise ValueError(f"Marlin: {reason}")
    return MarlinLinearKernel


def bound_scales(packed: torch.Tensor, scale: torch.Tensor) -> None:
    """Prepare `scale` [out, groups], in place, for Marlin beside 8-bit activations.

    Marlin stores scale / max(scale) * 4096 in 16 bits. A group of zeros, whose scale says nothing, gets the scale 0, so
    that it is not the largest. Errors (SmoothQuantError): a negative scale that does not fit into 16 bits.
    """
    zeros = (packed.unflatten(1, (scale.shape[1], -1)) == _ZEROS).all(-1)
    scale.masked_fill_(zeros, 0)
    if scale.any() and float(scale.min()) < -_MAX_RATIO * float(scale.max()):
        expected = f"no negative scale above {_MAX_RATIO} times the largest positive one on a rank, which Marlin needs"
        got = f"{float(scale.min()):.3g} beside {float(scale.max()):.3g}"
        raise SmoothQuantError("weight_scale", expected, got, "serve on fewer ranks, or with 16-bit activations")


class Int4(Kernel):
    """Our own product (int4_linear.cpp): activations of 8 bits with exact sums inside a group, or of 16 in float32."""

    name = "int4"

    @staticmethod
    def rejects(request: Request) -> str | None:
        return build.why_not()

    def prepare(self, layer: Any) -> None:
        packed, scale = layer.weight_packed.data, layer.weight_scale.data
        layer.weight_packed, layer.weight_scale = map(frozen, for_product(packed, scale))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int4_linear(x, layer.weight_packed, layer.weight_scale, bias, self.activations.rounded)


def for_product(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, scales) as int4_linear takes them, of int32 [out, in / 8] and scales [out, groups]."""
    group_size = packed.shape[1] * int4.IN_WORD // scale.shape[1]
    # In parts of 256 rows: unpacking at once would take four times the memory of the matrix.
    weights = torch.cat([_chunks(int4.unpack(rows)) for rows in packed.split(256)])
    padding = 2 * weights.shape[1] // group_size - scale.shape[1]
    return weights, torch.nn.functional.pad(scale.float(), (0, padding), value=1.0).contiguous()


def _chunks(integers: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2] of int8 `integers` [out, in], in the order of int4_tile.h; `in` is padded to whole chunks."""
    unsigned = torch.nn.functional.pad((integers - int4.QMIN).to(torch.uint8), (0, -integers.shape[1] % CHUNK))
    low, high = unsigned.unflatten(1, (-1, 2, CHUNK // 2)).unbind(2)
    return (low | high << 4).flatten(1)
