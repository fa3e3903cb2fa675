"""Products with a parameter that no module wraps, routers and stacked experts, become linear layers.

    F.linear(x, self.weight)        a router                  self.weight becomes a Product of one layer
    F.linear(x, self.stack[e])      experts [E, out, in]      self.stack becomes an ExpertStack of E Products

The code of the model stays as it is: where it multiplies by the parameter, it meets the Product, which multiplies
(torch's protocol __torch_function__). A Product has one linear layer for each tensor that files on the hub have: two
for the gate and up projections of an expert, whose outputs it joins. Hooks, traces and new parameters then treat these
layers as any others. Their weights are views of the parameter, so that nothing is copied.

Which parameters are used in this way, and in this way only, is seen in one forward pass; no architecture is named.
Stacks that are stacked in files, too, stay parameters, because INT8 experts are stored one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.errors import SmoothQuantError

from .forward import forward
from .hooks import hooked
from .modules import own_parameters, plain_kernels

TOKENS = 8


class ProductLinear(nn.Linear):
    """A linear layer without bias, weight [out, in]; it multiplies in the dtype of its input, as routers do.

    file_name: its name in checkpoint files, without ".weight".
    """

    def __init__(self, weight: torch.Tensor, file_name: str) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.file_name = nn.Parameter(weight, requires_grad=False), file_name
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Product(nn.Module):
    """What stands for one matrix. layers: file name -> rows of the matrix."""

    def __init__(self, layers: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in layers.items():
            self.add_module(name.rpartition(".")[2], ProductLinear(weight, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [layer(x) for layer in self.children()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def type(self, dst_type: Any) -> "Product":
        """A router may convert its weight; the layer does so itself."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not nn.functional.linear or kwargs or len(args) < 2 or not isinstance(args[1], Product):
            return NotImplemented
        y = args[1](args[0])
        return y if len(args) < 3 or args[2] is None else y + args[2]


class ExpertStack(nn.Module):
    """The Products of one stacked parameter, by the number of the expert."""

    def __init__(self, experts: list[Product]) -> None:
        super().__init__()
        for index, product in enumerate(experts):
            self.add_module(str(index), product)

    def __getitem__(self, index: Any) -> nn.Module:
        return self.get_submodule(str(int(index)))

    def __len__(self) -> int:
        return len(self._modules)


def product_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the layers that stand for a parameter of `module`."""
    for child in module.children():
        if isinstance(child, Product | ExpertStack):
            yield from child.parameters()


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Name -> every ExpertStack of `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def expert_blocks(model: nn.Module) -> dict[str, list[list[str]]]:
    """Module that computes experts -> the linear layers of each of its experts."""
    blocks: dict[str, list[list[str]]] = {}
    for name, stack in expert_stacks(model).items():
        experts = blocks.setdefault(name.rpartition(".")[0], [[] for _ in range(len(stack))])
        for layers, (index, product) in zip(experts, stack.named_children(), strict=True):
            layers += [f"{name}.{index}.{part}" for part, _ in product.named_children()]
    return blocks


def expert_layers(model: nn.Module) -> set[str]:
    """The linear layers of all routed experts."""
    return {name for block in expert_blocks(model).values() for layers in block for name in layers}


def module_name(model: nn.Module, name: str) -> str | None:
    """transformers' own name of the linear layer `name`: of the module that has a router's weight; None for experts."""
    if not isinstance(model.get_submodule(name), ProductLinear):
        return name
    parameter = name.rpartition(".")[0]
    owner = parameter.rpartition(".")[0]
    return None if isinstance(model.get_submodule(owner), ExpertStack) else owner


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """While open, every expert runs on every token. Its output counts 0 where the router did not choose it.

    So that a short pass meets all experts, and computes the same function.
    """
    blocks = {name.rpartition(".")[0] for name in expert_stacks(model)}
    modules = [model.get_submodule(name) for name in blocks]
    with hooked(module.register_forward_pre_hook(_route_to_all, with_kwargs=True) for module in modules):
        yield


def chosen_experts(args: tuple, kwargs: dict) -> torch.Tensor:
    """int64 [tokens, choices]: of the arguments of a block of experts, the matrix of integers."""
    return _arguments(args, kwargs)[1]


def _arguments(args: tuple, kwargs: dict) -> tuple[Any, torch.Tensor, Any]:
    """(position or name of the chosen experts, these, position or name of their weights) in a call of a block."""
    values = {**dict(enumerate(args)), **kwargs}
    matrices = {key: v for key, v in values.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
    for index, chosen in matrices.items():
        for weights, real in matrices.items():
            if not chosen.is_floating_point() and real.is_floating_point() and real.shape == chosen.shape:
                return index, chosen, weights
    got = ", ".join(f"{key}: {list(v.shape)}" for key, v in matrices.items())
    fix = "add --ignore '*.experts.*', and report this architecture"
    raise SmoothQuantError("experts", "the chosen experts and their weights, [tokens, choices] each", got, fix)


def _route_to_all(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    count = min(len(stack) for stack in module.children() if isinstance(stack, ExpertStack))
    values = {**dict(enumerate(args)), **kwargs}
    index, chosen, weights = _arguments(args, kwargs)
    values[weights] = values[weights].new_zeros(len(chosen), count).scatter(1, chosen.long(), values[weights])
    values[index] = torch.arange(count, device=chosen.device).expand(len(chosen), count)
    return tuple(values[i] for i in range(len(args))), {key: values[key] for key in kwargs}


def make_linear(model: PreTrainedModel) -> None:
    """Replace the parameters of `model` that are only multiplied by; the model's function stays the same."""
    candidates = dict(_candidates(model))
    if not candidates:
        return
    probes = {}
    for key, (owner, name) in candidates.items():
        probes[key] = owner.__dict__[name] = _Probe(owner._parameters.pop(name))
    try:
        ids = torch.arange(2 * TOKENS, device=model.device).reshape(2, -1)
        with torch.no_grad(), plain_kernels(model):
            forward(model, ids)
    finally:
        for key, (owner, name) in candidates.items():
            del owner.__dict__[name]
            owner.register_parameter(name, probes[key].parameter)
    made = {
        key: products
        for key in candidates
        if probes[key].multiplied and not probes[key].other
        and (products := _products(model, key, probes[key].parameter)) is not None
    }  # fmt: skip
    lengths: dict[int, set[int]] = {}
    for key, products in made.items():
        if isinstance(products, ExpertStack):
            lengths.setdefault(id(candidates[key][0]), set()).add(len(products))
    for key, products in made.items():
        owner, name = candidates[key]
        if isinstance(products, ExpertStack) and len(lengths[id(owner)]) > 1:
            continue  # some of its experts lack a matrix
        del owner._parameters[name]
        owner.add_module(name, products)
    if expert_stacks(model):
        for module in model.modules():  # other implementations would read the stacked parameter
            if hasattr(getattr(module, "config", None), "_experts_implementation_internal"):
                module.config._experts_implementation_internal = "eager"


def _candidates(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Name -> (module, parameter) of each matrix, or stack of matrices, of a module that is none of torch's."""
    for prefix, module in model.named_modules():
        # A linear layer, an embedding, a convolution, or a subclass of one: what it computes is known.
        known = (cls for cls in type(module).__mro__ if cls is not nn.Module and cls.__module__.startswith("torch."))
        if any(known) or isinstance(module, Conv1D):
            continue
        for name, parameter in own_parameters(module).items():
            if parameter.dim() in (2, 3) and parameter.is_floating_point():
                yield f"{prefix}.{name}", (module, name)


def _products(model: PreTrainedModel, key: str, parameter: torch.Tensor) -> ExpertStack | Product | None:
    """What stands for the parameter `key`; None if checkpoint files do not store its matrices one by one."""
    parts = _file_rows(model, key, parameter)
    if parts is None:
        return None
    matrices = parameter.detach() if parameter.dim() == 3 else parameter.detach()[None]
    products = [
        Product({name: matrix[rows] for name, rows in files.items()})
        for matrix, files in zip(matrices, parts, strict=True)
    ]
    return ExpertStack(products) if parameter.dim() == 3 else products[0]


def _file_rows(model: PreTrainedModel, key: str, parameter: torch.Tensor) -> list[dict[str, slice]] | None:
    """For each matrix of the parameter `key`: its layers in checkpoint files -> the rows that they have, in order.

    transformers knows the names, and splits a tensor of row numbers as it would split the parameter. None if a file
    has rows of several matrices.
    """
    experts, rows = (1, len(parameter)) if parameter.dim() == 2 else parameter.shape[:2]
    numbers = torch.arange(experts * rows, dtype=torch.int32, device="cpu").reshape(*parameter.shape[:-1], 1)
    parts: list[dict[str, slice]] = [{} for _ in range(experts)]
    for name, values in revert_weight_conversion(model, {key: numbers}).items():
        first, last = int(values.min()), int(values.max())
        in_order = torch.equal(values.flatten(), torch.arange(first, last + 1, dtype=torch.int32, device="cpu"))
        if not in_order or last // rows != first // rows or not name.endswith(".weight"):
            return None
        parts[first // rows][name.removesuffix(".weight")] = slice(first % rows, last % rows + 1)
    if any(sum(part.stop - part.start for part in files.values()) != rows for files in parts):
        return None
    return [dict(sorted(files.items(), key=lambda item: item[1].start)) for files in parts]


def stored_experts(model: PreTrainedModel) -> set[str]:
    """Names in checkpoint files, without ".weight", of the matrices of stacked parameters of `model`.

    Also of a model on the meta device, which cannot run: whether these parameters are experts is not checked.
    """
    found = set()
    for key, (owner, name) in _candidates(model):
        if (parameter := own_parameters(owner)[name]).dim() == 3:
            found |= {file for files in _file_rows(model, key, parameter) or () for file in files}
    return found


class _Probe:
    """Stands for a parameter during one pass, and finds out what the code does with it."""

    def __init__(self, parameter: Any, of: "_Probe | None" = None) -> None:
        self.parameter, self.of = parameter, of or self
        self.multiplied = self.other = False

    def __getitem__(self, index: Any) -> Any:
        expert = self.parameter[index]
        if self.parameter.dim() == 3 and expert.dim() == 2:
            return _Probe(expert, self)
        self.of.other = True
        return expert

    def type(self, dtype: Any) -> "_Probe":
        return _Probe(self.parameter.type(dtype), self.of)

    def __getattr__(self, name: str) -> Any:
        self.of.other = True
        return getattr(self.parameter, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for i, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, _Probe):
                if func is nn.functional.linear and i == 1 and not kwargs and value.parameter.dim() == 2:
                    value.of.multiplied = True
                else:
                    value.of.other = True
        plain = [value.parameter if isinstance(value, _Probe) else value for value in args]
        return func(*plain, **{k: v.parameter if isinstance(v, _Probe) else v for k, v in kwargs.items()})


def _operator(name: str) -> Any:
    """An operator of Python, such as that of `1 - parameter`, which does not go through torch's protocol."""

    def apply(probe: _Probe, *others: Any) -> Any:
        probe.of.other = True
        return getattr(probe.parameter, name)(*others)

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg"):
    setattr(_Probe, f"__{_name}__", _operator(f"__{_name}__"))
