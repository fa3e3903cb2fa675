"""Run a model in another floating-point arithmetic than the dtype in which it is stored.

Parameters become float32 one decoder block at a time, while it runs, and those outside of blocks while a module above
them runs; afterwards the model is the same, bit for bit.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .hooks import hooked
from .modules import ancestors, decoder_blocks, float_parameters, own_parameters

Parameters = dict[str, torch.Tensor]


def _mkldnn_has(operator: str) -> bool:
    """What this operator of MKL-DNN answers. A torch without MKL-DNN has none, and emulates."""
    return bool(getattr(torch.ops.mkldnn, operator, lambda: False)())


# 16-bit dtype -> whether this CPU multiplies it natively. Emulated, it is many times slower than float32.
_NATIVE_ON_CPU: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: partial(_mkldnn_has, "_is_mkldnn_bf16_supported"),
    torch.float16: partial(_mkldnn_has, "_is_mkldnn_fp16_supported"),
}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The model's own dtype, or float32 where this CPU can only emulate it."""
    parameter = next(model.parameters())
    return parameter.dtype if is_native(parameter.dtype, parameter.device.type) else torch.float32


def is_native(dtype: torch.dtype, device: str) -> bool:
    """Whether `device` ("cpu", "cuda") multiplies matrices of `dtype` in hardware."""
    return device != "cpu" or _NATIVE_ON_CPU.get(dtype, lambda: True)()


def fast_arithmetic(model: nn.Module, without: Collection[nn.Module] = ()) -> AbstractContextManager[None]:
    """While open, `model` computes in compute_dtype(model), except for the modules `without` and their children."""
    if compute_dtype(model) == next(model.parameters()).dtype:
        return nullcontext()
    return in_float32(model, partial(plain_parameters, model), without)


@contextmanager
def fast_block(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """fast_arithmetic for one `block` of `model`: its tensors are converted once for any number of runs."""
    with whole_in_float32(block) if compute_dtype(model) != next(model.parameters()).dtype else nullcontext():
        yield


@contextmanager
def whole_in_float32(module: nn.Module) -> Iterator[None]:
    """While open, all parameters and floating-point buffers of `module` are float32, in memory at once."""
    with ExitStack() as restore:
        for tensor in (*module.parameters(), *module.buffers()):
            _replace(tensor, tensor.data.float() if tensor.is_floating_point() else tensor.data, restore)
        yield


def plain_parameters(model: nn.Module, name: str) -> Parameters:
    """The own parameters of module `name` in float32."""
    return float_parameters(model.get_submodule(name))


@contextmanager
def in_float32(
    model: nn.Module, change: Callable[[str], Parameters], without: Collection[nn.Module] = ()
) -> Iterator[None]:
    """While a module runs, its parameters are `change(name)` and its floating-point buffers float32.

    The modules `without` and their children stay as they are. An embedding table stays as well, because it can be
    larger than any block; its output becomes float32. A module changes as a whole, because its code may look at the
    dtype of a part (Mamba rounds the last hidden states to that of its head), but for the decoder blocks below it
    (elements of a ModuleList), which change one after the other, because together they may not fit into memory.
    """
    changed: set[str] = set()
    calls: list[ExitStack] = []  # of the running modules; closing one restores what its module changed

    def enter(inside: list[str], module: nn.Module, args: Any) -> None:
        restore = ExitStack()
        calls.append(restore)
        for name in inside:
            if name in changed:
                continue
            changed.add(name)
            restore.callback(changed.discard, name)
            owner, parameters = model.get_submodule(name), change(name)
            for key, parameter in own_parameters(owner).items():
                _replace(parameter, parameters[key], restore)
            for buffer in _own_buffers(owner):
                _replace(buffer, buffer.float() if buffer.is_floating_point() else buffer, restore)

    def leave(*_: Any) -> None:
        calls.pop().close()

    def widen(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    def handles() -> Iterator[RemovableHandle]:
        unchanged = {module for root in without for module in root.modules()}
        for name, inside in _units(model, unchanged).items():
            module = model.get_submodule(name)
            yield module.register_forward_pre_hook(partial(enter, inside), prepend=True)
            yield module.register_forward_hook(leave)
        for module in model.modules():
            if stays(module) and module not in unchanged:
                yield module.register_forward_hook(widen, prepend=True)

    try:
        with hooked(handles()):
            yield
    finally:
        while calls:  # a module raised an error
            leave()


def stays(module: nn.Module) -> bool:
    """Whether `in_float32` leaves the table of an embedding as it is."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None


def _replace(tensor: torch.Tensor, new: torch.Tensor, restore: ExitStack) -> None:
    """Let `tensor` have the data of `new` until `restore` is closed."""
    restore.callback(setattr, tensor, "data", tensor.data)
    tensor.data = new


def _units(model: nn.Module, unchanged: Collection[nn.Module]) -> dict[str, list[str]]:
    """Module -> the modules that change while it runs, those of them that have parameters or buffers of their own."""
    blocks = decoder_blocks(model)
    units: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if module in unchanged or not (own_parameters(module) or _own_buffers(module)):
            continue
        above = [name, *reversed(ancestors(name))]
        block = max((i for i, unit in enumerate(above) if unit in blocks), default=None)
        if block is None and stays(module):
            continue
        for unit in above if block is None else above[: block + 1]:
            units.setdefault(unit, []).append(name)
    return units


def _own_buffers(module: nn.Module) -> list[torch.Tensor]:
    return list(module.buffers(recurse=False))
