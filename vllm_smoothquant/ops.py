"""Custom operators: what torch.compile must not look into, with the shapes it needs to know.

    smoothquant::onednn_tensor_int8     y = (q_x @ q_w^T) * s_x * s_w^T + bias        s_x one number for all tokens
    smoothquant::widened_linear         y = x @ q_w^T        x float32 integers, q_w int8 [out, in], y float32

x [tokens, in] float32/bfloat16/float16; q_w int8 and s_w float32 live inside vLLM's oneDNN handler; s_x float32 [1], or
None to measure it: s_x = absmax(x) / 127. Real = int * scale. Every operator has a fake implementation and mutates
nothing, so `torch.library.opcheck` passes (tests/test_plugin.py).

Importing this module registers the operators, once.
"""

import torch

from .int8 import absmax_scale

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


_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _define(name: str, function, fake, dispatch_key: str) -> None:  # type: ignore[no-untyped-def]
    # Not torch.library.custom_op: its Python wrapper costs some 10 us a call, more than a small layer's GEMM.
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, dispatch_key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


_define("onednn_tensor_int8", _onednn_tensor_int8, _onednn_tensor_int8_fake, "CPU")

onednn_tensor_int8 = torch.ops.smoothquant.onednn_tensor_int8.default
_define("widened_linear", _widened_linear, _widened_linear_fake, "CPU")
widened_linear = torch.ops.smoothquant.widened_linear.default
