"""Which layers get 4-bit weights, and in groups of how many inputs; the others get 8 bits, with the reason.

Kernels take groups of 128, 64 or 32 inputs, all of one size. A layer whose inputs the requested size does not divide
gets the next smaller one, because a smaller group only costs memory for scales.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import REORDERED, InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.int4 import GROUP_SIZES

from ..running.modules import output_head, weight_shape
from ..running.products import ProductLinear

# What a layer has that cannot have 4 bits, or that leaves them.
EIGHT_BITS = Scheme(Weights(), InputActivations())


def scheme_of(model: nn.Module, name: str, scheme: Scheme) -> tuple[Scheme, str | None]:
    """(the scheme of layer `name` in a model that is served by `scheme`, the reason why it has 8 bits or None)."""
    requested, linear = scheme.weights.group_size, model.get_submodule(name)
    if requested is None:
        return scheme, None
    in_features = weight_shape(linear)[1]
    sizes = [size for size in GROUP_SIZES if size <= requested and in_features % size == 0]
    if reason := _why_eight_bits(model, name, linear):
        return EIGHT_BITS, reason
    if not sizes:
        return EIGHT_BITS, f"{in_features} inputs are not groups of {GROUP_SIZES[-1]}"
    return replace(scheme, weights=replace(scheme.weights, group_size=sizes[0])), None


def eight_bits(model: nn.Module, layers: Iterable[str], scheme: Scheme) -> dict[str, str]:
    """Layer -> why it gets 8 bits where `scheme` has 4. Errors (SmoothQuantError): all of `layers` do."""
    schemes = {name: scheme_of(model, name, scheme) for name in layers}
    found = {name: reason for name, (_, reason) in schemes.items() if reason is not None}
    if found and len(found) == len(schemes):
        name, reason = next(iter(found.items()))
        raise SmoothQuantError("--bits 4", "a layer that can have 4 bits", f"none: {name}: {reason}", "use --bits 8")
    return found


def _why_eight_bits(model: nn.Module, name: str, linear: nn.Module) -> str | None:
    if linear is output_head(model):
        return "it is the output head"
    if isinstance(linear, ProductLinear):
        return "it is an expert, for which no kernel with 4 bits is used"
    if isinstance(linear, Conv1D):
        return "vLLM's loader of this architecture transposes its weight"
    config = getattr(model, "config", None)
    if name.rpartition(".")[2] == REORDERED.get(getattr(config, "model_type", "")):
        return "vLLM's loader of this architecture reorders its rows"
    return None
