"""Parts of a model: its decoder, its blocks, its output head, the parameters of a module."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def decoder_of(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The smallest part of `model` that takes input_ids and contains the layers `names`: with or without its head."""
    decoder: nn.Module = getattr(model, "base_model", model)
    inside = set(decoder.modules())
    return decoder if all(model.get_submodule(name) in inside for name in names) else model


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every element of a ModuleList or ModuleDict, in the model's order: decoder blocks above all."""
    return {
        f"{prefix}.{key}": block
        for prefix, container in model.named_modules()
        if isinstance(container, CONTAINERS)
        for key, block in container.named_children()
        if not isinstance(block, CONTAINERS)
    }


def block_of(name: str) -> str:
    """The decoder block that contains the module or tensor `name`: "model.layers.3"; "" if it is in no block."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else ""


def ancestors(name: str) -> list[str]:
    """The modules that contain the module or tensor `name`, the model ("") first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))] if name else []


def output_head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Run attention and experts as plain matmuls and softmaxes, which a trace can read and float32 can run."""
    with ExitStack() as stack, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for config in (module.config for module in model.modules() if hasattr(module, "config")):
            for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
                if (value := getattr(config, name, None)) is not None:
                    stack.callback(setattr, config, name, value)
                    setattr(config, name, "eager")
        yield


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on `module` itself, not on its children."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def float_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """own_parameters, the floating-point ones in float32; those that are in float32 already are not copied."""
    return {
        name: p.detach().to(torch.float32) if p.is_floating_point() else p.detach()
        for name, p in own_parameters(module).items()
    }


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features); Conv1D keeps its weight as [in, out]."""
    rows, columns = linear.get_parameter("weight").shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
