"""Models that are larger than the accelerator: the weights that accelerate offloaded, as real tensors of the CPU.

What transformers and accelerate leave behind (transformers/integrations/accelerate.py, accelerate/big_modeling.py,
accelerate/hooks.py). A device map gives every module a device, "cpu" or "disk". The main device is one that is neither,
or the CPU. `dispatch_model` hooks each module on "disk", and beside an accelerator also each one on "cpu". Its
AlignDevicesHook has `offload=True`, an `execution_device` (the main device), and as `weights_map` a PrefixedDataset
over the OffloadedWeightsLoader of the model, which has two parts:

    state_dict    name -> tensor of each module on "cpu" beside an accelerator, as from_pretrained loaded it
    index         name -> {"safetensors_file", "weight_name", "dtype"} of each tensor on "disk". The file is the
                  model's, or one in `offload_folder` for what no safetensors file of the model has as it is: stacked
                  experts and the tensors of .bin files

Outside forward, the module's parameters are on the meta device. Each forward replaces them by new Parameters, and two
modules that share a parameter may get two of them. Buffers stay on the execution device.

What changes here. Discovery, float32, factors and export need one Parameter with values and a constant identity.
`take_over` therefore replaces each meta parameter once, by a Parameter of the CPU, and ends the offloading of the
hooks; they still send the inputs to the execution device. Tensors on "disk" stay in files that are mapped into memory,
so that the system can take their memory back. If the execution device is not the CPU, the `data` of the parameters is
a copy there while their module runs.
"""

import difflib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, update_wrapper
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import nn
from torch.utils._mode_utils import no_dispatch
from transformers import PreTrainedModel

from vllm_smoothquant.format.errors import SmoothQuantError

from .modules import ancestors, block_of, own_parameters
from .products import product_parameters

CPU = torch.device("cpu")
MAP = "--device-map"
MORE_ROOM = "set TMPDIR to a folder with more room"

Device = str | int  # "cpu", "disk", "cuda:1", or the number of an accelerator


def check_devices(devices: Iterable[Device]) -> None:
    """SmoothQuantError: this machine does not have one of `devices`."""
    accelerator = torch.accelerator.current_accelerator()
    here = ["cpu", "disk", *(f"{accelerator}:{i}" for i in range(torch.accelerator.device_count()))]
    known = {*here, *range(len(here) - 2), *([str(accelerator)] if len(here) > 2 else [])}
    for device in devices:
        if device not in known:
            raise SmoothQuantError(MAP, f"a device of this machine: {', '.join(here)}", str(device), "choose another")


def complete_map(model: PreTrainedModel, device_map: Mapping[str, Device]) -> dict[str, Device]:
    """`device_map` with one key for each tensor of `model`, which may be on the meta device.

    Of two keys that name a tensor, the longer one decides; accelerate fails if that one says "disk". A tied parameter
    goes where the parameter goes that it is tied to, because they are one tensor.
    Errors (SmoothQuantError): a key that is no module, a tensor without a device.
    """
    modules = [name for name, _ in model.named_modules()]
    for key in device_map:
        if key not in modules:
            similar = difflib.get_close_matches(key, modules, 1) or modules[-1:]
            raise SmoothQuantError(f"{MAP}: {key}", f"a module such as {similar[0]}", "none", "correct the name")
    devices = dict(device_map)
    for tied, source in model.all_tied_weights_keys.items():
        if (device := _device_of(source, devices)) is not None and device != _device_of(tied, devices):
            devices[tied.rpartition(".")[0]] = device
    divided = {ancestor for key in devices for ancestor in ancestors(key)}
    complete = {key: device for key, device in devices.items() if key not in divided}
    stored = model.state_dict()
    for tensor in (*stored, *dict(model.named_buffers())):
        device = _device_of(tensor, devices)
        if device is not None:
            complete[next(name for name in (*ancestors(tensor), tensor) if name not in divided)] = device
        elif tensor in stored:
            raise SmoothQuantError(MAP, f"a device for {tensor}", "none", 'add its module, or "" for all others')
    return complete


def _device_of(name: str, devices: Mapping[str, Device]) -> Device | None:
    """What the longest key of `devices` for the module or tensor `name` says."""
    return next((devices[key] for key in (name, *reversed(ancestors(name))) if key in devices), None)


def offload_folder() -> tempfile.TemporaryDirectory:
    """A folder for the files that from_pretrained writes; it can go after `take_over`.

    In TMPDIR, or else in /var/tmp, because /tmp may be in memory.
    """
    parent = "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="smoothquant-offload-", dir=parent, ignore_cleanup_errors=True)


def take_over(model: PreTrainedModel, folder: Path) -> None:
    """Give every offloaded parameter of `model` its values on the CPU, in a Parameter that forward does not replace.

    folder: the offload_folder of from_pretrained; the mapped files stay readable when it is removed. Parameters that
    were shared are shared again. Hooks are removed if every module runs on the CPU.
    Errors (SmoothQuantError): a tensor without values or of another shape; no room in `folder`.
    """
    hooks = [(name, hook) for name, module in model.named_modules() for hook in _device_hooks(module)]
    offloaded = [(name, hook) for name, hook in hooks if hook.offload]
    for name, hook in offloaded:
        module = model.get_submodule(name)
        for key, empty in own_parameters(module).items():
            values = _values(model, hook, key, empty, folder) if empty.is_meta else None
            if values is not None:
                module.register_parameter(key, nn.Parameter(values, requires_grad=empty.requires_grad))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise _fault(name, "values on a device", "none: accelerate offloaded it without a place to read it from")
    if not offloaded:
        return
    # By transformers' rule: of two tied parameters with values, only equal ones are one parameter.
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    for _, hook in offloaded:
        hook.offload, hook.weights_map, hook.io_same_device = False, None, True
    if all(torch.device(hook.execution_device) == CPU for _, hook in hooks):
        remove_hook_from_module(model, recurse=True)
        vars(model).pop("hf_device_map", None)  # it says "disk", and save_pretrained would look for files
        return
    _move_while_running(model, {name: torch.device(hook.execution_device) for name, hook in offloaded})


def _device_hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """accelerate's hooks of `module` itself that know where it runs."""
    hook = getattr(module, "_hf_hook", None)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook) and each.execution_device is not None:
            yield each


def _values(
    model: PreTrainedModel, hook: AlignDevicesHook, name: str, empty: nn.Parameter, folder: Path
) -> torch.Tensor | None:
    """The values of the meta parameter `empty` on the CPU; None if `hook` has none. name: in the module of `hook`."""
    weights = hook.weights_map
    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, weights.prefix + name
    on_disk = weights.index.get(name) if isinstance(weights, OffloadedWeightsLoader) else None
    if on_disk is None or name in weights.state_dict:
        return weights.get(name)
    file = Path(on_disk["safetensors_file"])
    with safe_open(file, "pt") as tensors:
        value = tensors.get_tensor(on_disk["weight_name"])  # mapped, not read
    if value.shape != empty.shape:
        raise _fault(name, f"shape {list(empty.shape)}", str(list(value.shape)))
    # The index has the dtype before transformers' exceptions for parameters that stay in float32.
    plan = model._get_dtype_plan(empty.dtype).items()
    dtype = next((dtype for glob, dtype in plan if re.search(glob.replace("*", ".*"), name)), empty.dtype)
    return value if file.parent != folder and value.dtype == dtype else mapped(value.to(dtype), folder)


def mapped(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy of `tensor` in a mapped file.

    It begins a page, as a tensor in memory begins a cache line. In safetensors files tensors begin at any eighth byte,
    and the alignment of a matrix may decide the order of a sum.
    """
    if not tensor.numel():
        return tensor
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            return torch.from_file(file.name, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    except OSError as error:
        raise SmoothQuantError(str(folder), "room for the offloaded weights", error, MORE_ROOM) from error


def _move_while_running(model: nn.Module, devices: dict[str, torch.device]) -> None:
    """Let the parameters of each module in `devices` be on its device while it runs.

    A decoder block moves as a whole, because hooks in it may read the weights of its other modules (search.py), and it
    moves inside its forward, because a bypassed block (blocks.py) has another forward and must not move. Outside the
    blocks the call of a module moves its parameters, so that all its hooks see them there.
    """
    units: dict[str, list[tuple[nn.Module, torch.device]]] = {}
    for name, device in devices.items():
        module = model.get_submodule(name)
        module._compiled_call_impl = partial(_run_moved, [(module, device)], module._call_impl)
        units.setdefault(block_of(name), []).append((module, device))
    for name in units.keys() - {""}:
        block = model.get_submodule(name)
        forward = block.forward
        block.forward = update_wrapper(partial(_run_moved, units[name], forward), forward)


def _run_moved(
    modules: Sequence[tuple[nn.Module, torch.device]], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`run` with the own parameters of `modules` on their devices; after it, their data is what it was.

    The linear layers that stand for a parameter of a module (products.py) belong to it.
    """
    with ExitStack() as restore:
        for module, device in modules:
            for parameter in (*own_parameters(module).values(), *product_parameters(module)):
                with no_dispatch():  # a trace would take the copy for a use of the parameter
                    data = parameter.data
                    restore.callback(setattr, parameter, "data", data)
                    parameter.data = data.to(device)
        return run(*args, **kwargs)


def _fault(name: str, expected: str, got: str) -> SmoothQuantError:
    return SmoothQuantError(name, expected, got, "use a complete checkpoint, or another --device-map")
