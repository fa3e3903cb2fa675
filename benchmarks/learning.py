"""For learned.py: smoothing factors learned by gradient descent through simulated rounding.

Integers are rounded again at each step. Backwards, x passes the rounding as if it were not there, but its scale does
not: d (q * scale) / d scale = q - x / scale, the error of each integer, by which learning sees what rounding costs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.discovery.graph import Graph, Group
from calibration.observation.observation import Observation
from calibration.running.forward import forward
from calibration.running.hooks import hooked
from calibration.smoothing import simulate
from calibration.smoothing.factors import FACTOR_RANGE, Smoothing, needs_power_of_two
from calibration.smoothing.plan import Plan
from calibration.smoothing.simulate import LayerScheme
from vllm_smoothquant.format import int4, int8

Factors = Mapping[str, torch.Tensor]


class _Rounded(torch.autograd.Function):
    """One function, because autograd through its parts takes twice as long for a weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
        y = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, scale, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, y = ctx.saved_tensors
        return gradients[0], ((y - x).mul_(gradients[0]) / scale).sum_to_size(scale.shape), None, None


def rounded(x: torch.Tensor, scale: torch.Tensor, low: int = int8.QMIN, high: int = int8.QMAX) -> torch.Tensor:
    """The integers of x under `scale`, times `scale`. The scale is that of an absmax, so that nothing is clipped."""
    return _Rounded.apply(x, scale, low, high)


def rounded_weight(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """What int8 makes of `weight` [out, in] per channel, or int4 in groups, as reals; differentiable, the scale too."""
    if group_size is None:
        return rounded(weight, int8.absmax_scale(weight.abs().amax(1, keepdim=True)))
    scale = int4.group_scale(weight, group_size)[..., None]
    return rounded(weight.unflatten(1, (-1, group_size)), scale, int4.QMIN, int4.QMAX).flatten(1)


def output(layer: LayerScheme, module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
    """A forward hook: simulate.output, differentiable in the factors of `layer`; dynamic scales per token only."""
    x = simulate.divided_input(args[0], layer)
    if (scale := simulate.input_scale(x, layer)) is not None:
        x = rounded(x, scale)
    out = x @ rounded_weight(simulate.weight_matrix(module, layer), layer.scheme.weights.group_size).t()
    out = out if layer.output_factor is None else out * layer.output_factor
    return out if getattr(module, "bias", None) is None else out + module.get_parameter("bias")


def learnable(graph: Graph, plan: Plan) -> list[Group]:
    """The groups that can be divided without a cost at run time, and those that the plan divides there."""
    return [group for group in graph.groups if group.kind != "input" or group.source in plan.smoothing.factors]


def with_factors(graph: Graph, plan: Plan, factors: Factors) -> dict[str, LayerScheme]:
    """The layers of `plan` with `factors` (source -> [channels]) instead of its own, differentiable in them."""
    columns, rows = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for group in learnable(graph, plan):
        s = factors[group.source]
        if group.kind == "linear":
            rows[group.source] = s
        for reader in group.readers:
            columns[reader.name] = columns.get(reader.name, torch.ones(1)) * reader.columns(s)
    return {
        name: replace(layer, input_factor=columns.get(name), output_factor=rows.get(name))
        for name, layer in plan.layers().items()
    }


def folded(observation: Observation, plan: Plan, factors: Factors) -> dict[str, LayerScheme]:
    """The layers of `plan` with `factors` as calibrate would fold them: in range, and exact in storage.

    Without the bound that keeps what is divided in float16's range, because only simulate.py serves these layers.
    """
    found = {}
    for group in learnable(observation.graph, plan):
        s = factors[group.source].detach().clamp(*FACTOR_RANGE)
        if needs_power_of_two(observation.model, group, plan.schemes):
            s = 2.0 ** s.log2().round()
        found[group.source] = torch.where(group.foldable, s, 1.0)
    smoothing = Smoothing(observation.model, observation.graph, found, plan.schemes)
    return replace(plan, smoothing=smoothing).layers()


def learn(
    model: nn.Module, graph: Graph, plan: Plan, ids: torch.Tensor, exact: torch.Tensor, *, rate: float, steps: int,
    batch: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The factors of `plan` after `steps` of Adam, whose rate falls linearly to 0.

    model: in float32, without gradients of its own. ids [windows, tokens]; exact: log-probabilities of each.
    """
    groups = learnable(graph, plan)
    first = {group.source: plan.smoothing.factors.get(group.source, torch.ones(group.channels)) for group in groups}
    logs = {source: s.log().requires_grad_() for source, s in first.items()}
    # A KL of 1e-5 has gradients below Adam's usual epsilon.
    optimizer = torch.optim.Adam(logs.values(), lr=rate, eps=1e-16)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    draw = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(ids), generator=draw) for _ in range(-(-steps * batch // len(ids)))])
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        factors = {group.source: torch.where(group.foldable, logs[group.source].exp(), 1.0) for group in groups}
        with hooked(hooks(model, with_factors(graph, plan, factors))):
            got = forward(model, ids[chosen]).logits.log_softmax(-1)
        loss = (exact[chosen].exp() * (exact[chosen] - got)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {group.source: torch.where(group.foldable, logs[group.source].detach().exp(), 1.0) for group in groups}


def hooks(model: nn.Module, layers: Mapping[str, LayerScheme]) -> Iterator[RemovableHandle]:
    for name, layer in layers.items():
        yield model.get_submodule(name).register_forward_hook(partial(output, layer))
