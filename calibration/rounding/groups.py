"""Which layers get 4-bit weights, and in groups of how many inputs; the others get 8 bits, with the reason.

Kernels take groups of 128, 64 or 32 inputs, all of one size. A layer whose inputs the requested size does not divide
gets the next smaller one, because a smaller group only costs memory for scales. Routed experts have one size, because
vLLM computes those of a block at once.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import REORDERED, InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.int4 import GROUP_SIZES

from ..running.modules import output_head, weight_shape
from ..running.products import ProductLinear, expert_stacks

# What a layer has that cannot have 4 bits, or that leaves them.
EIGHT_BITS = Scheme(Weights(), InputActivations())


def schemes_of(model: nn.Module, names: Iterable[str], scheme: Scheme) -> dict[str, tuple[Scheme, str | None]]:
    """Layer -> (its scheme in a model that is served by `scheme`, the reason why it has 8 bits or None)."""
    if scheme.weights.group_size is None:
        return dict.fromkeys(names, (scheme, None))
    stacks = expert_stacks(model).values()
    experts = {weight_shape(linear)[1] for stack in stacks for linear in stack[0].children()}
    return {name: _scheme_of(model, name, scheme, experts) for name in names}


def group_size(inputs: Iterable[int], largest: int) -> int | None:
    """The largest size of groups up to `largest` that divides all of `inputs`; None if none does."""
    sizes = [size for size in GROUP_SIZES if size <= largest and not any(count % size for count in inputs)]
    return sizes[0] if sizes else None


def eight_bits(model: nn.Module, layers: Iterable[str], scheme: Scheme) -> dict[str, str]:
    """Layer -> why it gets 8 bits where `scheme` has 4. Errors (SmoothQuantError): all of `layers` do."""
    schemes = schemes_of(model, layers, scheme)
    found = {name: reason for name, (_, reason) in schemes.items() if reason is not None}
    if found and len(found) == len(schemes):
        name, reason = next(iter(found.items()))
        raise SmoothQuantError("--bits 4", "a layer that can have 4 bits", f"none: {name}: {reason}", "use --bits 8")
    return found


def _scheme_of(model: nn.Module, name: str, scheme: Scheme, experts: Collection[int]) -> tuple[Scheme, str | None]:
    """experts: the numbers of inputs that layers of routed experts have, which get groups of one size."""
    linear, largest = model.get_submodule(name), scheme.weights.group_size
    assert largest is not None
    if reason := _why_eight_bits(model, name, linear):
        return EIGHT_BITS, reason
    inputs = experts if isinstance(linear, ProductLinear) else [weight_shape(linear)[1]]
    size = group_size(inputs, largest)
    if size is None:
        return EIGHT_BITS, f"{' or '.join(map(str, sorted(inputs)))} inputs are not groups of {GROUP_SIZES[-1]}"
    return replace(scheme, weights=replace(scheme.weights, group_size=size)), None


def _why_eight_bits(model: nn.Module, name: str, linear: nn.Module) -> str | None:
    if linear is output_head(model):
        return "it is the output head"
    if isinstance(linear, Conv1D):
        return "vLLM's loader of this architecture transposes its weight"
    config = getattr(model, "config", None)
    if name.rpartition(".")[2] == REORDERED.get(getattr(config, "model_type", "")):
        return "vLLM's loader of this architecture reorders its rows"
    return None
