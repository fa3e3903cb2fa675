"""Smoothing factors that are learned: --alpha learned.

    minimise  KL(floating point || as served)      over log s of every channel of every group, by Adam

An alpha gives all channels of a group one rule. Learning starts from the factors of the searched alphas and moves each
on its own, by gradients through simulated rounding (differentiable.py), on the calibration samples, which are all that
it sees. One in HELD_OUT batches is not learned on: there the learned factors must have the smaller KL, as they are
folded and served, or the searched ones stay. docs/learned.md has what it gains, and the rates that were tried. Weights
have 8 bits, because those of 4 bits are rounded with a search for their scales or by GPTQ, which corrects what factors
could.

The model runs in float32 and is in memory for that, 4 bytes for each parameter, beside the tensors of one batch.

Source: OmniQuant (Shao et al., arXiv 2308.13137, section 3.3), there by the error of one block at a time, and OSTQuant
(Hu et al., arXiv 2501.13987), from which the loss is.
"""

import math
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from vllm_smoothquant.format.errors import SmoothQuantError

from ..discovery.graph import Group
from ..inputs.text import Samples
from ..observation.observation import Observation, input_range
from ..options import Options
from ..running.forward import Batch, forward, input_ids
from ..running.hooks import hooked
from ..running.precision import whole_in_float32
from . import simulate
from .differentiable import output
from .factors import FACTOR_RANGE, Smoothing, nearest_power_of_two, needs_power_of_two, smallest_factors
from .plan import AS_SERVED, Plan, make_plan, perplexity
from .search import layer_errors
from .simulate import LayerScheme

NAME = "--alpha learned"
STEPS = 100
# Of log s. It falls linearly to 0.
RATE = 0.03
# Tokens of one step, if its samples are shorter.
TOKENS = 512
HELD_OUT = 8
# A KL of 1e-5 has gradients below Adam's usual epsilon.
EPSILON = 1e-16

Factors = Mapping[str, torch.Tensor]


def planned(observation: Observation, options: Options) -> Plan:
    """make_plan, and what is learned after it: nothing if all layers fell back, because none of them rounds."""
    plan = make_plan(observation, options)
    learns = options.learned and plan.schemes
    return learn(observation, plan, steps=STEPS, quiet=options.quiet) if learns else plan


def learn(observation: Observation, plan: Plan, *, rate: float = RATE, steps: int = STEPS, quiet: bool = True) -> Plan:
    """`plan` with learned factors, or as it is if they are not better on samples that they were not learned on.

    Errors (SmoothQuantError): a model through which no gradient passes, or whose KL is not finite.
    """
    learned_on, held_out = split(observation.samples)
    with whole_in_float32(observation.model):
        before = divergence(observation.model, held_out, plan.layers())
        factors = _descend(observation, plan, learned_on, rate=rate, steps=steps, quiet=quiet)
    found = with_factors(observation, plan, factors)  # outside, because the stored dtype decides what can be folded
    with whole_in_float32(observation.model):
        after = divergence(observation.model, held_out, found.layers())
    taken = after < before
    figures = {
        "steps": steps, "rate": rate, "held_out_batches": len(held_out), "searched_kl": before, "learned_kl": after,
        "taken": taken,
    }  # fmt: skip
    if not quiet:
        line = f"learned factors: KL on {len(held_out)} held-out batches {before:.3g} -> {after:.3g}"
        print(line if taken else f"{line}; the searched ones stay", file=sys.stderr)
    return replace(_measured(observation, found) if taken else plan, learned=figures)


def check_placement(model: nn.Module) -> None:
    """SmoothQuantError: some weights of `model` are moved to an accelerator and back in every pass."""
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if offloaded := devices & {"cpu", "disk"}:
        fix = "use --device-map cpu, or --alpha auto"
        raise SmoothQuantError(NAME, "all weights on accelerators, or none", f"some on {min(offloaded)}", fix)


def split(samples: Samples) -> tuple[list[Batch], list[Batch]]:
    """(batches to learn on, batches to compare on), images among them, of at least two samples."""
    ids = samples.input_ids
    size = max(1, min(TOKENS // ids.shape[1], len(ids) // HELD_OUT))
    batches = samples.batches(size)
    return [batch for number, batch in enumerate(batches) if number % HELD_OUT], batches[::HELD_OUT]


def divergence(model: nn.Module, batches: Sequence[Batch], layers: Mapping[str, LayerScheme]) -> float:
    """KL(model || model with `layers` as served) in nats, the mean over the tokens of each batch and over batches."""
    found = []
    with torch.no_grad():
        for batch in batches:
            exact = _log_probabilities(model, batch)
            with simulate.as_served(model, layers):
                got = _log_probabilities(model, batch)
            found.append(float(simulate.kl_divergence(exact, got)))
    return statistics.fmean(found)


def learnable(observation: Observation, plan: Plan) -> list[Group]:
    """The groups that can be divided without a cost at run time, and those that the plan divides there."""
    groups = observation.graph.groups
    return [group for group in groups if group.kind != "input" or group.source in plan.smoothing.factors]


def with_factors(observation: Observation, plan: Plan, factors: Factors) -> Plan:
    """`plan` with `factors` (source -> [channels]) instead of its own, as they can be folded: exact in storage."""
    model, found = observation.model, dict[str, torch.Tensor]()
    for group in learnable(observation, plan):
        s = factors[group.source].detach()
        if needs_power_of_two(model, group, plan.schemes):
            s = nearest_power_of_two(s)  # of 1, where nothing can be folded: 1
        found[group.source] = s
    smoothing = Smoothing(model, observation.graph, found, plan.schemes)
    ranges = {name: input_range(observation.absmax[name], smoothing.input_factor(name)) for name in plan.schemes}
    return replace(plan, smoothing=smoothing, input_ranges=ranges)


def _measured(observation: Observation, plan: Plan) -> Plan:
    """`plan` with the errors and the perplexity of its own factors, where those of the searched ones were measured."""
    search, perplexities = plan.search, plan.perplexities
    if search is not None:
        search = replace(search, errors=layer_errors(observation, plan.schemes, plan.smoothing.factors))
    if AS_SERVED in perplexities:
        perplexities = {**perplexities, AS_SERVED: perplexity(observation, plan)}
    return replace(plan, search=search, perplexities=perplexities)


def differentiable_layers(observation: Observation, plan: Plan, factors: Factors) -> dict[str, LayerScheme]:
    """The layers of `plan` with `factors` (source -> [channels]) instead of its own, which keep their gradients."""
    columns, rows = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for group in learnable(observation, plan):
        s = factors[group.source]
        if group.kind == "linear":
            rows[group.source] = s
        for reader in group.readers:
            columns[reader.name] = columns.get(reader.name, torch.ones(1)) * reader.columns(s)
    return {
        name: replace(layer, input_factor=columns.get(name), output_factor=rows.get(name))
        for name, layer in plan.layers().items()
    }


def _descend(
    observation: Observation, plan: Plan, batches: Sequence[Batch], *, rate: float, steps: int, quiet: bool
) -> dict[str, torch.Tensor]:
    """The factors of `plan` after `steps` of Adam, each on one of `batches`."""
    model, groups = observation.model, learnable(observation, plan)
    smallest = {group.source: smallest_factors(group, observation.absmax, model) for group in groups}
    first = {group.source: plan.smoothing.factors.get(group.source, torch.ones(group.channels)) for group in groups}
    logs = {source: s.log().requires_grad_() for source, s in first.items()}

    def factors() -> dict[str, torch.Tensor]:
        found = {}
        for group in groups:
            s = logs[group.source].exp().clamp(max=FACTOR_RANGE[1]).maximum(smallest[group.source])
            found[group.source] = torch.where(group.foldable, s, 1.0)
        return found

    optimizer = torch.optim.Adam(logs.values(), lr=rate, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    drawn = _drawn(batches, steps)
    with _frozen(model), tqdm(drawn, total=steps, desc="learn", unit="step", disable=True if quiet else None) as bar:
        for batch in bar:
            with torch.no_grad():
                exact = _log_probabilities(model, batch)
            layers = differentiable_layers(observation, plan, factors())
            with hooked(_hooks(observation, layers, len(input_ids(batch)))):
                loss = simulate.kl_divergence(exact, _log_probabilities(model, batch))
            optimizer.zero_grad()
            _backward(loss, observation)
            bar.set_postfix(kl=f"{loss.item():.3g}")
            optimizer.step()
            schedule.step()
    return {source: s.detach() for source, s in factors().items()}


def _backward(loss: torch.Tensor, observation: Observation) -> None:
    where, fix = f"{NAME}: {observation.source.name}", "use --alpha auto"
    if not math.isfinite(loss.item()):
        raise SmoothQuantError(where, "a finite KL of the rounded model", str(loss.item()), fix)
    if not loss.requires_grad:
        raise SmoothQuantError(where, "an output that depends on smoothing factors", "none that does", fix)
    try:
        loss.backward()
    except (RuntimeError, NotImplementedError) as error:  # of an operator of the model
        raise SmoothQuantError(where, "a model that passes gradients", error, fix) from error


def _drawn(batches: Sequence[Batch], steps: int) -> Iterator[Batch]:
    """`steps` of `batches`, each as often as the others, in an order that is the same in every run."""
    generator, order = random.Random(0), list[Batch]()
    for _ in range(steps):
        if not order:
            order = generator.sample(list(batches), len(batches))
        yield order.pop()


def _log_probabilities(model: nn.Module, batch: Batch) -> torch.Tensor:
    return forward(model, batch).logits.float().log_softmax(-1)


def _hooks(observation: Observation, layers: Mapping[str, LayerScheme], samples: int) -> Iterator[RemovableHandle]:
    """The hooks that let `layers` compute as served, with gradients. samples: in the batch."""

    def replaced(name: str, module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        x = simulate.by_sample(args[0], samples)
        return output(module, x, layers[name], observation.absmax[name]).reshape(y.shape)

    for name in layers:
        yield observation.model.get_submodule(name).register_forward_hook(partial(replaced, name))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, no parameter of `model` collects gradients."""
    with ExitStack() as restore:
        for parameter in model.parameters():
            restore.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield
