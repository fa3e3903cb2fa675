"""The tensors of an INT8 linear layer.

    weight_scale = absmax(W) / 127 per output channel or per tensor;  input_scale = absmax(X / smoothing_factor) / 127

Smoothed weights are rounded once, from float32, and never through the model's own 16-bit dtype.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import Scheme
from vllm_smoothquant.format.errors import SmoothQuantError


def quantize_linear(
    name: str, linear: nn.Module, weight: torch.Tensor, input_range: float, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of the quantised layer, without its bias.

    weight: smoothed float32 in the module's own layout; input_range: |x / s| that a static input_scale maps to 127.
    Errors (SmoothQuantError): a weight that is not finite.
    """
    if not torch.isfinite(weight).all():
        raise SmoothQuantError(f"{name}.weight", "finite smoothed weights", "NaN or infinity", "use a smaller --alpha")
    transposed = isinstance(linear, Conv1D)
    q, scale = int8.quantize_weight(weight.t() if transposed else weight, scheme.weights.strategy)
    # A Conv1D layer keeps its layout in the file, because vLLM's loaders of such models transpose every weight.
    tensors = {"weight": q.t().contiguous() if transposed else q, "weight_scale": scale}
    if not scheme.input_activations.dynamic:
        tensors["input_scale"] = int8.absmax_scale(torch.tensor([input_range]))
    return tensors
