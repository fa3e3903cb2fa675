"""Which linear layers become INT8, and why each of the others stays in floating point.

The choice has two steps. `choose_linears` needs only the model, so that a wrong --ignore is refused at once.
`choose_layers` also needs the graph of a short pass: it shows which layers text reaches, and which read one tensor.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import nn

from vllm_smoothquant.format.config import ABSORBED
from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import LINEAR_TYPES, output_head, own_parameters, weight_shape
from ..running.products import ProductLinear, expert_blocks, expert_layers
from .graph import Graph

# Smaller layers (a gate of one output) are cheap in floating point, and vLLM keeps them there.
SMALLEST = 16
REQUESTED = "asked for by --ignore"
SMALL = "its shape {} x {} has a side of less than {}"
FUSED = "vLLM computes it as one layer with {}, which --ignore names"
NO_TEXT = "text does not reach it"
ROUTER = "vLLM computes what routes tokens in floating point"
# Last part of a layer's name -> why vLLM needs it in floating point, in every architecture that has such a layer.
FLOAT_IN_VLLM = {
    ABSORBED: "vLLM's attention (MLA) multiplies it into other matrices, in floating point",
    "gate": "vLLM routes tokens to experts in floating point",
    "router": "vLLM routes tokens to experts in floating point",
    "shared_expert_gate": "vLLM computes the gate of shared experts in floating point",
}
# A child module that only such a mixer has -> why vLLM needs all its layers in floating point.
FLOAT_MIXERS = {"x_proj": "vLLM's Mamba-1 mixer has no quantised layers"}


def choose_linears(
    model: nn.Module, ignore: frozenset[str], *, lm_head: bool = False
) -> tuple[list[str], dict[str, str]]:
    """(names to quantise in module order, name -> reason of every linear layer or other matrix that stays as it is).

    ignore: names, globs such as "*.layers.0.*", or "re:" and a regular expression that matches the start of a name.
    lm_head: quantise the output head as well. Errors (SmoothQuantError): a pattern of `ignore` that fits no linear
    layer; `lm_head` with a head that cannot be quantised; nothing left to quantise.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES)}
    ignored = {name for pattern in sorted(ignore) for name in _matching(pattern, linears)}
    head, body = output_head(model), set(getattr(model, "base_model", model).modules())
    experts = expert_layers(model)
    mixers = {name: why for child, why in FLOAT_MIXERS.items() for name in _parents_of(linears, child)}
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def reason(name: str, module: nn.Module) -> str | None:
        shape, (parent, _, last) = weight_shape(module), name.rpartition(".")
        if name in ignored:
            return REQUESTED
        if module is head and not lm_head:
            return "language-model head"
        if module is not head and module not in body:
            return "a head of the model, which vLLM computes in floating point"
        if isinstance(module, ProductLinear) and name not in experts:
            return ROUTER
        if owners[id(module.weight)] > 1:
            return "its weight is shared with another module"
        if min(shape) < SMALLEST:
            return SMALL.format(*shape, SMALLEST)
        return FLOAT_IN_VLLM.get(last) or mixers.get(parent)

    in_float = {name: why for name, m in linears.items() if (why := reason(name, m)) is not None}
    # vLLM may build as a linear layer what transformers does not: the router of a mixture of experts.
    for name, module in model.named_modules():
        matrix = own_parameters(module).get("weight")
        if matrix is not None and matrix.dim() == 2 and not isinstance(module, (*LINEAR_TYPES, nn.Embedding)):
            in_float[name] = f"a matrix of {type(module).__name__}, which is no linear layer here"
    if lm_head and not any(m is head and name not in in_float for name, m in linears.items()):
        why = next((in_float[name] for name, m in linears.items() if m is head), "it is no linear layer")
        raise SmoothQuantError("--quantize-lm-head", "a head that can be INT8", why, "leave it out")
    return _layers(model, linears, in_float), in_float


def choose_layers(
    model: nn.Module, graph: Graph, ignore: frozenset[str], *, lm_head: bool = False
) -> tuple[list[str], dict[str, str]]:
    """`choose_linears`, and two more kinds stay in floating point: towers, and what vLLM fuses with an ignored layer.

    graph: of a pass over text. A tower is a part of the model that this pass did not run (vision, audio).
    """
    names, in_float = choose_linears(model, ignore, lm_head=lm_head)
    ran = {linear.name for linear in graph.linears}
    in_float |= {name: NO_TEXT for name in names if name not in ran and not _branch(name, ran)}
    blocks = [[name for layers in block for name in layers] for block in expert_blocks(model).values()]
    for fused in (*fused_layers(graph), *blocks):
        asked = [name for name in fused if in_float.get(name) == REQUESTED]
        if asked:
            in_float = {name: FUSED.format(asked[0]) for name in fused if name not in in_float} | in_float
    return _layers(model, names, in_float), in_float


def fused_layers(graph: Graph) -> list[tuple[str, ...]]:
    """Layers that vLLM computes as one, as far as a model shows it: siblings in one module that read one tensor."""
    sets: dict[tuple[int, str], list[str]] = {}
    for index, names in enumerate(graph.shared_input_groups):
        for name in names:
            sets.setdefault((index, name.rpartition(".")[0]), []).append(name)
    return [tuple(names) for names in sets.values() if len(names) > 1]


def _branch(name: str, ran: Collection[str]) -> bool:
    """Whether layer `name` is in one of several modules of a list (an expert) and the same layer of another ran."""
    parts = name.split(".")
    siblings = [(parts[:i], parts[i + 1 :]) for i, part in enumerate(parts) if part.isdigit()]
    others = [other.split(".") for other in ran]
    return any(o[: len(a)] == a and o[len(a) + 1 :] == b for a, b in siblings for o in others)


def _parents_of(names: Collection[str], child: str) -> list[str]:
    return [name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == child]


def _layers(model: nn.Module, names: Collection[str], in_float: Mapping[str, str]) -> list[str]:
    layers = [name for name in names if name not in in_float]
    if not layers:
        reasons = "; ".join(f"{count} x {why}" for why, count in Counter(in_float.values()).most_common(3))
        raise SmoothQuantError(
            type(model).__name__, "linear layers to quantise", reasons or "none", "check the model and --ignore"
        )
    return layers


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    where, rule = f"--ignore {pattern}", pattern.removeprefix("re:")
    try:
        fits = re.compile(rule).match if rule != pattern else lambda name: fnmatchcase(name, pattern)
    except re.error as error:
        raise SmoothQuantError(where, "a regular expression", error, "correct it") from error
    found = [name for name in names if fits(name)]
    if not found:
        last = pattern.rsplit(".", 1)[-1]
        similar = [name for name in names if name.endswith(last)] or list(names)
        expected = f"a linear layer such as {', '.join(similar[:1])}"
        raise SmoothQuantError(where, expected, "no such layer", "spell the module's full name, or use * or re:")
    return found


def with_own_input(model: nn.Module, layers: Collection[str]) -> set[str]:
    """Those of `layers` that can divide their input while serving: no experts, because vLLM gives a block one input."""
    return set(layers) - expert_layers(model)
