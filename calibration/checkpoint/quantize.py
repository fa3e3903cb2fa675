"""The tensors of a quantised linear layer.

    weight_scale = absmax(W) / 127 per output channel or per tensor;  input_scale = absmax(X / smoothing_factor) / 127
    4 bits: weight_scale per group of inputs, of either sign (calibration/rounding)

Smoothed weights are rounded once, from float32, and never through the model's own 16-bit dtype.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError

from ..rounding import gptq, nearest


def quantize_linear(
    name: str, linear: nn.Module, weight: torch.Tensor, input_range: float, scheme: Scheme,
    hessian: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Suffix -> tensor of the quantised layer, without its bias.

    weight: smoothed float32 in the module's own layout; input_range: |x / s| that a static input_scale maps to 127.
    hessian: of x / s, float32 [in, in], with which 4-bit weights are rounded by GPTQ; None: to the nearest integer.
    Errors (SmoothQuantError): a weight that is not finite.
    """
    if not torch.isfinite(weight).all():
        raise SmoothQuantError(f"{name}.weight", "finite smoothed weights", "NaN or infinity", "use a smaller --alpha")
    if scheme.weights.group_size is not None:
        importance = None if hessian is None else hessian.diagonal()
        scale = nearest.best_scale(weight, scheme.weights.group_size, importance)
        q = int4.quantize(weight, scale) if hessian is None else gptq.round_gptq(weight, hessian, scale)
        return {"weight_packed": int4.pack(q), "weight_scale": scale}
    transposed = isinstance(linear, Conv1D)
    q, scale = int8.quantize_weight(weight.t() if transposed else weight, scheme.weights.strategy)
    # A Conv1D layer keeps its layout in the file, because vLLM's loaders of such models transpose every weight.
    tensors = {"weight": q.t().contiguous() if transposed else q, "weight_scale": scale}
    if not scheme.input_activations.dynamic:
        tensors["input_scale"] = int8.absmax_scale(torch.tensor([input_range]))
    return tensors
