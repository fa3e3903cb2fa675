"""Routed experts in an observation: how many tokens each gets, and the ranges of those that get none."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..running.forward import forward
from ..running.hooks import hooked
from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic
from ..running.products import chosen_experts, expert_blocks

OUTPUT = ":output"  # after the name of a layer whose output is observed


def idle_experts(model: nn.Module, absmax: Mapping[str, torch.Tensor]) -> list[str]:
    """Layers of routed experts that no token reached."""
    blocks = expert_blocks(model).values()
    return [name for block in blocks for layers in block for name in layers if name not in absmax]


def with_idle_experts(model: nn.Module, absmax: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`absmax` and, for experts that no token reached, the maxima over the other experts of their block."""
    filled = dict(absmax)
    for block in expert_blocks(model).values():
        for same in zip(*block, strict=True):  # the same layer of each expert
            for suffix in ("", OUTPUT):
                known = [absmax[name + suffix] for name in same if name + suffix in absmax]
                if known:
                    union = torch.stack(known).amax(0)
                    filled |= {name + suffix: union for name in same if name + suffix not in absmax}
    return filled


def expert_load(model: nn.Module, input_ids: torch.Tensor) -> dict[str, list[int]]:
    """Block of experts -> the number of tokens of `input_ids` [samples, tokens] that each of its experts gets."""
    blocks, load = expert_blocks(model), dict[str, torch.Tensor]()

    def count(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        routed = torch.bincount(chosen_experts(args, kwargs).flatten(), minlength=len(blocks[name])).cpu()
        load[name] = load[name] + routed if name in load else routed

    def hooks() -> Iterator[RemovableHandle]:
        for name in blocks:
            yield model.get_submodule(name).register_forward_pre_hook(partial(count, name), with_kwargs=True)

    if blocks:
        decoder = decoder_of(model, blocks)
        with torch.no_grad(), fast_arithmetic(model), hooked(hooks()):
            forward(decoder, input_ids)
    return {name: counts.tolist() for name, counts in load.items()}
