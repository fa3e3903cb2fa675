"""Observe a model one decoder block at a time: each block over all samples, before the next one is looked at.

    x_0 = embed(tokens)          x_(i+1) = block_i(x_i)         absmax of what is read in block i: from block_i alone

Only one block's weights are worked with at a time, and only one block's activations are kept (activations.py). A model
whose weights lie in files larger than memory is read once, not once for every batch, and a run that was interrupted
goes on behind the last finished block.

There is no table of architectures. A block runs inside the model's own forward pass, in which the other blocks hand on
what they get and the one before gives what it gave when it was its turn: so masks, positions and whatever else the
model computes beside the blocks are right for each of them. Which list holds the blocks, and that they can be run
alone, is seen on the first batch: it goes through the whole model as well, and every absmax and the final output must
be the same, bit for bit. Where they are not, NotAlone says why, and the caller runs whole-model passes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic, fast_block
from .absmax import watching_absmax

Absmax = dict[str, torch.Tensor]


class BlockNotIsolated(Exception):
    """The blocks of this model cannot be run alone; the text says why."""


@dataclass(frozen=True)
class Trial:
    """The first batch through the whole model. absmax: of each watched layer; output: what the decoder gave.

    blocks: name -> whether it gave one tensor, or a tuple of this many, in the order they ran; empty if there is no
    list of modules that ran once each, one after the other.
    """

    absmax: Absmax
    output: list[torch.Tensor]
    blocks: dict[str, int | None]


def try_whole(model: nn.Module, decoder: nn.Module, names: Sequence[str], batch: torch.Tensor) -> Trial:
    """Run `decoder` (the model or a part of it) on `batch`, int64 [samples, tokens], watching the layers `names`."""
    lists = {
        f"{prefix}.{index}": prefix
        for prefix, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    }
    ran: list[str] = []
    gave: dict[str, int | None] = {}

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        ran.append(name)
        gave[name] = len(output) if isinstance(output, tuple) else None

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in lists]
    try:
        with fast_arithmetic(model), watching_absmax(model, names) as absmax:
            output = run(decoder, batch)
    finally:
        for handle in handles:
            handle.remove()
    largest: list[str] = []
    size = 0
    for prefix in dict.fromkeys(lists.values()):
        inside = [name for name in lists if lists[name] == prefix]
        weights = sum(p.numel() for name in inside for p in model.get_submodule(name).parameters())
        if weights > size:
            largest, size = inside, weights
    once = [name for name in ran if name in largest] == largest
    return Trial({n: t.clone() for n, t in absmax.items()}, output, {n: gave[n] for n in largest} if once else {})


def run(decoder: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """The floating-point tensors that `decoder` gives for `batch`."""
    output = decoder(input_ids=batch.to(next(decoder.parameters()).device), use_cache=False)
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


class Blocks:
    """The blocks of `decoder` as `trial` saw them run. names: theirs, in order."""

    def __init__(self, model: nn.Module, decoder: nn.Module, trial: Trial) -> None:
        """Errors (NotAlone): there is no such list."""
        if not trial.blocks:
            raise BlockNotIsolated("no list of blocks runs once from its first to its last")
        self.model, self.decoder, self.trial = model, decoder, trial
        self.names = list(trial.blocks)
        self.modules = [model.get_submodule(name) for name in self.names]
        self.around = decoder_of(model, self.names)  # the head is not run for each block

    def layers(self, index: int, names: Sequence[str]) -> list[str]:
        """Those of `names` in block `index`; for the index one behind the last, those in none."""

        def block(name: str) -> int:
            return next((i for i, b in enumerate(self.names) if name == b or name.startswith(f"{b}.")), len(self.names))

        return [name for name in names if block(name) == index]

    @contextmanager
    def alone(self, index: int) -> Iterator["IsolatedBlock"]:
        """While open, passes run block `index` alone; for the index one behind the last, none of the blocks."""
        alone = IsolatedBlock(self, index)
        block = self.modules[index] if index < len(self.modules) else nn.Module()
        before = [module.__dict__.get("forward") for module in self.modules]
        handle = block.register_forward_hook(alone.catch)
        try:
            for i, module in enumerate(self.modules):
                if i != index:
                    stand_in = alone.feed if i == index - 1 else bypass
                    module.forward = partial(stand_in, self.trial.blocks[self.names[i]])
            with fast_arithmetic(self.model, without=self.modules), fast_block(self.model, block):
                yield alone
        finally:
            handle.remove()
            for module, forward in zip(self.modules, before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:  # accelerate's, which moves tensors to the block's device
                    module.forward = forward


class IsolatedBlock:
    """One block, or what comes behind the last, that can be run on batch after batch."""

    def __init__(self, blocks: Blocks, index: int) -> None:
        self.blocks, self.index = blocks, index
        self.input: torch.Tensor | None = None
        self.output: torch.Tensor | None = None

    def __call__(self, batch: torch.Tensor, x: torch.Tensor | None) -> list[torch.Tensor]:
        """What the block makes of `x`, which the one before it made of `batch`; x is None for the first block.

        Behind the last block it is what the decoder gives. Errors (NotAlone): it cannot be run like this.
        """
        self.input, self.output = x, None
        try:
            given = run(self.blocks.decoder if self.behind else self.blocks.around, batch)
        except (TypeError, LookupError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise BlockNotIsolated(f"{self.name}: {type(error).__name__} when run alone") from error
        if self.behind:
            return given
        if self.output is None:
            raise BlockNotIsolated(f"{self.name}: gives no tensor")
        return [self.output]

    @property
    def name(self) -> str:
        return "behind the last block" if self.behind else self.blocks.names[self.index]

    @property
    def behind(self) -> bool:
        return self.index == len(self.blocks.names)

    def catch(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.output = first if isinstance(first, torch.Tensor) else None

    def feed(self, gives: int | None, *args: Any, **kwargs: Any) -> Any:
        """In place of the block before: what it gave when it was its turn."""
        assert self.input is not None
        return _shaped(self.input.to(_hidden(args, kwargs).device), gives)

    def check(self, given: list[torch.Tensor], absmax: Absmax) -> None:
        """NotAlone where the first batch did not come out as in the whole model."""
        for name, value in absmax.items():
            if name not in self.blocks.trial.absmax or not torch.equal(value, self.blocks.trial.absmax[name]):
                raise BlockNotIsolated(f"{self.name}: run alone, {name} sees another input")
        whole = self.blocks.trial.output
        same = len(given) == len(whole) and all(torch.equal(a, b) for a, b in zip(given, whole, strict=True))
        if self.behind and not same:
            raise BlockNotIsolated("block by block, the model gives another output")


def bypass(gives: int | None, *args: Any, **kwargs: Any) -> Any:
    """In place of a block that is not to run."""
    return _shaped(_hidden(args, kwargs), gives)


def _hidden(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _shaped(x: torch.Tensor, gives: int | None) -> Any:
    return x if gives is None else (x, *([None] * (gives - 1)))
