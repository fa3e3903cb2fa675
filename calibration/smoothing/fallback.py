"""Which layers leave the scheme: those whose rounding moves the output of their decoder block most.

    error(layers) = sum over tokens t of |z_t - z^_t|^2 / |z_t|, over the sum of |z_t|

z is the block's output, z^ the same with these layers alone as they will be served. A layer's own output would not
tell: much of it may be lost where it adds little to what the block passes on. One forward pass; each block is run again
for every tensor that quantised layers read, once as served and once with a scale for each token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vllm_smoothquant.format.config import InputActivations

from ..discovery.graph import Graph
from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic
from . import simulate
from .search import relative_error
from .simulate import LayerScheme

TOKEN, FLOAT = "token", "floating point"  # what a layer can fall back to
PER_TOKEN = InputActivations("token", dynamic=True)
# Each block runs some nine times: this many samples rank the layers as more would.
SAMPLES = 2


@dataclass(frozen=True)
class Fallback:
    """Layers that read one tensor and fall back together. gain: how much smaller their error becomes."""

    names: tuple[str, ...]
    to: str
    gain: float


def rank_fallbacks(
    model: nn.Module, graph: Graph, layers: Mapping[str, LayerScheme], input_ids: torch.Tensor, budget: int
) -> tuple[Fallback, ...]:
    """What falls back, the move that gains most first, until `budget` layers have.

    Layers that read one tensor go together, because vLLM runs them as one. Where a scale for each token would not halve
    their error, they go to floating point. input_ids: int64 [samples, tokens], of which SAMPLES are run.
    """
    moves = []
    for names, (error, per_token) in block_errors(model, graph, layers, input_ids[:SAMPLES]).items():
        to = TOKEN if per_token <= error / 2 else FLOAT
        moves.append(Fallback(names, to, error - per_token if to == TOKEN else error))
    chosen: list[Fallback] = []
    for move in sorted(moves, key=lambda move: -move.gain):
        if sum(len(m.names) for m in chosen) + len(move.names) <= budget:
            chosen.append(move)
    return tuple(chosen)


def block_errors(
    model: nn.Module, graph: Graph, layers: Mapping[str, LayerScheme], input_ids: torch.Tensor
) -> dict[tuple[str, ...], tuple[float, float]]:
    """Layers that read one tensor -> their error as served, and with a scale for each token.

    Layers outside every block (an output head) are not ranked: nothing says what their error means beside the others'.
    """
    errors: dict[tuple[str, ...], tuple[float, float]] = {}
    active: dict[str, LayerScheme] = {}
    again = False

    def linear(name: str) -> Callable:
        def after(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            served = active.get(name)
            return y if served is None else simulate.in_place_of(y, module, args[0], served, len(input_ids))

        return after

    def block(reading: list[tuple[str, ...]]) -> Callable:
        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal again
            if again:
                return
            again = True
            z = _first(output)
            for names in reading:
                found = []
                for change in (lambda served: served, _per_token):
                    active.update({name: change(layers[name]) for name in names})
                    found.append(relative_error(z, _first(module(*args, **kwargs))))
                    active.clear()
                errors[names] = (found[0], found[1])
            again = False

        return after

    with torch.no_grad(), fast_arithmetic(model), _hooks(model, graph, layers, linear, block):
        decoder_of(model, layers)(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    return errors


@contextmanager
def _hooks(
    model: nn.Module, graph: Graph, layers: Mapping[str, LayerScheme], linear: Callable, block: Callable
) -> Iterator[None]:
    sets = [tuple(name for name in reading if name in layers) for reading in graph.inputs]
    handles = [model.get_submodule(name).register_forward_hook(linear(name)) for name in layers]
    for name, module in model.named_modules():
        inside = [names for names in sets if names and all(n.startswith(f"{name}.") for n in names)]
        parent = model.get_submodule(name.rpartition(".")[0])
        if inside and name and isinstance(parent, nn.ModuleList):
            handles.append(module.register_forward_hook(block(inside), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _per_token(served: LayerScheme) -> LayerScheme:
    return replace(served, scheme=replace(served.scheme, input_activations=PER_TOKEN))


def _first(output: Any) -> torch.Tensor:
    """The hidden states: the first tensor of what a block returns."""
    tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return tensor.detach().float()
