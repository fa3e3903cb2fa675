"""Observe a model one decoder block at a time: all samples pass one block before the next block runs.

    x_0 = embed(tokens)          x_(i+1) = block_i(x_i)         the absmax inside block i needs only block_i and x_i

Only one block's weights are in use at a time, and only the outputs of that block and the previous one are stored
(block_outputs.py). A model whose weight files are larger than memory is read once, not once for every batch. An
interrupted run resumes after the last finished block.

There is no table of architectures. A block runs inside the model's own forward pass: all other blocks are bypassed, and
the previous one is replaced by its recorded output. Therefore masks, positions and all else that the model computes
outside the blocks are right for each block. The first batch also passes the whole model: this shows which list holds
the blocks, and every absmax and the final output must be equal, bit for bit. If they are not, BlockNotIsolated gives
the reason, and the caller runs the whole model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ..running.forward import Batch, forward
from ..running.hooks import hooked
from ..running.modules import decoder_blocks, decoder_of
from ..running.precision import fast_arithmetic, fast_block
from .absmax import watching_absmax
from .saved import Absmax


class BlockNotIsolated(Exception):
    """The blocks of this model cannot run isolated; the text gives the reason."""


@dataclass(frozen=True)
class Trial:
    """The first batch in the whole model. absmax: of each observed layer. output: what the decoder returned.

    blocks: name of each block in running order -> None if it returned one tensor, else the length of its tuple. Empty
    if there is no list of modules that ran once each, one after the other. ran: names of all modules that ran.
    """

    absmax: Absmax
    output: list[torch.Tensor]
    blocks: dict[str, int | None]
    ran: frozenset[str] = frozenset()

    def towers(self, text: "Trial") -> list[str]:
        """The largest modules that ran here and did not run in the trial `text`: what reads images."""
        return [name for name in sorted(self.ran - text.ran) if name.rpartition(".")[0] in text.ran]


def try_whole(model: nn.Module, decoder: nn.Module, names: Sequence[str], batch: Batch) -> Trial:
    """Run `decoder` (the model or a part of it) on `batch` and observe the layers `names`."""
    blocks = decoder_blocks(model)
    order: list[str] = []
    ran: list[str] = []
    lengths: dict[str, int | None] = {}

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        order.append(name)
        lengths[name] = len(output) if isinstance(output, tuple) else None

    def handles() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, block in blocks.items():
            yield block.register_forward_hook(partial(hook, name))

    with hooked(handles()), fast_arithmetic(model), watching_absmax(model, names) as absmax:
        output = run(decoder, batch)
    lists: dict[str, list[str]] = {}
    for name in blocks:
        lists.setdefault(name.rpartition(".")[0], []).append(name)

    def parameters(names: list[str]) -> int:
        return sum(parameter.numel() for name in names for parameter in blocks[name].parameters())

    largest = max(lists.values(), key=parameters, default=[])  # the decoder's list of blocks
    once = [name for name in order if name in largest] == largest
    inside = {n: lengths[n] for n in largest} if once else {}
    return Trial({n: t.clone() for n, t in absmax.items()}, output, inside, frozenset(ran))


def run(decoder: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The floating-point tensors that `decoder` returns for `batch`."""
    output = forward(decoder, batch)
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


class Blocks:
    """The blocks of `decoder` that `trial` recorded. names: of the blocks, in running order.

    towers: modules that run once for each batch and then return the same again.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, trial: Trial, towers: Iterable[str] = ()) -> None:
        """Errors (BlockNotIsolated): `trial` recorded no list of blocks."""
        if not trial.blocks:
            raise BlockNotIsolated("no list of blocks runs once from its first to its last")
        self.model, self.decoder, self.trial = model, decoder, trial
        self.names = list(trial.blocks)
        self.modules = [model.get_submodule(name) for name in self.names]
        self.body = decoder_of(model, self.names)  # without the head, which need not run for each block
        self.towers = {name: model.get_submodule(name) for name in towers}
        self.returned: dict[tuple[int, str, int], Any] = {}  # batch, tower, number of its call -> what it returned

    def layers(self, index: int, names: Iterable[str]) -> list[str]:
        """The layers of `names` that are in block `index`; for the index after the last block, those in no block."""
        prefixes = tuple(f"{block}." for block in self.names[index : index + 1] or self.names)
        return [name for name in names if f"{name}.".startswith(prefixes) == (index < len(self.names))]

    @contextmanager
    def isolated(self, index: int) -> Iterator["IsolatedBlock"]:
        """While open, a pass runs block `index` only; for the index after the last block, no block at all."""
        isolated = IsolatedBlock(self, index)
        block = self.modules[index] if index < len(self.modules) else nn.Module()
        replaced = [*self.modules, *self.towers.values()]
        forwards = [module.__dict__.get("forward") for module in replaced]
        try:
            for i, module in enumerate(self.modules):
                if i != index:
                    stand_in = isolated.replay if i == index - 1 else bypass
                    module.forward = partial(stand_in, self.trial.blocks[self.names[i]])
            for name, tower in self.towers.items():
                tower.forward = partial(isolated.once, name, tower.forward)
            with (
                hooked([block.register_forward_hook(isolated.catch)]),
                fast_arithmetic(self.model, without=self.modules),
                fast_block(self.model, block),
            ):
                yield isolated
        finally:
            for module, forward in zip(replaced, forwards, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:  # accelerate's, which moves tensors to the block's device
                    module.forward = forward


class IsolatedBlock:
    """One block, or what follows the last block; it can run on any number of batches."""

    def __init__(self, blocks: Blocks, index: int) -> None:
        self.blocks, self.index = blocks, index
        self.input: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self.batch, self.calls = 0, Counter[str]()

    def __call__(self, batch: Batch, x: torch.Tensor | None) -> list[torch.Tensor]:
        """What the block returns for `batch`; what the decoder returns after the last block.

        x: the previous block's output for `batch`, None for the first block.
        Errors (BlockNotIsolated): the block cannot run isolated.
        """
        self.input, self.output = x, None
        self.batch, self.calls = id(batch), Counter()
        try:
            returned = run(self.blocks.decoder if self.after_last else self.blocks.body, batch)
        except (TypeError, LookupError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise BlockNotIsolated(f"{self.name}: {type(error).__name__} when it runs isolated") from error
        if self.after_last:
            return returned
        if self.output is None:
            raise BlockNotIsolated(f"{self.name}: returns no tensor")
        return [self.output]

    @property
    def name(self) -> str:
        return "after the last block" if self.after_last else self.blocks.names[self.index]

    @property
    def after_last(self) -> bool:
        return self.index == len(self.blocks.names)

    def catch(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.output = first if isinstance(first, torch.Tensor) else None

    def replay(self, length: int | None, *args: Any, **kwargs: Any) -> Any:
        """The forward of the previous block: it returns its recorded output."""
        assert self.input is not None
        return _packed(self.input.to(_hidden(args, kwargs).device), length)

    def once(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a tower: what it returned for this batch when a block before this one ran."""
        key = (self.batch, name, self.calls[name])
        self.calls[name] += 1
        if key not in self.blocks.returned:
            self.blocks.returned[key] = forward(*args, **kwargs)
        # Containers are copied at both ends, because models replace entries of what a tower returned.
        self.blocks.returned[key] = tree_map(lambda leaf: leaf, self.blocks.returned[key])
        return tree_map(lambda leaf: leaf, self.blocks.returned[key])

    def check(self, returned: list[torch.Tensor], absmax: Absmax) -> None:
        """BlockNotIsolated if the first batch gave anything else than in the whole model."""
        trial = self.blocks.trial
        for name in (*absmax, *self.blocks.layers(self.index, trial.absmax)):
            isolated, whole = absmax.get(name), trial.absmax.get(name)
            if isolated is None or whole is None or not torch.equal(isolated, whole):
                raise BlockNotIsolated(f"{self.name}: isolated, {name} gets another input")
        same = len(returned) == len(trial.output) and all(map(torch.equal, returned, trial.output))
        if self.after_last and not same:
            raise BlockNotIsolated("block by block, the model returns another output")


def bypass(length: int | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that must not run: it returns its input."""
    return _packed(_hidden(args, kwargs), length)


def _hidden(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _packed(x: torch.Tensor, length: int | None) -> Any:
    return x if length is None else (x, *([None] * (length - 1)))
