"""Which layers leave the scheme: those whose rounding changes the output of their decoder block most.

    error(layers) = sum over tokens t of |z_t - z^_t|^2 / |z_t|, divided by the sum of |z_t|

z is the block's output; z^ is the same with only these layers as they will be served. A layer's own output would not be
a good measure, because much of it may be small compared with what the block passes on. It takes one forward pass; each
block runs again for every tensor that quantised layers read, once as served and once with a scale per token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.config import InputActivations

from ..discovery.graph import Graph
from ..observation.observation import Observation
from ..running.hooks import hooked
from ..running.modules import decoder_blocks, decoder_of
from ..running.precision import fast_arithmetic
from . import simulate
from .search import relative_error
from .simulate import LayerScheme

TOKEN, FLOAT = "token", "floating point"  # what a layer can fall back to
PER_TOKEN = InputActivations("token", dynamic=True)
# Each block runs some nine times. More samples than these give the same ranking.
SAMPLES = 2


@dataclass(frozen=True)
class Fallback:
    """Layers that read one tensor and fall back together. gain: by how much their error decreases."""

    names: tuple[str, ...]
    to: str
    gain: float


def rank_fallbacks(observation: Observation, layers: Mapping[str, LayerScheme], most: int) -> tuple[Fallback, ...]:
    """What falls back, the largest gain first, until `most` layers have fallen back.

    Layers that read one tensor fall back together, because vLLM runs them as one layer. If a scale per token does not
    halve their error, they go to floating point.
    """
    fallbacks = []
    ids = observation.samples.input_ids[:SAMPLES]
    for names, (error, per_token) in block_errors(observation.model, observation.graph, layers, ids).items():
        to = TOKEN if per_token <= error / 2 else FLOAT
        fallbacks.append(Fallback(names, to, error - per_token if to == TOKEN else error))
    chosen: list[Fallback] = []
    for fallback in sorted(fallbacks, key=lambda fallback: -fallback.gain):
        if sum(len(c.names) for c in chosen) + len(fallback.names) <= most:
            chosen.append(fallback)
    return tuple(chosen)


def block_errors(
    model: nn.Module, graph: Graph, layers: Mapping[str, LayerScheme], input_ids: torch.Tensor
) -> dict[tuple[str, ...], tuple[float, float]]:
    """Layers that read one tensor -> (their error as served, their error with a scale per token).

    Layers outside every block (an output head) are not ranked, because their error does not compare with the others'.
    """
    errors: dict[tuple[str, ...], tuple[float, float]] = {}
    active: dict[str, LayerScheme] = {}
    rerunning = False

    def linear(name: str, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        layer = active.get(name)
        return y if layer is None else simulate.in_place_of(y, module, args[0], layer, len(input_ids))

    def block(inside: list[tuple[str, ...]], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal rerunning
        if rerunning:
            return
        rerunning = True
        z = _hidden_states(output)

        def error(served: Mapping[str, LayerScheme]) -> float:
            active.update(served)
            error = relative_error(z, _hidden_states(module(*args, **kwargs)))
            active.clear()
            return error

        for names in inside:
            as_served = {name: layers[name] for name in names}
            per_token = {name: _per_token(layers[name]) for name in names}
            errors[names] = (error(as_served), error(per_token))
        rerunning = False

    def handles() -> Iterator[RemovableHandle]:
        for name in layers:
            yield model.get_submodule(name).register_forward_hook(partial(linear, name))
        sets = [tuple(name for name in names if name in layers) for names in graph.shared_input_groups]
        for name, module in decoder_blocks(model).items():
            inside = [names for names in sets if names and all(n.startswith(f"{name}.") for n in names)]
            if inside:
                yield module.register_forward_hook(partial(block, inside), with_kwargs=True)

    with torch.no_grad(), fast_arithmetic(model), hooked(handles()):
        decoder_of(model, layers)(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    return errors


def _per_token(layer: LayerScheme) -> LayerScheme:
    return replace(layer, scheme=replace(layer.scheme, input_activations=PER_TOKEN))


def _hidden_states(output: Any) -> torch.Tensor:
    """The first tensor of what a block returns."""
    tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return tensor.detach().float()
