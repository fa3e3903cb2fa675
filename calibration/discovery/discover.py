"""Who reads what: the groups of linear layers that can share one smoothing scale, found by running the model once.

    source (a norm or a linear layer) ---> data movement, ReLU, attention weights ... ---> linear layers that read it

    source output / s,   reader columns * s    =>    the same function                   (Xiao et al. 2022, eq. 3)

`discover` follows each channel of each source through the operations of one short forward pass (labels.py) to the
inputs of linear layers. A channel is foldable when every operation that ever sees it carries its scale to a linear
layer that can multiply its columns by s; otherwise it keeps scale 1 and the Graph says which reader stood in the way.
So a fused or interleaved q/k/v, key-value heads shared by several query heads, parallel blocks and a norm with one
reader too many need no rule of their own, and there is no table of architectures.

The trace sees one sample. What a sample cannot show (a branch taken for other tokens, memory read behind torch's back)
is the gate's business (gate.py).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import own_parameters, plain_kernels
from .graph import Graph, Group, Linear, Reader, Refusal
from .probe import linear_transposed, norm_channels, norm_rules
from .rules import DEGREE
from .trace import Trace

# Samples and tokens of each: discovery needs the shape of the computation, not its statistics.
TRACE_SHAPE = (2, 16)


def discover(model: nn.Module, input_ids: torch.Tensor, keep: Collection[str] = ()) -> Graph:
    """Run `model(input_ids=...)` once and find its groups. Nothing of the model is changed.

    input_ids: int64 [batch, tokens]; one or two sequences of 8 to 16 tokens are enough (at least 2 tokens).
    keep: linear layers that stay in floating point. They may follow a scale, but no group is made for them alone.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        got = str(list(input_ids.shape))
        raise SmoothQuantError("discover", "input_ids [batch, tokens >= 2]", got, "pass a longer sample")
    watch = _Watch(model)
    was_training = model.training
    model.eval()
    try:
        with plain_kernels(model), torch.no_grad(), watch.hooks(), watch.trace:
            output = model(input_ids=input_ids, use_cache=False)
            watch.trace.pin_read(_tensors(output), "the model's output", "it leaves the model")
    finally:
        model.train(was_training)
    watch.finish()
    return watch.graph(frozenset(keep))


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(dict(tree) if isinstance(tree, dict) else tree)
    return [t for t in leaves if isinstance(t, torch.Tensor)]


def _span(columns: torch.Tensor) -> tuple[int, int]:
    """Smallest and largest label of a linear layer's input channels; (0, 0) if none carries one."""
    labels = columns[columns != 0] % DEGREE
    return (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)


def _keeps_shape(inputs: list[torch.Tensor], output: Any, channels: int) -> bool:
    """Whether a module made one tensor of one tensor of the same shape [..., channels]."""
    single = isinstance(output, torch.Tensor) and [t.shape for t in inputs] == [output.shape]
    return single and output.shape[-1] == channels


class _Watch:
    """Tells the trace which modules are opaque (linear layers, candidate norms); collects what linear layers read."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.transposed = {n: t for n, m in self.modules.items() if (t := linear_transposed(m)) is not None}
        self.norms = {n: c for n, m in self.modules.items() if n not in self.transposed and (c := norm_channels(m))}
        self.trace = Trace(model)
        self.ran: set[str] = set()
        self.inputs: dict[str, torch.Tensor] = {}  # linear -> labels of its input channels, [in_features]
        self.readers: list[list[str]] = []  # linears that read one tensor
        self.last_read: torch.Tensor | None = None  # held, so that its memory is not used again
        self.norm_shapes: dict[str, torch.Size] = {}
        self.owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in own_parameters(module).values():
                self.owners.setdefault(id(parameter), []).append(name)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.modules.items():
                # Last before forward and first after it: what other hooks do to the tensors is watched like any code.
                before = module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
                after = module.register_forward_hook(partial(self._after, name), with_kwargs=True, prepend=True)
                handles += [before, after]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = _tensors((args, kwargs))
        self.trace.seen(tensors)
        self.trace.path.append(name)
        self.trace.seen(tensors)
        self.ran.add(name)
        if name in self.transposed:
            self._read(name, tensors)
            self.trace.enter_opaque(name, own_parameters(module).values())
        elif name in self.norms:
            # Its statistics mix all channels, so no scale passes through it.
            self.trace.pin_read(tensors, name, "a norm of another layer's output")
            self.trace.enter_opaque(name, own_parameters(module).values())

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.trace.leave_opaque()
        inputs = _tensors((args, kwargs))
        if name in self.transposed and isinstance(output, torch.Tensor):
            self.trace.emit(name, output)
        elif name in self.norms and _keeps_shape(inputs, output, self.norms[name]):
            self.norm_shapes[name] = output.shape
            self.trace.emit(name, output)
        self.trace.seen(_tensors(output))
        self.trace.path.pop()
        self.trace.seen(_tensors(output))

    def _read(self, name: str, tensors: list[torch.Tensor]) -> None:
        x, *others = tensors
        self.trace.pin_read(others, name, "an argument beside the input")
        rows = self.trace.ids(x).reshape(-1, x.shape[-1])
        columns = rows[0]
        if not torch.equal(rows, columns.expand_as(rows)):
            self.trace.pin(rows, name, "its input channels come from different places at different positions")
            columns = torch.zeros_like(columns)
        columns = columns.cpu()
        if name not in self.inputs:
            last = self.last_read
            same = last is not None and last.shape == x.shape and last.data_ptr() == x.data_ptr()
            self.readers[-1].append(name) if same else self.readers.append([name])
        self.last_read = x
        known = self.inputs.setdefault(name, columns)
        if not torch.equal(known, columns):
            for ids in (known, columns):
                self.trace.pin(
                    torch.where(known != columns, ids, 0), name, "it runs more than once on different inputs"
                )

    # --- what only the whole trace shows ---

    def finish(self) -> None:
        """Pin what modules that did not run, shared parameters and unproven norms forbid."""
        for name, reason in self._bound_parameters():
            if name in self.trace.ledger.sources:
                self.trace.ledger.pin_source(name, name, reason)
            if name in self.inputs:
                self.trace.ledger.pin(self.inputs[name], name, reason)
        for name, module in self.modules.items():
            if name in self.ran or not own_parameters(module) or self._read_elsewhere(module):
                continue
            ancestor = name
            while ancestor not in self.ran:
                ancestor = ancestor.rpartition(".")[0]
            for source in sorted(self.trace.scopes.get(ancestor, ())):
                reason = f"it did not run on the sample, and {ancestor or 'the model'} could hand it this tensor"
                self.trace.ledger.pin_source(source, name, reason)
        self.rules = {}
        for name, shape in self.norm_shapes.items():
            rules = norm_rules(self.modules[name], shape)
            self.rules[name] = rules or {}
            if rules is None:
                reason = "its parameters are not proved to scale its output channel by channel"
                self.trace.ledger.pin_source(name, name, reason)

    def _bound_parameters(self) -> Iterator[tuple[str, str]]:
        """Opaque modules whose parameters somebody else reads too: they can neither scale rows nor columns."""
        for name in (*self.transposed, *self.norms):
            for parameter in own_parameters(self.modules[name]).values():
                others = [o for o in self.owners[id(parameter)] if o != name]
                if others:
                    yield name, f"its parameter is shared with {others[0]}"
                elif id(parameter) in self.trace.parameters_read:
                    yield name, f"its parameter is read by {self.trace.parameters_read[id(parameter)]}"

    def _read_elsewhere(self, module: nn.Module) -> bool:
        return any(
            id(p) in self.trace.parameters_read or any(o in self.ran for o in self.owners[id(p)])
            for p in own_parameters(module).values()
        )

    # --- the answer ---

    def graph(self, keep: frozenset[str]) -> Graph:
        """The Graph of everything that is not pinned."""
        ledger = self.trace.ledger
        groups, refusals = [], []
        covered = {name: torch.zeros(len(columns), dtype=torch.bool) for name, columns in self.inputs.items()}
        span = {n: _span(columns) for n, columns in self.inputs.items()}
        for source in ledger.sources.values():
            readers = []
            read = torch.zeros(source.channels, dtype=torch.bool)
            for name, columns in self.inputs.items():
                if span[name][1] < source.first or span[name][0] >= source.first + source.channels:
                    continue
                labels = columns % DEGREE - source.first
                ours = (columns != 0) & (labels >= 0) & (labels < source.channels)
                ours &= ~source.pinned[labels.clamp(0, source.channels - 1)]
                if ours.any():
                    channel_of = torch.where(ours, labels, -1)
                    power = torch.where(ours, columns // DEGREE + 1, 1)
                    readers.append(Reader(name, channel_of, power, self.transposed[name], name not in keep))
                    read[labels[ours]] = True
            refusals += [Refusal(source.name, *why, n, source.channels) for why, n in source.why.items()]
            if not readers:
                if not source.pinned.all():
                    nobody = "nothing reads it"
                    left = int((~source.pinned).sum())
                    refusals.append(Refusal(source.name, "no linear layer", nobody, left, source.channels))
            elif not any(r.quantized for r in readers):
                kept = "every reader stays in floating point"
                refusals.append(Refusal(source.name, readers[0].name, kept, int(read.sum()), source.channels))
            else:
                kind = "linear" if source.name in self.transposed else "norm"
                rules = self.rules.get(source.name, {})
                groups.append(Group(source.name, kind, rules, source.channels, read, tuple(readers)))
                for r in readers:
                    covered[r.name] |= r.channel_of >= 0
        linears = tuple(self._linear(name, covered[name]) for name in self.inputs)
        return Graph(tuple(groups), tuple(refusals), linears, tuple(map(tuple, self.readers)))

    def _linear(self, name: str, covered: torch.Tensor) -> Linear:
        weight = own_parameters(self.modules[name])["weight"]
        transposed = self.transposed[name]
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        return Linear(name, in_features, out_features, transposed, int((~covered).sum()))
