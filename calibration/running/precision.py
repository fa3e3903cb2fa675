"""In which floating-point arithmetic a model runs, whatever dtype it is stored in.

Parameters become float32 one decoder block at a time, while it runs; afterwards the model is what it was, bit for bit.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .hooks import hooked
from .modules import decoder_blocks, float_parameters, own_parameters

Parameters = dict[str, torch.Tensor]

# 16-bit dtype -> whether this CPU multiplies it natively. Emulated, it is many times slower than float32.
_NATIVE_ON_CPU: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The model's own dtype, or float32 where this CPU can only emulate it."""
    parameter = next(model.parameters())
    return parameter.dtype if is_native(parameter.dtype, parameter.device.type) else torch.float32


def is_native(dtype: torch.dtype, device: str) -> bool:
    """Whether `device` ("cpu", "cuda") multiplies matrices of `dtype` in hardware."""
    return device != "cpu" or _NATIVE_ON_CPU.get(dtype, lambda: True)()


def fast_arithmetic(model: nn.Module, without: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
    """While open, `model` computes in compute_dtype(model), but for the modules `without` and what is in them."""
    if compute_dtype(model) == next(model.parameters()).dtype:
        return nullcontext()
    return in_float32(model, partial(plain_parameters, model), without)


@contextmanager
def fast_block(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """While open, `block` of `model` computes as fast_arithmetic has it: converted once for any number of runs."""
    tensors: list[torch.Tensor] = []
    if compute_dtype(model) != next(model.parameters()).dtype:
        tensors = [t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.data = old


def plain_parameters(model: nn.Module, name: str) -> Parameters:
    """The own parameters of module `name` in float32."""
    return float_parameters(model.get_submodule(name))


@contextmanager
def in_float32(
    model: nn.Module, change: Callable[[str], Parameters], without: Collection[nn.Module] = ()
) -> Iterator[None]:
    """While a module runs, its own parameters are `change(name)` and its own floating-point buffers float32.

    What is in the modules `without` stays as it is. A table of embeddings stays as well, and what is looked up becomes
    float32: the table can be larger than any block. A decoder block (an element of a ModuleList) changes as a whole:
    code within it may look at its siblings' dtype.
    """
    swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
    active: set[str] = set()
    calls: list[tuple[int, list[str]]] = []

    def enter(inside: list[str], module: nn.Module, args: Any) -> None:
        fresh = [name for name in inside if name not in active]
        calls.append((len(swapped), fresh))
        active.update(fresh)
        for name in fresh:
            owner = model.get_submodule(name)
            new = change(name)
            for parameter, tensor in own_parameters(owner).items():
                swap(tensor, new[parameter])
            for buffer in owner.buffers(recurse=False):
                swap(buffer, buffer.float() if buffer.is_floating_point() else buffer)

    def swap(tensor: torch.Tensor, new: torch.Tensor) -> None:
        swapped.append((tensor, tensor.data))
        tensor.data = new

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mark, fresh = calls.pop()
        active.difference_update(fresh)
        undo(mark)

    def undo(mark: int) -> None:
        while len(swapped) > mark:
            tensor, old = swapped.pop()
            tensor.data = old

    def widen(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    untouched = {id(module) for root in without for module in root.modules()}

    def handles() -> Iterator[RemovableHandle]:
        for name, inside in _units(model).items():
            module = model.get_submodule(name)
            if id(module) in untouched:
                continue
            if type(module).forward is nn.Embedding.forward and module.max_norm is None:
                yield module.register_forward_hook(widen, prepend=True)
                continue
            yield module.register_forward_pre_hook(partial(enter, inside), prepend=True)
            yield module.register_forward_hook(leave)

    try:
        with hooked(handles()):
            yield
    finally:
        undo(0)


def _units(model: nn.Module) -> dict[str, list[str]]:
    """Module -> modules with own parameters or buffers that change while it runs: itself or a whole decoder block."""
    units: dict[str, list[str]] = {}
    blocks = decoder_blocks(model)
    for name, module in model.named_modules():
        inside = module.named_modules(prefix=name) if name in blocks else [(name, module)]
        own = [n for n, m in inside if own_parameters(m) or next(m.buffers(recurse=False), None) is not None]
        if own:
            units[name] = own
    return units
