"""The sums that GPTQ needs of the inputs of linear layers, computed one decoder block at a time.

    H = sum over calibration tokens of x^T x        float32 [in, in]; its diagonal shows how large each input is

The inputs of a block are those that it gets after the blocks before it were rounded, so that it corrects their errors
as far as it can; inside a block, layers that run later see unrounded ones. Each block runs twice over all samples,
first for these sums, then, rounded, for the input of the next block; more often, if MAX_BYTES do not hold its matrices.
Memory: these, and two outputs of every sample.

Where the blocks of a model cannot run isolated (observation/blocks.py), one pass over the floating-point model sums the
matrices of as many layers as fit into memory.

A layer that met fewer tokens than it has inputs, as an expert may, knows nothing of some directions. The missing share
of its median diagonal is added to the diagonal: GPTQ then rounds as if inputs were independent, the more the less it
knows.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..observation.blocks import BlockNotIsolated, Blocks, run, try_whole
from ..observation.observation import Observation
from ..running.hooks import hooked
from ..running.modules import decoder_of, weight_shape
from ..running.precision import fast_arithmetic

MAX_BYTES = 2 * 2**30
BATCH_SIZE = 4


class Hessians:
    """layers: those that will be asked for, in this order. max_bytes: of the matrices of one pass without blocks."""

    def __init__(self, observation: Observation, layers: Sequence[str], max_bytes: int = MAX_BYTES) -> None:
        self.model, self.batches = observation.model, observation.samples.batches(BATCH_SIZE)
        self.layers, self.max_bytes = list(layers), max_bytes
        # Layers that read one tensor share a matrix.
        groups = observation.graph.shared_input_groups
        self.owner = {name: next((g[0] for g in groups if name in g), name) for name in layers}
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.decoder = decoder_of(self.model, layers)
        self.blocks: Blocks | None = None
        with suppress(BlockNotIsolated):
            trial = text = try_whole(self.model, self.decoder, [], self.batches[0])
            if observation.samples.images:
                text = try_whole(self.model, self.decoder, [], self.batches[-1])
            self.blocks = Blocks(self.model, self.decoder, trial, trial.towers(text))
        self.index, self.inputs = 0, list[torch.Tensor | None]([None] * len(self.batches))
        self.rounded: dict[str, torch.Tensor] = {}

    def of(self, name: str) -> torch.Tensor:
        """float32 [in, in] of the input of layer `name`, not smoothed."""
        if self.owner[name] not in self.sums:
            try:
                self._next_block(name)
            except BlockNotIsolated:
                self.blocks = None
            if self.owner[name] not in self.sums:
                self._whole(self.layers.index(name))
        total, tokens = self.sums[self.owner[name]], self.tokens[self.owner[name]]
        if tokens >= len(total):
            return total
        median = float(total.diagonal().median()) if tokens else 1.0
        return total + (1 - tokens / len(total)) * median * torch.eye(len(total), device=total.device)

    def round(self, name: str, weight: torch.Tensor) -> None:
        """Tell that layer `name` was rounded to `weight`, float32 [out, in] for its input as the model computes it."""
        if self.blocks is not None:
            self.rounded[name] = weight

    def _next_block(self, name: str) -> None:
        """Sum for the layers of the block of `name`, after all blocks before it."""
        if self.blocks is None:
            return
        while self.index < len(self.blocks.names):
            inside = self.blocks.layers(self.index, self.layers)
            if name in inside:
                start = inside.index(name)
                with hooked(self._watching(self._fitting(inside[start:] + inside[:start]))):
                    self._run_block()
                return
            with hooked(self._rounding()):
                self.inputs = list(self._run_block())
            self.index += 1
            self.rounded, self.sums, self.tokens = {}, {}, {}

    def _run_block(self) -> list[torch.Tensor]:
        assert self.blocks is not None
        with torch.inference_mode(), self.blocks.isolated(self.index) as block:
            return [block(batch, x)[0].clone() for batch, x in zip(self.batches, self.inputs, strict=True)]

    def _whole(self, first: int) -> None:
        """Sum for as many layers from number `first` on as fit into memory."""
        names = self._fitting(self.layers[first:])
        with torch.inference_mode(), fast_arithmetic(self.model), hooked(self._watching(names)):
            for batch in self.batches:
                run(self.decoder, batch)

    def _fitting(self, layers: Sequence[str]) -> list[str]:
        """The owners of the first of `layers` whose matrices fit into max_bytes, at least of one."""
        names: dict[str, int] = {}
        for name in layers:
            names.setdefault(self.owner[name], 4 * weight_shape(self.model.get_submodule(name))[1] ** 2)
            if len(names) > 1 and sum(names.values()) > self.max_bytes:
                names.pop(self.owner[name])
                break
        return list(names)

    def _watching(self, names: Sequence[str]) -> Iterator[RemovableHandle]:
        sizes = {name: weight_shape(self.model.get_submodule(name))[1] for name in names}
        self.sums = {name: torch.zeros(size, size) for name, size in sizes.items()}
        self.tokens = dict.fromkeys(names, 0)

        def add(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            self.sums[name] = self.sums[name].to(x.device).addmm_(x.t(), x)
            self.tokens[name] += len(x)

        for name in names:
            yield self.model.get_submodule(name).register_forward_pre_hook(partial(add, name))

    def _rounding(self) -> Iterator[RemovableHandle]:
        def replace(weight: torch.Tensor, module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.float()
            return nn.functional.linear(args[0].float(), weight.to(y.device), bias).to(y.dtype)

        for name, weight in self.rounded.items():
            yield self.model.get_submodule(name).register_forward_hook(partial(replace, weight))
