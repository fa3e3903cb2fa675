"""The model as it will be served, computed on the calibration host: every quantised layer rounds as the plugin will.

    y^ = (q(x / s) @ q(diag(1/r) W diag(s))^T) * input_scale * weight_scale * r + bias

s divides the layer's input, r its output. In the checkpoint both are folded into other layers. Here they are undone, so
that the other layers see the original scale. The integers are those of vllm_smoothquant/format/int8.py; sums are
float32's. A dynamic per_tensor scale is taken over one sample at a time, as for one request that is served alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import Scheme

from ..running.forward import forward
from ..running.hooks import hooked
from ..running.precision import fast_arithmetic
from .factors import fold_weight


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer will be served.

    input_factor: float32 [in], s; output_factor: float32 [out], r; None is all ones. input_range: |x / s| that a static
    input_scale maps to 127; unused if the scheme is dynamic. transposed: weight is [in, out].
    """

    scheme: Scheme
    input_factor: torch.Tensor | None = None
    output_factor: torch.Tensor | None = None
    input_range: float | None = None
    transposed: bool = False


def weight_matrix(module: nn.Module, layer: LayerScheme) -> torch.Tensor:
    """diag(1/r) W diag(s), float32 [out, in]."""
    weight = module.get_parameter("weight").detach().float()
    return fold_weight(weight.t() if layer.transposed else weight, layer.input_factor, layer.output_factor)


def by_sample(x: torch.Tensor, samples: int) -> torch.Tensor:
    """x [samples, tokens, in], also if a model flattened it to [samples * tokens, in], as OPT does.

    Routed tokens count as one sample, because nothing says which sample they belong to.
    """
    if x.dim() != 2:
        return x
    return x.unflatten(0, (samples, -1)) if len(x) % samples == 0 else x[None]


def divided_input(x: torch.Tensor, layer: LayerScheme) -> torch.Tensor:
    """x / s, float32 of x's shape."""
    return x.float() if layer.input_factor is None else x.float() / layer.input_factor.to(x.device)


def input_scale(x: torch.Tensor, layer: LayerScheme) -> torch.Tensor | None:
    """The scale of the smoothed activation x [samples, tokens, in], in a shape that broadcasts against it.

    None if activations are not rounded.
    """
    activations = layer.scheme.input_activations
    if not activations.rounded:
        return None
    if not activations.dynamic:
        assert layer.input_range is not None
        return int8.absmax_scale(torch.tensor([layer.input_range], device=x.device))
    shared = -1 if activations.strategy == "token" else tuple(range(1, x.dim()))
    return int8.absmax_scale(x.abs().amax(dim=shared, keepdim=True))


def multiply(x: torch.Tensor, scale: torch.Tensor | None, module: nn.Module, layer: LayerScheme) -> torch.Tensor:
    """y^ without bias, float32, of the linear layer `module` for smoothed float32 x under `scale` (None: not rounded).

    4-bit weights are rounded to the nearest integer under the absmax of their group.
    """
    weight, group_size = weight_matrix(module, layer), layer.scheme.weights.group_size
    if group_size is None:
        integers, weight_scale = int8.quantize_weight(weight, layer.scheme.weights.strategy)
    else:
        group_scale = int4.group_scale(weight, group_size)
        integers, weight_scale = int4.dequantize(int4.quantize(weight, group_scale), group_scale), torch.ones(1)
    rounded = x if scale is None else int8.quantize(x, scale).float()
    y = rounded @ integers.float().t() * (1.0 if scale is None else scale) * weight_scale.to(x.device).reshape(-1)
    return y if layer.output_factor is None else y * layer.output_factor.to(y.device)


def output(module: nn.Module, x: torch.Tensor, layer: LayerScheme) -> torch.Tensor:
    """y^ with bias, float32, of the linear layer `module` for x [samples, tokens, in] (the original's, not divided)."""
    x = divided_input(x, layer)
    y = multiply(x, input_scale(x, layer), module, layer)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias.float()


def in_place_of(y: torch.Tensor, module: nn.Module, x: torch.Tensor, layer: LayerScheme, samples: int) -> torch.Tensor:
    """The served layer's output for x, in the shape and dtype of y, which the linear layer `module` computed."""
    return output(module, by_sample(x, samples), layer).reshape(y.shape).to(y.dtype)


@contextmanager
def as_served(model: nn.Module, layers: Mapping[str, LayerScheme]) -> Iterator[None]:
    """While open, the linear layers `layers` of `model(input_ids=...)` compute as they will be served."""
    samples = 0

    def count_samples(module: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal samples
        samples = len(kwargs["input_ids"])

    def replace_output(layer: LayerScheme, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        return in_place_of(y, module, args[0], layer, samples)

    def handles() -> Iterator[RemovableHandle]:
        yield model.register_forward_pre_hook(count_samples, with_kwargs=True)
        for name, layer in layers.items():
            yield model.get_submodule(name).register_forward_hook(partial(replace_output, layer))

    with hooked(handles()):
        yield


def log_probabilities(
    model: nn.Module, input_ids: torch.Tensor, layers: Mapping[str, LayerScheme]
) -> list[torch.Tensor]:
    """float32 [tokens, vocabulary] of each sample of `input_ids` on the CPU, with `layers` as they will be served."""
    with torch.no_grad(), fast_arithmetic(model), as_served(model, layers):
        return [forward(model, ids).logits[0].float().log_softmax(-1).cpu() for ids in input_ids.split(1)]


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) in nats, the mean over tokens; log-probabilities [..., tokens, vocabulary]."""
    return (expected.exp() * (expected - got)).sum(-1).mean()


def divergences(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> list[float]:
    """The kl_divergence of each sample."""
    return [float(kl_divergence(a, b)) for a, b in zip(expected, got, strict=True)]


def loss(
    model: nn.Module, input_ids: torch.Tensor, layers: Mapping[str, LayerScheme] | None = None, *, batch_size: int = 2
) -> float:
    """Mean -log p(token | those before it) over `input_ids` [samples, tokens], with `layers` as they will be served."""
    total = 0.0
    with torch.no_grad(), fast_arithmetic(model), as_served(model, layers or {}):
        for batch in input_ids.split(batch_size):
            logits = forward(model, batch).logits[:, :-1].float()
            targets = batch[:, 1:].flatten().to(logits.device)
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return total / input_ids[:, 1:].numel()
