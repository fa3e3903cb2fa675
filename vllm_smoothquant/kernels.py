"""Which code multiplies: the candidates of each platform, in order, and why one was passed over.

    y = (q_x @ q_w^T) * s_x * s_w^T + bias                  integers in the middle, one scaling at the end

x [tokens, in] in the model's dtype; q_w int8 [out, in]; s_w float32 [out, 1] or [1]; s_x float32 [tokens, 1]
(per_token) or [1] (per_tensor). Real = int * scale.

A kernel gets the layer after loading (`prepare`: `weight` int8 [out, in], `weight_scale` as above, `input_scale` [1] or
None), may lay the weight out anew but never keeps two copies of it, and computes y for two-dimensional x (`apply`).

Sources: vllm/model_executor/kernels/linear/scaled_mm/{cpu,cutlass,triton}.py, 0.26 to 0.33, which
packaging/check_vllm.py compares with what is used here. What was chosen for CUDA and why: docs/cuda.md.
"""

import dataclasses
import functools
import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from . import compiled, int8, race
from .checkpoint import InputActivations, Scheme, SmoothQuantError
from .ops import int8_linear, onednn_tensor_int8, quantize_per_token, real_rows, triton_int8_mm

logger = logging.getLogger("vllm.smoothquant")  # under "vllm", so that VLLM_LOGGING_LEVEL and its handler apply


@dataclasses.dataclass(frozen=True)
class Request:
    """What a layer asks for. channelwise: s_w is [out, 1]. capability: 90 for compute capability 9.0; None off CUDA.

    aligned: whether in and out of this rank are multiples of 16.
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
    """The request of `layer` on the platform vLLM runs on; [out, in] is the weight of this rank."""
    from vllm.platforms import current_platform

    platform = "cuda" if current_platform.is_cuda() else "cpu" if current_platform.is_cpu() else "other"
    capability = current_platform.get_device_capability() if platform == "cuda" else None
    aligned = out_features % 16 == 0 and in_features % 16 == 0
    return Request(layer, scheme, channelwise, dtype, platform, capability.to_int() if capability else None, aligned)


class Kernel(ABC):
    """One way to compute y. `name` is what explain_kernels and the debug log call it.

    smooths: whether `apply` divides x by the layer's smoothing_factor itself; else linear.py does it before.
    """

    name: ClassVar[str]
    smooths = False

    @staticmethod
    @abstractmethod
    def rejects(request: Request) -> str | None:
        """Why this kernel cannot serve `request`; None where it can."""

    @abstractmethod
    def __init__(self, request: Request) -> None: ...

    @abstractmethod
    def prepare(self, layer: Any) -> None:
        """Take over the loaded tensors of `layer`."""

    @abstractmethod
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, in] to y [tokens, out] in x's dtype; bias [out] or None."""


class VllmChoice(Kernel):
    """vLLM's own INT8 kernels through its own chooser: per_token everywhere, static per_tensor on CUDA.

    Where it chooses CUTLASS, x is quantised by quantize_on_cuda and only the multiplication is vLLM's.
    """

    name = "vllm"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.dynamic and not request.per_token:
            return "vLLM has no kernel for dynamic per_tensor activations"
        if request.platform == "cpu" and not request.dynamic:
            return "vLLM's AMX kernel never reads input_scale: static would silently become dynamic"
        if request.platform == "cpu" and not onednn_is_exact():
            return INEXACT
        return no_cutlass(request) if request.platform == "cuda" else None

    def __init__(self, request: Request) -> None:
        from vllm import _custom_ops as vllm_ops
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel

        self.kernel = init_int8_linear_kernel(
            is_channelwise=request.channelwise,
            is_static_input_scheme=not request.dynamic,
            input_symmetric=True,
            module_name=request.layer,
        )
        self.activations = request.scheme.input_activations
        # By name: Triton's class is a subclass of this one. --linear-backend may choose that or another.
        self.smooths = type(self.kernel).__name__ == "CutlassInt8ScaledMMLinearKernel"
        self.multiply = vllm_ops.cutlass_scaled_mm if self.smooths else None

    def prepare(self, layer: Any) -> None:
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.multiply is None:
            return self.kernel.apply_weights(layer, x, bias)
        integers, scale = quantize_on_cuda(layer, x, self.activations)
        return self.multiply(integers, layer.weight, scale, layer.weight_scale, x.dtype, bias)


class CutlassTensor(Kernel):
    """Dynamic per_tensor on CUDA: absmax of the batch, quantise, CUTLASS; nothing waits for the host.

    One absmax couples all requests of a batch: that is what the scheme means, and why per_token is the default.
    """

    name = "cutlass-tensor"
    smooths = True

    @staticmethod
    def rejects(request: Request) -> str | None:
        if not request.dynamic or request.per_token:
            return "only dynamic per_tensor activations"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"writes float16 or bfloat16, not {request.dtype}"
        return no_cutlass(request)

    def __init__(self, request: Request) -> None:
        from vllm import _custom_ops as vllm_ops

        _refuse_context_parallel(request)
        self.activations = request.scheme.input_activations
        self.multiply = vllm_ops.cutlass_scaled_mm

    def prepare(self, layer: Any) -> None:
        # [in, out], column-major, as both GEMMs want it: a view of the same storage.
        layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(layer.weight_scale.data, requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        integers, scale = quantize_on_cuda(layer, x, self.activations)
        return self.multiply(integers, layer.weight, scale, layer.weight_scale, x.dtype, bias)


class Triton(CutlassTensor):
    """vLLM's Triton GEMM, for all schemes: compute capability 10.0 and above, or sizes CUTLASS does not take."""

    name = "triton"

    @staticmethod
    def rejects(request: Request) -> str | None:
        return None

    def __init__(self, request: Request) -> None:
        if request.dynamic and not request.per_token:
            _refuse_context_parallel(request)
        self.activations = request.scheme.input_activations
        self.multiply = triton_int8_mm


def no_cutlass(request: Request) -> str | None:
    """Why vLLM's CUTLASS INT8 GEMM cannot serve `request`; its `is_supported` says yes to all of these."""
    if (request.capability or 0) >= 100:
        return "CUTLASS's INT8 kernels stop below compute capability 10.0"
    if not request.aligned:
        return "CUTLASS wants in and out to be multiples of 16"
    return None


def _refuse_context_parallel(request: Request) -> None:
    """Ranks that share a sequence see slots for their own tokens only: real_rows would take the rest for padding."""
    from vllm.config import get_current_vllm_config

    parallel = get_current_vllm_config().parallel_config
    ranks = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    if ranks > 1:
        raise SmoothQuantError(
            request.layer,
            expected="1 rank of context parallelism with dynamic per_tensor activations",
            got=str(ranks),
            do="serve without context parallelism, or calibrate with a scale per token",
        )


def quantize_on_cuda(layer: Any, x: torch.Tensor, activations: InputActivations) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, in] / smoothing_factor, rounded: int8 [tokens, in] and its float32 scale, [tokens, 1] or one element.

    Compiled, it is plain torch: Inductor makes it part of the norm or the activation function before it, where an
    operator would be a kernel of its own that reads and writes x once more. Eager, it is the fewest kernels there are.
    """
    from vllm import _custom_ops as vllm_ops

    compiling = torch.compiler.is_compiling()
    inverse = getattr(layer, "inverse_smoothing_factor", None)
    per_token = activations.strategy == "token"
    if per_token and not compiling and inverse is not None:
        return quantize_per_token(x, inverse)
    if inverse is not None:
        x = x * inverse  # float32: rounded once, below
    scale = None
    if not activations.dynamic:
        scale = layer.input_scale
    elif not per_token:
        # Padding rows of a CUDA graph hold whatever was there; NaN in a real row must reach the scale.
        rows = torch.where(real_rows(layer.weight_scale, x.shape[0]), x.abs().amax(dim=1), 0)
        scale = int8.absmax_scale(rows.amax().reshape(1))
    elif compiling:
        scale = int8.input_scale(x, "token")
    if compiling:
        assert scale is not None
        return int8.quantize(x, scale), scale
    integers, scale, _ = vllm_ops.scaled_int8_quant(x.contiguous(), scale)
    return integers, scale


class OneDnnTensor(Kernel):
    """per_tensor activations on CPU, static or dynamic, through vLLM's oneDNN operators (ops.onednn_tensor_int8)."""

    name = "onednn-tensor"

    @staticmethod
    def rejects(request: Request) -> str | None:
        if request.per_token:
            return "only per_tensor activations"
        return None if onednn_is_exact() else INEXACT

    def __init__(self, request: Request) -> None:
        self.dtype = request.dtype

    def prepare(self, layer: Any) -> None:
        from vllm import _custom_ops as vllm_ops

        # The handler keeps the address of the scales, not a reference: they must stay where they are.
        self.weight_scale = layer.weight_scale.data.contiguous()
        layer.weight_scale = torch.nn.Parameter(self.weight_scale, requires_grad=False)
        self.out_features = layer.weight.shape[0]
        self.handler = vllm_ops.create_onednn_scaled_mm(
            layer.weight.data.t(),
            self.weight_scale,
            self.dtype,
            False,  # not per_token: it reads one input scale at every call, so that one may be a measured one
            False,  # no zero points
            32,
        )
        # The handler has packed a copy; release ours.
        layer.weight = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return onednn_tensor_int8(x, self.handler.handler_tensor, self.out_features, layer.input_scale, bias)


class Compiled(Kernel):
    """Our own product, exact in integers, compiled where it runs (compiled.py); `name` is the instructions it uses."""

    @classmethod
    def rejects(cls, request: Request) -> str | None:
        if compiled.target() != cls.name:
            return f"this CPU is one for {compiled.target() or 'none of ours'}"
        found = compiled.int8_linear()
        if isinstance(found, str):
            return found
        return None if compiled_is_exact() else f"wrong sums on this CPU: please report this, {compiled.SOURCE.name}"

    def __init__(self, request: Request) -> None:
        self.per_token = request.per_token

    def prepare(self, layer: Any) -> None:
        assert layer.weight.shape[1] <= compiled.MOST, layer.weight.shape
        layer.weight = torch.nn.Parameter(layer.weight.data.contiguous(), requires_grad=False)
        scale = layer.weight_scale.data.reshape(-1).expand(layer.weight.shape[0]).contiguous()
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        # Row by row, as it were: torch would make an int32 copy of the whole matrix first.
        sums = [rows.sum(1, dtype=torch.int32) for rows in layer.weight.data.split(256)]
        layer.weight_sum = torch.nn.Parameter(torch.cat(sums), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear(
            x, layer.weight, layer.weight_scale, layer.weight_sum, layer.input_scale, bias, self.per_token
        )


class Vnni(Compiled):
    """Where vLLM has no AMX to multiply with, and where this proves faster than what comes after it."""

    name = "vnni"

    @classmethod
    def rejects(cls, request: Request) -> str | None:
        if torch.cpu._is_amx_tile_supported():
            return "vLLM multiplies with AMX here"
        reason = super().rejects(request)
        if reason is not None:
            return reason
        later = CANDIDATES["cpu"][CANDIDATES["cpu"].index(cls) + 1 :]
        rival = next(kernel for kernel in later if kernel.rejects(request) is None)
        return race.lost(cls, rival, request)


class Avx2(Compiled):
    """Where oneDNN's sums are wrong (see `onednn_is_exact`)."""

    name = "avx2"


class Float32Integers(Kernel):
    """The same integers in float32: where oneDNN's INT8 GEMM is wrong and ours cannot be compiled.

    float32 holds every sum below 2**24 exactly (in <= 1040 at full range) and rounds longer ones by 6e-8. Weights stay
    int8 and are widened layer by layer as they are used: the memory is saved, the time is not, the result is right.
    """

    name = "float32-integers"

    @staticmethod
    def rejects(request: Request) -> str | None:
        return None

    def __init__(self, request: Request) -> None:
        self.strategy = request.scheme.input_activations.strategy
        _warn_slow()

    def prepare(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(layer.weight_scale.data.reshape(1, -1), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from .ops import widened_linear

        # Plain torch around it: Inductor fuses that with what comes before and after.
        scale = layer.input_scale if layer.input_scale is not None else int8.input_scale(x, self.strategy)
        integers = torch.round(x.to(torch.float32) / scale).clamp(int8.QMIN, int8.QMAX)
        y = widened_linear(integers, layer.weight) * scale * layer.weight_scale
        return (y if bias is None else y + bias).to(x.dtype)


INEXACT = "oneDNN's INT8 GEMM saturates on this CPU (no VNNI) and would silently give wrong sums"


@functools.cache
def onednn_is_exact() -> bool:
    """Whether vLLM's oneDNN INT8 GEMM adds up correctly on this CPU: measured, once.

    Without VNNI, x86 adds pairs of products in 16 bits and clips them: any |weight| above 64 may be lost, without a
    word from oneDNN or vLLM. The extremes of both operands, once for a single token and once for several, show it.
    """
    from vllm import _custom_ops as vllm_ops

    n = k = 64
    # dtypes and device said: vLLM's defaults are the model's while it builds layers.
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for tokens in (1, 16):
        weight = torch.full((n, k), -127, dtype=torch.int8, device="cpu")
        weight[::2] = 127
        handler = vllm_ops.create_onednn_scaled_mm(weight.t(), one, torch.float32, False, False, 1)
        x = torch.full((tokens, k), 127, dtype=torch.int8, device="cpu")
        out = torch.empty(tokens, n, dtype=torch.float32, device="cpu")
        torch.ops._C.onednn_scaled_mm(out, x, one, None, None, None, handler.handler_tensor)
        if not torch.equal(out.double(), x.double() @ weight.double().t()):
            return False
    return True


@functools.cache
def compiled_is_exact() -> bool:
    """Whether Compiled adds up correctly on this CPU: measured, once, on extremes and on the remainders of tiles."""
    tokens, out_features, in_features = 7, 7, 100
    number = torch.arange(out_features, device="cpu").reshape(-1, 1)
    weight = torch.where(number % 2 == 0, -128, 127 - number).expand(-1, in_features).to(torch.int8).contiguous()
    x = torch.where(torch.arange(tokens, device="cpu").reshape(-1, 1) % 2 == 0, -128.0, 127.0).expand(-1, in_features)
    one = torch.ones(out_features, dtype=torch.float32, device="cpu")
    y = int8_linear(x.to(torch.float32), weight, one, weight.sum(1, dtype=torch.int32), one[:1], None, False)
    return torch.equal(y.double(), x.double() @ weight.double().t())


@functools.cache
def _warn_slow() -> None:
    logger.warning(
        "%s, and ours is not at hand (%s); computing the same integers in float32: correct, but not faster than "
        "floating point",
        INEXACT,
        compiled.int8_linear(),
    )


CANDIDATES: dict[str, tuple[type[Kernel], ...]] = {
    "cpu": (Vnni, VllmChoice, OneDnnTensor, Avx2, Float32Integers),
    "cuda": (VllmChoice, CutlassTensor, Triton),
}


def explain_kernels(request: Request) -> list[tuple[str, str | None]]:
    """Every candidate of the request's platform in order, with the reason it is passed over or None where it serves."""
    return [(kernel.name, kernel.rejects(request)) for kernel in CANDIDATES.get(request.platform, ())]


def select_kernel(request: Request) -> Kernel:
    """The first candidate that serves; SmoothQuantError with every reason where none does."""
    reasons = explain_kernels(request)
    for (name, reason), kernel in zip(reasons, CANDIDATES.get(request.platform, ()), strict=True):
        if reason is None:
            logger.debug("%s: %s", request.layer, name)
            return kernel(request)
        logger.debug("%s: not %s: %s", request.layer, name, reason)
    raise SmoothQuantError(
        request.layer,
        expected=f"a kernel for {request.scheme.input_activations}",
        got="; ".join(f"{name}: {reason}" for name, reason in reasons)
        or f"no kernels for platform {request.platform!r}",
        do="serve on a CPU or an NVIDIA GPU, or calibrate with other --activations",
    )
