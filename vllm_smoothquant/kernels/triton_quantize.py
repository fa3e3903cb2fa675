"""x / smoothing_factor, rounded with a scale per token: one Triton kernel that reads x from memory once.

    s[t] = max_i |x[t, i] * r[i]| / 127        q[t, i] = clamp(round(x[t, i] * r[i] / s[t]), -128, 127)        r = 1 / f

x [tokens, in] float32/bfloat16/float16, r float32 [in], q int8 [tokens, in], s float32 [tokens, 1]; real = q * s. The
result is bit for bit that of int8.py for x * r in float32. vLLM's own operator has no r and would need x * r in memory.
Only eager mode uses this kernel, because Inductor fuses the quantisation with the operation before it.
"""

import torch
import triton
import triton.language as tl

# The number of elements of a row that are read at once.
_STEP = 4096


@triton.jit
def _kernel(x, r, q, s, n, x_stride, q_stride, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, STEP)
    largest = tl.zeros((STEP,), dtype=tl.int32)
    for start in range(0, n, STEP):
        inside = columns + start < n
        value = tl.load(x + row * x_stride + start + columns, mask=inside, other=0).to(tl.float32)
        value = value * tl.load(r + start + columns, mask=inside, other=0)
        # The bits of absolute values have the order of the values, and NaN is above all of them, so no NaN is lost.
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = tl.div_rn(tl.max(largest, axis=0).to(tl.float32, bitcast=True), 127.0)
    # As in int8.absmax_scale: a row of zeros has the scale 1.
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    tl.store(s + row, scale)
    for start in range(0, n, STEP):
        inside = columns + start < n
        value = tl.load(x + row * x_stride + start + columns, mask=inside, other=0).to(tl.float32)
        value = value * tl.load(r + start + columns, mask=inside, other=0)
        value = tl.minimum(tl.maximum(tl.div_rn(value, scale), -128.0), 127.0)
        # Round half to even: adding 1.5 * 2**23 leaves no bits for a fraction.
        integer = (value + 12582912.0) - 12582912.0
        tl.store(q + row * q_stride + start + columns, integer.to(tl.int8), mask=inside)


def quantize_per_token(x: torch.Tensor, inverse_smoothing_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s of x, whose rows may have a stride; inverse_smoothing_factor is r."""
    tokens, n = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    q = torch.empty((tokens, n), dtype=torch.int8, device=x.device)
    s = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    if tokens:
        step = min(triton.next_power_of_2(n), _STEP)
        _kernel[(tokens,)](x, inverse_smoothing_factor, q, s, n, x.stride(0), q.stride(0), STEP=step)
    return q, s
