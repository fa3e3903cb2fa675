from collections import Counter

from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import LINEAR_TYPES, output_head, own_parameters, weight_shape

# CUTLASS and oneDNN want input and output sizes in multiples of 16. A smaller layer (a router, a gate of one output)
# is cheap in floating point, and vLLM keeps it there too.
SIZE_MULTIPLE = 16


def choose_linears(
    model: nn.Module, ignore: frozenset[str], *, lm_head: bool = False
) -> tuple[list[str], dict[str, str]]:
    """(names to quantise in module order, name -> reason of every linear layer or other matrix that stays as it is).

    lm_head: quantise the output head as well. Errors (SmoothQuantError): a name in `ignore` that is no linear layer;
    `lm_head` with a head that cannot be quantised; nothing left to quantise.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES)}
    for name in sorted(ignore - linears.keys()):
        similar = [n for n in linears if n.endswith(name.rsplit(".", 1)[-1])] or list(linears)
        expected = f"a linear layer such as {', '.join(similar[:1])}"
        raise SmoothQuantError(f"--ignore {name}", expected, "no such layer", "spell the module's full name")
    head = output_head(model)
    # Prefixes of mixture-of-experts blocks: the parents of modules that stack their matrices in one 3-D parameter.
    stacked = [name for name, m in model.named_modules() if any(p.dim() >= 3 for p in m.parameters(recurse=False))]
    experts = tuple({name.rpartition(".")[0] + "." for name in stacked if "." in name})
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def reason(name: str, module: nn.Module) -> str | None:
        out_features, in_features = weight_shape(module)
        if name in ignore:
            return "asked for by --ignore"
        if module is head and not lm_head:
            return "language-model head"
        if name.startswith(experts):
            return "in a mixture-of-experts block"
        if owners[id(module.weight)] > 1:
            return "its weight is shared with another module"
        if out_features % SIZE_MULTIPLE or in_features % SIZE_MULTIPLE:
            return f"its shape {out_features} x {in_features} is not in multiples of {SIZE_MULTIPLE}"
        return None

    in_float = {name: why for name, m in linears.items() if (why := reason(name, m)) is not None}
    # vLLM may build as a linear layer what transformers does not: the router of a mixture of experts.
    for name, module in model.named_modules():
        matrix = own_parameters(module).get("weight")
        if matrix is not None and matrix.dim() == 2 and not isinstance(module, (*LINEAR_TYPES, nn.Embedding)):
            in_float[name] = f"a matrix of {type(module).__name__}, which is no linear layer here"
    layers = [name for name in linears if name not in in_float]
    if lm_head and not any(linears[name] is head for name in layers):
        why = next(
            (why for name, why in in_float.items() if name in linears and linears[name] is head),
            "it is no linear layer",
        )
        raise SmoothQuantError("--quantize-lm-head", "a head that can be INT8", why, "leave it out")
    if not layers:
        raise SmoothQuantError(
            type(model).__name__, "linear layers to quantise", "none", "check the model and --ignore"
        )
    return layers, in_float
