"""The absmax of every input channel of linear layers over all calibration tokens.

    absmax_j = max over tokens |X[token, j]|        float32 [in], the max|X_j| of eq. 4 (Xiao et al., 2022)

Later stages need no second pass: the absmax of a smoothed input is absmax / smoothing_factor, and its static per-tensor
range is the maximum of that. The output of a layer that is divided by factors is observed as well, under the name
`output_of(layer)`, float32 [out], because it must stay within the range of the model's dtype.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Graph
from ..running.forward import forward
from ..running.hooks import hooked
from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic
from .experts import OUTPUT, with_idle_experts


def output_of(name: str) -> str:
    """The name under which the output of layer `name` is observed."""
    return name + OUTPUT


def observed_layer(name: str) -> str:
    """The layer of `name`, which is a layer or output_of(layer)."""
    return name.removesuffix(OUTPUT)


def needed_absmax(graph: Graph, layers: Iterable[str]) -> list[str]:
    """The names to observe for INT8 `layers` and the groups of `graph`: all that a factor is computed from."""
    sources = {output_of(group.source) for group in graph.groups if group.kind == "linear"}
    return sorted({*layers, *(reader.name for group in graph.groups for reader in group.readers), *sources})


@contextmanager
def watching_absmax(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward pass of the linear layers `names` updates the yielded dict: name -> float32 [in].

    names: layers, and output_of(layer) for float32 [out] of what they return.
    """
    absmax: dict[str, torch.Tensor] = {}
    # q, k and v read the same tensor: its absmax is computed once. The tensor is stored, not its id, because an id can
    # be reused once its tensor is freed.
    last: list[torch.Tensor] = []

    def update(name: str, maxima: torch.Tensor) -> None:
        absmax[name] = torch.maximum(absmax[name], maxima) if name in absmax else maxima

    def watch_input(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not last or last[0] is not args[0]:
            last[:] = [args[0], _absmax(args[0])]
        update(name, last[1])

    def watch_output(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):  # a router may be a linear layer that returns more than one tensor
            update(name, _absmax(output))

    def handles() -> Iterator[RemovableHandle]:
        for name in names:
            module = model.get_submodule(observed_layer(name))
            if name == observed_layer(name):
                yield module.register_forward_pre_hook(partial(watch_input, name))
            else:
                yield module.register_forward_hook(partial(watch_output, name))

    with hooked(handles()):
        yield absmax
    last.clear()


def _absmax(x: torch.Tensor) -> torch.Tensor:
    """float32 [channels] of x [..., channels]."""
    rows = x.detach().reshape(-1, x.shape[-1])
    # This avoids a copy |x| of the size of x; torch.aminmax over rows takes four times as long.
    return torch.maximum(rows.amax(dim=0), -rows.amin(dim=0)).to(torch.float32)


def observe_absmax(
    model: nn.Module, names: list[str], input_ids: torch.Tensor, *, batch_size: int = 4
) -> dict[str, torch.Tensor]:
    """Run the decoder over `input_ids` [samples, seq_len]; returns name -> absmax float32 [in] of each of `names`.

    The output head does not run unless it is in `names`: on a small model it is a fifth of the work.
    Errors (SmoothQuantError): a layer that no sample reached, or NaN or infinity in its input.
    """
    decoder = decoder_of(model, map(observed_layer, names))
    with torch.no_grad(), fast_arithmetic(model), watching_absmax(model, names) as absmax:
        for batch in input_ids.split(batch_size):
            forward(decoder, batch)
    return checked(names, with_idle_experts(model, absmax))


def checked(names: Iterable[str], absmax: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The absmax of `names` on the CPU; SmoothQuantError if no sample reached a layer or its input was not finite."""
    for name in names:
        if name not in absmax:
            raise SmoothQuantError(
                name, "calibration text that reaches every linear layer", "no input", "give more text or --ignore it"
            )
        if not torch.isfinite(absmax[name]).all():
            raise SmoothQuantError(
                f"{name}: input", "finite activations", "NaN or infinity", "check the model: it overflows in this dtype"
            )
    return {name: absmax[name].cpu().clone() for name in names}
