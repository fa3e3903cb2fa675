"""Custom operators: what torch.compile must not look into, with the shapes it needs to know.

    smoothquant::onednn_tensor_int8     y = (q_x @ q_w^T) * s_x * s_w^T + bias        s_x one number for all tokens
    smoothquant::int8_linear            y = (q_x @ q_w^T) * s_x * s_w^T + bias        q_w int8 [out, in], s_w [out]
    smoothquant::widened_linear         y = x @ q_w^T        x float32 integers, q_w int8 [out, in], y float32
    smoothquant::quantize_per_token     x * r -> q_x int8 [tokens, in], s_x [tokens, 1]        r float32 [in]
    smoothquant::triton_int8_mm         y = (q_x @ q_w) * s_x * s_w^T + bias        q_w int8 [in, out], s_w [out, 1]
    smoothquant::real_rows              bool [tokens]: True for tokens, False for the padding of a CUDA graph

x [tokens, in] float32/bfloat16/float16; scales float32; weight_sum int32 [out], the sum of each row of q_w. In
onednn_tensor_int8, q_w and s_w live inside vLLM's oneDNN handler. There and in int8_linear s_x is [1], or None to
measure it: s_x = absmax(x) / 127. Real = int * scale. Every operator has a fake implementation and mutates nothing, so
`torch.library.opcheck` passes (tests/test_plugin.py, tests/test_cuda.py).

Importing this module registers the operators, once.
"""

import torch

from ..format.errors import SmoothQuantError
from ..format.int8 import absmax_scale
from . import build

NAMESPACE = "smoothquant"


def dynamic_tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """float32 [1]: the per-tensor scale of x (any shape), on x's device, without waiting for it.

    One read of x, where `x.abs().amax()` would write and read a copy first. int8.input_scale says the same for readers.
    """
    low, high = torch.aminmax(x)
    return absmax_scale(torch.maximum(-low, high).reshape(1))


def _onednn_tensor_int8(
    x: torch.Tensor,
    handler: torch.Tensor,
    out_features: int,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """handler: int64 [1], the address of a static per-tensor W8A8 oneDNN handler its owner keeps alive."""
    out = x.new_empty(x.shape[0], out_features)
    if not x.shape[0]:
        return out
    scale = dynamic_tensor_scale(x) if input_scale is None else input_scale
    x = x.contiguous()
    quantized = torch.empty_like(x, dtype=torch.int8)
    # By position: the first argument is called differently in the CPU and the CUDA builds.
    torch.ops._C.static_scaled_int8_quant(quantized, x, scale, None)
    torch.ops._C.onednn_scaled_mm(out, quantized, scale, None, None, bias, handler)
    return out


def _onednn_tensor_int8_fake(
    x: torch.Tensor,
    handler: torch.Tensor,
    out_features: int,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


def _int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_token: bool,
) -> torch.Tensor:
    """per_token: whether a measured scale is each token's own."""
    # int8_linear.cpp reads and writes these two; float16, and a bias of another dtype, go through float32.
    if x.dtype not in (torch.float32, torch.bfloat16) or (bias is not None and bias.dtype != x.dtype):
        bias = None if bias is None else bias.to(torch.float32)
        x32 = x.to(torch.float32)
        return _int8_linear(x32, weight, weight_scale, weight_sum, input_scale, bias, per_token).to(x.dtype)
    function = build.int8_linear()
    assert callable(function), function  # kernels.Compiled rejects it before
    (tokens, in_features), out_features = x.shape, weight.shape[0]
    x = x.contiguous()
    y = x.new_empty(tokens, out_features)
    done = function(
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        weight_sum.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if input_scale is None else input_scale.data_ptr(),
        per_token,
        y.data_ptr(),
        tokens,
        in_features,
        out_features,
    )
    if not done:
        raise MemoryError(f"no room for the integers of {tokens} tokens of {in_features}")
    return y


def _int8_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_token: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# float32 room for one layer's weight at a time, as large as the largest layer. One worker runs one forward pass at a
# time, so one is enough; allocating anew at every call costs three times the multiplication, in page faults.
_room = torch.empty(0, dtype=torch.float32, device="cpu")


def _widened_linear(integers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    global _room
    if _room.numel() < weight.numel():
        _room = torch.empty(weight.numel(), dtype=torch.float32, device="cpu")
    return torch.nn.functional.linear(integers, _room[: weight.numel()].view(weight.shape).copy_(weight))


def _widened_linear_fake(integers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return integers.new_empty(integers.shape[0], weight.shape[0])


def _quantize_per_token(x: torch.Tensor, inverse_smoothing_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_quantize import quantize_per_token

    return quantize_per_token(x, inverse_smoothing_factor)


def _quantize_per_token_fake(
    x: torch.Tensor, inverse_smoothing_factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _triton_int8_mm(
    integers: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    # vLLM's GEMM picks its tiles by the number of tokens in Python; traced, it would keep those of the first batch.
    from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import triton_scaled_mm

    if not integers.shape[0]:
        return integers.new_empty(0, weight.shape[1], dtype=out_dtype)
    return triton_scaled_mm(integers, weight, input_scale, weight_scale, out_dtype, bias)


def _triton_int8_mm_fake(
    integers: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return integers.new_empty(integers.shape[0], weight.shape[1], dtype=out_dtype)


def _capturing(like: torch.Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _real_rows(like: torch.Tensor, rows: int) -> torch.Tensor:
    """like: any tensor of the device. vLLM gives every token of a batch a slot of the KV cache, and padding -1.

    The mapping lies at one address for all batches and is written before each, so a CUDA graph that has captured this
    reads what is true when it is replayed. A layer group without slots has -1 for tokens, too: one slot is enough.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    found = get_forward_context().slot_mapping if is_forward_context_available() else None
    # Layers of one group share a tensor. A list is two half batches at once, of which this is not told which one it is.
    mappings = list({id(m): m for m in found.values()}.values()) if isinstance(found, dict) else []
    if not mappings or any(m.shape != (rows,) for m in mappings):
        if _capturing(like):
            raise SmoothQuantError(
                "dynamic per_tensor activations in a CUDA graph",
                f"vLLM's slot mapping of all {rows} rows, which tells tokens from padding",
                f"{[list(m.shape) for m in mappings]}" if mappings else "none",
                "serve with --enforce-eager, or calibrate with a scale per token",
            )
        return torch.ones(rows, dtype=torch.bool, device=like.device)
    real = mappings[0] >= 0
    for mapping in mappings[1:]:
        real = real | (mapping >= 0)
    return real


def _real_rows_fake(like: torch.Tensor, rows: int) -> torch.Tensor:
    return like.new_empty(rows, dtype=torch.bool)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _define(name: str, function, fake, dispatch_key: str) -> None:  # type: ignore[no-untyped-def]
    # Not torch.library.custom_op: its Python wrapper costs some 10 us a call, more than a small layer's GEMM.
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, dispatch_key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


_define("onednn_tensor_int8", _onednn_tensor_int8, _onednn_tensor_int8_fake, "CPU")

onednn_tensor_int8 = torch.ops.smoothquant.onednn_tensor_int8.default
_define("int8_linear", _int8_linear, _int8_linear_fake, "CPU")
int8_linear = torch.ops.smoothquant.int8_linear.default
_define("widened_linear", _widened_linear, _widened_linear_fake, "CPU")
widened_linear = torch.ops.smoothquant.widened_linear.default
_define("quantize_per_token", _quantize_per_token, _quantize_per_token_fake, "CUDA")
quantize_per_token = torch.ops.smoothquant.quantize_per_token.default
_define("triton_int8_mm", _triton_int8_mm, _triton_int8_mm_fake, "CUDA")
triton_int8_mm = torch.ops.smoothquant.triton_int8_mm.default
_define("real_rows", _real_rows, _real_rows_fake, "CompositeExplicitAutograd")
real_rows = torch.ops.smoothquant.real_rows.default
