"""The model as it will be served, computed on the calibration host: every quantised layer rounds as the plugin will.

    y^ = (q(x / s) @ q(diag(1/r) W diag(s))^T) * input_scale * weight_scale * r + bias

s divides the layer's input, r its output (both folded elsewhere, so that other layers see the original's scale). The
integers are those of vllm_smoothquant/format/int8.py; sums are float32's. A dynamic per_tensor scale is taken over
one sample at a time, which is what one request served alone would see.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import Scheme

from ..running.precision import fast_arithmetic
from .factors import Smoothing


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer will be served.

    input_factor: float32 [in], s; output_factor: float32 [out], r; None is all ones. input_range: |x / s| that a static
    input_scale maps to 127; unused where the scheme is dynamic. transposed: weight is [in, out]. rounds: "weight" or
    "input" to round that alone, which nobody serves, to see what each costs.
    """

    scheme: Scheme
    input_factor: torch.Tensor | None = None
    output_factor: torch.Tensor | None = None
    input_range: float | None = None
    transposed: bool = False
    rounds: str = "both"


def layer_schemes(
    schemes: Mapping[str, Scheme], smoothing: Smoothing, input_ranges: Mapping[str, float]
) -> dict[str, LayerScheme]:
    """What each of the quantised layers of `schemes` will do under `smoothing`."""
    return {
        name: LayerScheme(
            scheme,
            smoothing.input_factor(name),
            smoothing.output_factor(name),
            input_ranges.get(name),
            smoothing.transposed.get(name, False),
        )
        for name, scheme in schemes.items()
    }


def weight_matrix(module: nn.Module, served: LayerScheme) -> torch.Tensor:
    """diag(1/r) W diag(s), float32 [out, in]."""
    weight = module.get_parameter("weight").detach().float()
    weight = weight.t() if served.transposed else weight
    if served.input_factor is not None:
        weight = weight * served.input_factor.to(weight.device)
    if served.output_factor is not None:
        weight = weight / served.output_factor.to(weight.device)[:, None]
    return weight


def by_sample(x: torch.Tensor, samples: int) -> torch.Tensor:
    """x [samples, tokens, in], also where a model has flattened it to [samples * tokens, in], as OPT does.

    Routed tokens, of which nothing says whose they are, count as one sample.
    """
    if x.dim() != 2:
        return x
    return x.unflatten(0, (samples, -1)) if len(x) % samples == 0 else x[None]


def divided_input(x: torch.Tensor, served: LayerScheme) -> torch.Tensor:
    """x / s, float32 of x's shape."""
    return x.float() if served.input_factor is None else x.float() / served.input_factor.to(x.device)


def input_scale(x: torch.Tensor, served: LayerScheme) -> torch.Tensor:
    """The scale of the smoothed activation x [samples, tokens, in], to broadcast against it."""
    activations = served.scheme.input_activations
    if not activations.dynamic:
        assert served.input_range is not None
        return int8.absmax_scale(torch.tensor([served.input_range], device=x.device))
    if activations.strategy == "token":
        return int8.input_scale(x, "token")
    return int8.absmax_scale(x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True))


def multiply(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, served: LayerScheme
) -> torch.Tensor:
    """y^ without bias, of smoothed float32 x under `scale` and int8 `weight` [out, in] under `weight_scale`."""
    y = int8.quantize(x, scale).float() @ weight.float().t() * scale * weight_scale.reshape(-1)
    return y if served.output_factor is None else y * served.output_factor.to(y.device)


def in_place_of(y: torch.Tensor, module: nn.Module, x: torch.Tensor, served: LayerScheme, samples: int) -> torch.Tensor:
    """What the linear layer `module`, which gave y for x, gives as served: y's shape and dtype. samples: in x."""
    return output(module, by_sample(x, samples), served).reshape(y.shape).to(y.dtype)


def output(module: nn.Module, x: torch.Tensor, served: LayerScheme) -> torch.Tensor:
    """y^ with bias, float32, of linear layer `module` for x [samples, tokens, in] (the original's, not divided)."""
    x = divided_input(x, served)
    weight = weight_matrix(module, served)
    integers, weight_scale = int8.quantize_weight(weight, served.scheme.weights.strategy)
    scale = input_scale(x, served)
    if served.rounds == "both":
        y = multiply(x, scale, integers, weight_scale, served)
    else:
        rounded = (
            (int8.quantize(x, scale) * scale, weight) if served.rounds == "input" else (x, integers * weight_scale)
        )
        y = rounded[0] @ rounded[1].t()
        y = y if served.output_factor is None else y * served.output_factor.to(y.device)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias.float()


@contextmanager
def serving(model: nn.Module, layers: Mapping[str, LayerScheme]) -> Iterator[None]:
    """While open, the linear layers `layers` of `model(input_ids=...)` compute as they will be served."""
    samples = 0

    def before(module: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal samples
        samples = len(kwargs["input_ids"])

    def hook(served: LayerScheme) -> Callable:
        def after(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            return in_place_of(y, module, args[0], served, samples)

        return after

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(hook(served)) for name, served in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    layers: Mapping[str, LayerScheme] | None = None,
    *,
    batch_size: int = 2,
    quiet: bool = True,
) -> float:
    """Mean -log p(token | those before it) over `input_ids` [samples, tokens], with `layers` as they will be served."""
    device = next(model.parameters()).device
    total = 0.0
    bar = tqdm(total=len(input_ids), desc="simulate", unit="sample", disable=True if quiet else None)
    with torch.no_grad(), fast_arithmetic(model), serving(model, layers or {}):
        for batch in input_ids.to(device).split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
            bar.update(len(batch))
    bar.close()
    return total / (input_ids[:, 1:].numel())
