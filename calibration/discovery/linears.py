from torch import nn

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import LINEAR_TYPES, weight_shape

# CUTLASS and oneDNN want input and output sizes in multiples of 16; what is smaller (a router, a gate of one output)
# is cheap in floating point, and vLLM keeps it there too.
SIZE_MULTIPLE = 16


def choose_linears(
    model: nn.Module, ignore: frozenset[str], *, lm_head: bool = False
) -> tuple[list[str], dict[str, str]]:
    """(names to quantise in module order, name -> reason of every linear layer or other matrix that stays as it is).

    lm_head: quantise the output head as well. Errors (SmoothQuantError): a name in `ignore` that is no linear layer;
    a head that cannot be quantised although asked for; nothing left to quantise.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES)}
    for name in sorted(ignore - linears.keys()):
        close = [n for n in linears if n.endswith(name.rsplit(".", 1)[-1])][:1] or list(linears)[:1]
        raise SmoothQuantError(
            f"--ignore {name}",
            f"a linear layer such as {', '.join(close)}",
            "no such layer",
            "spell the module's full name",
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    experts = _expert_blocks(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def reason(name: str, module: nn.Module) -> str | None:
        out_features, in_features = weight_shape(module)
        if name in ignore:
            return "asked for by --ignore"
        if module is head and not lm_head:
            return "language-model head"
        if any(name.startswith(block) for block in experts):
            return "in a mixture-of-experts block"
        if owners[id(module.weight)] > 1:
            return "its weight is shared with another module"
        if out_features % SIZE_MULTIPLE or in_features % SIZE_MULTIPLE:
            return f"its shape {out_features} x {in_features} is not in multiples of {SIZE_MULTIPLE}"
        return None

    kept = {name: why for name, m in linears.items() if (why := reason(name, m)) is not None}
    # vLLM may build as a linear layer what transformers does not: the router of a mixture of experts.
    for name, module in model.named_modules():
        matrix = dict(module.named_parameters(recurse=False)).get("weight")
        if matrix is not None and matrix.dim() == 2 and not isinstance(module, (*LINEAR_TYPES, nn.Embedding)):
            kept[name] = f"a matrix of {type(module).__name__}, which is no linear layer here"
    chosen = [name for name in linears if name not in kept]
    if lm_head and not any(linears[name] is head for name in chosen):
        why = next((why for name, why in kept.items() if linears[name] is head), "it is no linear layer")
        raise SmoothQuantError("--quantize-lm-head", "a head that can be INT8", why, "leave it out")
    if not chosen:
        raise SmoothQuantError(
            type(model).__name__, "linear layers to quantise", "none", "check the model and --ignore"
        )
    return chosen, kept


def _expert_blocks(model: nn.Module) -> list[str]:
    """Prefixes of mixture-of-experts blocks: the parents of modules that stack their matrices in one 3-D parameter."""
    stacked = {n for n, m in model.named_modules() if any(p.dim() >= 3 for p in m.parameters(recurse=False))}
    return sorted({name.rpartition(".")[0] + "." for name in stacked if "." in name})
