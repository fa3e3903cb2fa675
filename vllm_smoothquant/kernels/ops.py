"""Custom operators: code that torch.compile must not trace, with the shapes and dtypes that it needs to know.

    smoothquant::onednn_tensor_int8     y = (q_x @ q_w^T) * s_x * s_w^T + bias        s_x one number for all tokens
    smoothquant::int8_linear            y = (q_x @ q_w^T) * s_x * s_w^T + bias        q_w int8 [out, in], s_w [out]
    smoothquant::int4_linear            y = q(x) @ (q_w * s_w)^T + bias, or x for q(x)        see int4_linear.cpp
    smoothquant::int8_experts           the routed experts of a block, see int8_experts.cpp
    smoothquant::int4_experts           the same with 4-bit weights, by int4_linear for one expert after the other
    smoothquant::widened_linear         y = x @ q_w^T        x float32 integers, q_w int8 [out, in], y float32
    smoothquant::quantize_per_token     x * r -> q_x int8 [tokens, in], s_x [tokens, 1]        r float32 [in]
    smoothquant::triton_int8_mm         y = (q_x @ q_w) * s_x * s_w^T + bias        q_w int8 [in, out], s_w [out, 1]
    smoothquant::real_rows              bool [tokens]: True for tokens, False for the padding of a CUDA graph

x [tokens, in] float32/bfloat16/float16; scales float32; weight_sum int32 [out], the sum of each row of q_w. In
onednn_tensor_int8, q_w and s_w are inside vLLM's oneDNN handler. In it and in int8_linear, s_x is [1], or None to
measure it: s_x = absmax(x) / 127. Real = int * scale. Every operator has a fake implementation and mutates nothing, so
`torch.library.opcheck` passes (tests/test_ops.py, tests/test_cuda.py).

Importing this module registers the operators, once. The first three products of ours are only declared here, because
they are C++ (operators.cpp) that build.why_not() compiles and registers: a call of them runs no Python.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..format.errors import SmoothQuantError
from ..format.int8 import absmax_scale

NAMESPACE = "smoothquant"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _custom_op(dispatch_key: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operator, and replace it by that operator. fake: empty tensors of the result's shape.

    Not torch.library.custom_op, because its Python wrapper costs about 10 us per call, more than a small layer's GEMM.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, dispatch_key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(torch.ops.smoothquant, name).default

    return register


def _compiled_op(fake: Callable[..., Any]) -> Any:
    """Define an operator that operators.cpp implements; build.why_not() loads it."""
    name = fake.__name__
    _library.define(name + torch.library.infer_schema(fake, mutates_args=()))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.smoothquant, name).default


def dynamic_tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """float32 [1]: the per-tensor scale of x (any shape), on x's device, without waiting for the device.

    Equal to int8.input_scale, but it reads x once: `x.abs().amax()` would first write a copy and read it again.
    """
    low, high = torch.aminmax(x)
    return absmax_scale(torch.maximum(-low, high).reshape(1))


@_custom_op("CPU", lambda x, handler, out_features, *_: x.new_empty(x.shape[0], out_features))
def onednn_tensor_int8(
    x: torch.Tensor,
    handler: torch.Tensor,
    out_features: int,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """handler: int64 [1], the address of a static per-tensor W8A8 oneDNN handler, which its owner keeps alive."""
    out = x.new_empty(x.shape[0], out_features)
    if not x.shape[0]:
        return out
    scale = dynamic_tensor_scale(x) if input_scale is None else input_scale
    x = x.contiguous()
    quantized = torch.empty_like(x, dtype=torch.int8)
    # By position, because the CPU and the CUDA builds name the first argument differently.
    torch.ops._C.static_scaled_int8_quant(quantized, x, scale, None)
    torch.ops._C.onednn_scaled_mm(out, quantized, scale, None, None, bias, handler)
    return out


@_compiled_op
def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_token: bool,
) -> torch.Tensor:
    """per_token: a measured scale is one per token; otherwise it is one for all tokens."""
    return x.new_empty(x.shape[0], weight.shape[0])


@_compiled_op
def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, integers: bool
) -> torch.Tensor:
    """weight: uint8 [out, in / 2], as Int4 packs it; weight_scale: float32 [out, groups]; both with padded inputs.

    integers: x is rounded with a scale for each token; otherwise it is multiplied in float32.
    """
    return x.new_empty(x.shape[0], weight.shape[0])


@_compiled_op
def int8_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    gate_up_sum: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    down_sum: torch.Tensor,
    down_bias: torch.Tensor | None,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    activation: int,
) -> torch.Tensor:
    """chosen: int32 [tokens, choices], the experts of each token, negative for those of another rank.

    weights: float32 [tokens, choices]. activation: its place in experts.ACTIVATIONS. Biases are float32.
    """
    return torch.empty_like(x)


# By their places in experts.ACTIVATIONS.
_GATES = (nn.functional.silu, nn.functional.gelu, functools.partial(nn.functional.gelu, approximate="tanh"))


@_custom_op("CPU", lambda x, *_: torch.empty_like(x))
def int4_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    activation: int,
    integers: bool,
) -> torch.Tensor:
    """Weights and scales [experts, out, ...], of each expert as for int4_linear; the others as for int8_experts."""
    gate_up_biases, down_biases = (
        [None] * len(packed) if bias is None else bias for packed, bias in ((gate_up, gate_up_bias), (down, down_bias))
    )
    y = torch.zeros_like(x, dtype=torch.float32)
    for e in chosen.unique().tolist():
        if e >= 0:
            tokens, place = (chosen == e).nonzero(as_tuple=True)
            both = int4_linear(x[tokens], gate_up[e], gate_up_scale[e], gate_up_biases[e], integers)
            gate, up = both.float().chunk(2, dim=1)
            hidden = (_GATES[activation](gate) * up).to(x.dtype)
            out = int4_linear(hidden, down[e], down_scale[e], down_biases[e], integers)
            y.index_add_(0, tokens, out.float() * weights[tokens, place, None])
    return y.to(x.dtype)


# float32 holds the integers up to 2**24 = 128 * 128 * 1024: so many products of int8 add up exactly, in any order.
EXACT = 1024


@_custom_op("CPU", lambda integers, weight: integers.new_empty(integers.shape[0], weight.shape[0]))
def widened_linear(integers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact sums, each rounded to float32 once."""
    y = integers.new_empty(integers.shape[0], weight.shape[0])
    buffer = torch.empty(512 * EXACT, dtype=torch.float32, device="cpu")  # 2 MiB, which stay in the cache
    for outputs, rows in zip(y.split(512, dim=1), weight.split(512), strict=True):
        sums = torch.zeros_like(outputs, dtype=torch.float64)
        for x, block in zip(integers.split(EXACT, dim=1), rows.split(EXACT, dim=1), strict=True):
            sums += torch.nn.functional.linear(x, buffer[: block.numel()].view(block.shape).copy_(block))
        outputs.copy_(sums)
    return y


# For any device, because Triton's interpreter runs on a CPU.
@_custom_op(
    "CompositeExplicitAutograd",
    lambda x, r: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)),
)
def quantize_per_token(x: torch.Tensor, inverse_smoothing_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_quantize import quantize_per_token

    return quantize_per_token(x, inverse_smoothing_factor)


@_custom_op(
    "CompositeExplicitAutograd",
    lambda x, weight, sx, sw, dtype, _: x.new_empty(x.shape[0], weight.shape[1], dtype=dtype),
)
def triton_int8_mm(
    integers: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    # vLLM's GEMM chooses its tiles in Python by the number of tokens. Traced, it would use those of the first batch for
    # all batches.
    from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import triton_scaled_mm

    if not integers.shape[0]:
        return integers.new_empty(0, weight.shape[1], dtype=out_dtype)
    return triton_scaled_mm(integers, weight, input_scale, weight_scale, out_dtype, bias)


def _capturing(like: torch.Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


@_custom_op("CompositeExplicitAutograd", lambda like, rows: like.new_empty(rows, dtype=torch.bool))
def real_rows(like: torch.Tensor, rows: int) -> torch.Tensor:
    """like: any tensor of the device. vLLM gives every token of a batch a slot of the KV cache, and padding slot -1.

    The mapping is at one address for all batches and is written before each batch, so a captured CUDA graph reads the
    current values when it is replayed. A layer group without slots has -1 for tokens, too: one slot is enough.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    slots = get_forward_context().slot_mapping if is_forward_context_available() else None
    # Layers of one group share a tensor. A list means two half batches at once, and vLLM does not tell which one runs.
    mappings = list({id(m): m for m in slots.values()}.values()) if isinstance(slots, dict) else []
    if mappings and all(m.shape == (rows,) for m in mappings):
        return functools.reduce(operator.or_, (mapping >= 0 for mapping in mappings))
    if _capturing(like):
        raise SmoothQuantError(
            "dynamic per_tensor activations in a CUDA graph",
            f"vLLM's slot mapping of all {rows} rows, because it distinguishes tokens from padding",
            f"{[list(m.shape) for m in mappings]}" if mappings else "none",
            "serve with --enforce-eager, or calibrate with a scale per token",
        )
    return torch.ones(rows, dtype=torch.bool, device=like.device)
