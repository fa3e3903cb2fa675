"""Which layers leave the scheme: those whose rounding changes the output of their decoder block most.

Under static scales, some kinds of layers leave it without being asked for (`per_token_kinds`); the others only as far
as --max-fallback or --budget-size allows.

    error(layers) = sum over tokens t of |z_t - z^_t|^2 / |z_t|, divided by the sum of |z_t|

z is the block's output; z^ is the block's output when only these layers compute as they will be served. A layer's own
output would not be a good measure, because much of it may be small compared with the block's output. All errors take
one forward pass, in which each block runs again for every tensor that quantised layers read: once with these layers as
served, once with a scale per token.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.config import Scheme

from ..discovery.graph import Graph
from ..discovery.trace import tensors_of
from ..observation.observation import Observation
from ..options import ACTIVATIONS
from ..rounding.groups import EIGHT_BITS
from ..running.forward import forward
from ..running.hooks import hooked
from ..running.modules import decoder_blocks, decoder_of
from ..running.precision import fast_arithmetic
from ..running.products import expert_layers
from . import simulate, size
from .search import relative_error
from .simulate import LayerScheme

_NUMBER = re.compile(r"\.\d+\.")  # of a block, in the name of a layer
TOKEN, EIGHT, FLOAT = "token", "8 bits", "floating point"  # what a layer can fall back to
# Each block runs some nine times. More samples than these give the same ranking.
SAMPLES = 2


@dataclass(frozen=True)
class Fallback:
    """Layers that read one tensor and fall back together. gain: by how much their error decreases."""

    names: tuple[str, ...]
    to: str
    gain: float


def finer(scheme: Scheme) -> Scheme:
    """`scheme` with a dynamic scale for each token; 8 bits instead of 4."""
    return EIGHT_BITS if scheme.weights.num_bits == 4 else replace(scheme, input_activations=ACTIVATIONS["token"])


def rank_fallbacks(observation: Observation, layers: Mapping[str, LayerScheme], most: int) -> tuple[Fallback, ...]:
    """The fallbacks of at most `most` layers, the largest gain first.

    Layers that read one tensor fall back together, because vLLM runs them as one layer. If a scale per token, or 8 bits
    instead of 4, do not halve their error, they go to floating point. Routed experts do not fall back, because vLLM
    runs those of a block as one.
    """
    cost = {candidate: len(candidate.names) for candidate in _candidates(observation, layers)}
    return _affordable(sorted(cost, key=lambda candidate: -candidate.gain), cost, most)


def rank_by_size(observation: Observation, layers: Mapping[str, LayerScheme], budget: int) -> tuple[Fallback, ...]:
    """The fallbacks of 4-bit layers after which the weights of all `layers` take at most `budget` bytes.

    Those with the largest gain for each byte that they add come first. One that does not fit is left out, and smaller
    ones after it may still fit. Candidates are those of `rank_fallbacks` that have 4 bits.

    Source of the idea: SliM-LLM (Huang et al., arXiv 2405.14917), there for groups of a weight, here for whole layers,
    because vLLM has one scheme for a layer.
    """

    def bytes_of(name: str, scheme: Scheme | None) -> int:
        return size.weight_bytes(observation.model.get_submodule(name), scheme)

    cost: dict[Fallback, int] = {}
    for candidate in _candidates(observation, layers):
        schemes = [layers[name].scheme for name in candidate.names]
        if candidate.gain > 0 and any(scheme.weights.num_bits == 4 for scheme in schemes):
            to = None if candidate.to == FLOAT else EIGHT_BITS
            cost[candidate] = sum(bytes_of(name, to) - bytes_of(name, layers[name].scheme) for name in candidate.names)
    free = budget - sum(bytes_of(name, layer.scheme) for name, layer in layers.items())
    return _affordable(sorted(cost, key=lambda candidate: -candidate.gain / cost[candidate]), cost, free)


def _candidates(observation: Observation, layers: Mapping[str, LayerScheme]) -> Iterator[Fallback]:
    experts = expert_layers(observation.model)
    layers = {name: layer for name, layer in layers.items() if name not in experts}
    ids = observation.samples.input_ids[:SAMPLES]
    for names, (error, finer_error) in block_errors(observation.model, observation.graph, layers, ids).items():
        grain = EIGHT if layers[names[0]].scheme.weights.num_bits == 4 else TOKEN
        to = grain if finer_error <= error / 2 else FLOAT
        yield Fallback(names, to, error if to == FLOAT else error - finer_error)


def _affordable(ranked: Sequence[Fallback], cost: Mapping[Fallback, int], limit: int) -> tuple[Fallback, ...]:
    """Of each of `ranked` in turn, those whose costs stay within `limit` together."""
    fallbacks: list[Fallback] = []
    for candidate in ranked:
        if sum(cost[fallback] for fallback in (*fallbacks, candidate)) <= limit:
            fallbacks.append(candidate)
    return tuple(fallbacks)


def per_token_kinds(observation: Observation, layers: Mapping[str, LayerScheme]) -> tuple[Fallback, ...]:
    """The static `layers` that keep a scale per token whatever may fall back, all layers of one kind together.

    A kind is a place in the block (`down_proj`). It keeps a scale per token if static scales in this kind alone would
    more than double the error that the model has with scales per token in all kinds.
    """
    errors = block_errors(observation.model, observation.graph, layers, observation.samples.input_ids[:SAMPLES])
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for names in errors:
        kinds.setdefault(_NUMBER.sub(".N.", names[0]), []).append(names)
    per_token_error = sum(token_error for _, token_error in errors.values())
    kept = []
    for groups in kinds.values():
        excess = sum(errors[names][0] - errors[names][1] for names in groups)
        if excess > per_token_error:
            kept += [Fallback(names, TOKEN, errors[names][0] - errors[names][1]) for names in groups]
    return tuple(kept)


def block_errors(
    model: nn.Module, graph: Graph, layers: Mapping[str, LayerScheme], input_ids: torch.Tensor
) -> dict[tuple[str, ...], tuple[float, float]]:
    """Layers that read one tensor -> (their error as served, their error under the `finer` scheme).

    Layers outside every block (an output head) are not ranked, because their error does not compare with the others'.
    """
    errors: dict[tuple[str, ...], tuple[float, float]] = {}
    served: dict[str, LayerScheme] = {}
    rerunning = False

    def replace_output(name: str, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        layer = served.get(name)
        return y if layer is None else simulate.in_place_of(y, module, args[0], layer, len(input_ids))

    def rerun(groups: list[tuple[str, ...]], module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal rerunning
        if rerunning:
            return

        def error(schemes: Mapping[str, LayerScheme]) -> float:
            served.update(schemes)
            z = tensors_of(module(*args, **kwargs))[0]
            served.clear()
            return relative_error(tensors_of(output)[0].float(), z.float())

        rerunning = True
        for names in groups:
            schemes = {name: layers[name] for name in names}
            token_schemes = {name: replace(layer, scheme=finer(layer.scheme)) for name, layer in schemes.items()}
            errors[names] = (error(schemes), error(token_schemes))
        rerunning = False

    def handles() -> Iterator[RemovableHandle]:
        for name in layers:
            yield model.get_submodule(name).register_forward_hook(partial(replace_output, name))
        groups = [tuple(name for name in names if name in layers) for names in graph.shared_input_groups]
        for name, module in decoder_blocks(model).items():
            inside = [names for names in groups if names and all(n.startswith(f"{name}.") for n in names)]
            if inside:
                yield module.register_forward_hook(partial(rerun, inside), with_kwargs=True)

    with torch.no_grad(), fast_arithmetic(model), hooked(handles()):
        forward(decoder_of(model, layers), input_ids)
    return errors
