"""Forward passes of transformers whose linear layers round as serving does not: what benchmarks/field.py simulates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.running.hooks import hooked
from calibration.running.precision import in_float32, plain_parameters
from vllm_smoothquant.format import int8

# Static ranges that are tried for a layer: these quantiles of its tokens' maxima.
QUANTILES = (1.0, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7)
Rounding = Callable[[torch.Tensor], torch.Tensor]


def cross_rounded(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """x [..., tokens, in], rounded under its row's maximum ** exponent * its column's maximum ** (1 - exponent)."""
    rows, columns = x.abs().amax(-1, keepdim=True), x.abs().amax(-2, keepdim=True)
    scale = int8.absmax_scale(rows**exponent * columns ** (1 - exponent))
    return int8.quantize(x, scale) * scale


def clipped(x: torch.Tensor, limit: float) -> torch.Tensor:
    """x, rounded under the scale that maps `limit` to 127; what is larger becomes the largest integer."""
    scale = int8.absmax_scale(torch.tensor(limit))
    return int8.quantize(x, scale) * scale


@contextmanager
def rounded(model: nn.Module, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """While open, the linear layers named multiply rounding(input) by their weight, rounded per channel; in float32."""

    def replace_output(rounding: Rounding, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        integers, scale = int8.quantize_weight(module.get_parameter("weight").detach().float(), "channel")
        out, bias = rounding(args[0].float()) @ (integers * scale).t(), getattr(module, "bias", None)
        return (out if bias is None else out + bias.float()).to(y.dtype)

    with hooked(model.get_submodule(n).register_forward_hook(partial(replace_output, r)) for n, r in roundings.items()):
        yield


def ranges(model: nn.Module, layers: Sequence[str], batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Layer -> the quantile of its tokens' maxima whose clipping changes its output least over `batches`."""
    maxima: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    errors = {name: torch.zeros(len(QUANTILES), dtype=torch.float64) for name in layers}

    def collect(name: str, module: nn.Module, args: Any) -> None:
        maxima[name].append(args[0].float().abs().amax(-1).flatten())

    def compare(name: str, module: nn.Module, args: Any) -> None:
        x, weight = args[0].float(), module.get_parameter("weight").detach().float()
        changes = [((clipped(x, limit) - x) @ weight.t()).square().sum() for limit in candidates[name]]
        errors[name] += torch.stack(changes).double()

    def run(watch: Callable[[str, nn.Module, Any], None]) -> None:
        handles: Iterator[RemovableHandle] = (
            model.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in layers
        )
        with torch.no_grad(), hooked(handles):
            for batch in batches:
                model(input_ids=batch, use_cache=False)

    run(collect)
    quantiles = torch.tensor(QUANTILES)
    candidates = {name: torch.cat(values).quantile(quantiles).tolist() for name, values in maxima.items()}
    run(compare)
    return {name: candidates[name][int(errors[name].argmin())] for name in layers}


@contextmanager
def counting(model: nn.Module, layers: Sequence[str], limit: float, shares: list[float]) -> Iterator[None]:
    """While open, every call of a layer adds to `shares` the share of its input channels with a value above `limit`."""

    def count(module: nn.Module, args: Any) -> None:
        shares.append(float((args[0].abs() > limit).flatten(0, -2).any(0).float().mean()))

    with hooked(model.get_submodule(name).register_forward_pre_hook(count) for name in layers):
        yield


def arithmetic(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """While open, `model` computes in `dtype`, its own or float32."""
    same = next(model.parameters()).dtype == dtype
    return nullcontext() if same else in_float32(model, partial(plain_parameters, model))
