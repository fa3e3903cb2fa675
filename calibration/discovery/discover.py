"""Find the groups of linear layers that can share one smoothing factor, by running the model once.

    source (a norm or a linear layer) ---> data movement, ReLU, attention weights ... ---> linear layers that read it

    source output / s,   reader columns * s    =>    the same function                   (Xiao et al. 2022, eq. 3)

How. The trace (trace.py) follows each channel of each source through the operations of one short forward pass. Hooks on
every module give it two facts: linear layers and norms are opaque, and their outputs are sources. At the input of a
linear layer the labels are read: they say which channel of which source is behind each input channel.

What can be folded. A channel is foldable if every operation that reads it carries its scale to a linear layer that can
multiply its columns by s. All other channels keep scale 1, and the Graph names the reader that forbids the fold.
Fused or interleaved q/k/v, key-value heads that several query heads share, parallel blocks, and a norm that a router
reads as well therefore need no rule of their own, and there is no table of architectures.

What one sample cannot show. A branch that is taken for other tokens, or memory that is read without torch, is found by
the gate (smoothing/gate.py).

Example. A norm of 128 channels is read by q, k and v: each of the three inputs has the norm's labels in their order, so
they become one group of three readers with 128 foldable channels. If code also computes x[..., :4].mean(-1), the rules
pin channels 0 to 3: 124 channels are folded, and a Refusal names the module, the operation and 4 of 128 channels.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.hooks import hooked
from ..running.modules import output_head, own_parameters, plain_kernels
from .graph import Graph, Group, Linear, Reader, Refusal
from .probe import linear_transposed, norm_channels, norm_rules
from .rules import DEGREE
from .trace import Trace, tensors_of

# Samples and tokens of each: discovery needs the shape of the computation, not its statistics.
TRACE_SHAPE = (2, 16)
# What the output head reads also leaves the model, although no forward pass shows that.
HIDDEN_STATES, LEAVE = "the hidden states", "drafts, poolers and reward heads read them, too"


def discover(model: nn.Module, input_ids: torch.Tensor, keep: Collection[str] = ()) -> Graph:
    """Run `model(input_ids=...)` once and find its groups. Nothing of the model is changed.

    input_ids: int64 [batch, tokens]; one or two sequences of 8 to 16 tokens are enough (at least 2 tokens).
    keep: linear layers that stay in floating point (Graph.keeping).
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        shape = str(list(input_ids.shape))
        raise SmoothQuantError("discover", "input_ids [batch, tokens >= 2]", shape, "pass a longer sample")
    recorder = _Recorder(model)
    training = model.training
    model.eval()
    try:
        with plain_kernels(model), torch.no_grad(), hooked(recorder.hooks()), recorder.trace:
            output = model(input_ids=input_ids, use_cache=False)
            recorder.trace.pin_read(output, "the model's output", "it leaves the model")
    finally:
        model.train(training)
    recorder.pin_modules()
    return recorder.graph().keeping(keep)


class _Recorder:
    """The hooks of one discovery: they guide the trace and record the input labels of linear layers.

    transposed: linear layer -> weight is [in, out]. norms: candidate norm -> channels. executed: modules that ran.
    input_labels: linear layer -> labels of its input channels, int64 [in_features]. shared_inputs: each tensor that
    linear layers read, as long as nothing changes it, and these layers. norm_shapes: norm that is a source -> shape of
    its output. owners: id of a parameter -> modules. decoder, head: the model without its output head, and this head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.transposed = {n: t for n, m in self.modules.items() if (t := linear_transposed(m)) is not None}
        self.norms = {n: c for n, m in self.modules.items() if n not in self.transposed and (c := norm_channels(m))}
        self.trace = Trace(model)
        self.executed: set[str] = set()
        self.input_labels: dict[str, torch.Tensor] = {}
        # The tensors are stored, because the memory of a freed tensor is used again.
        self.shared_inputs: list[tuple[torch.Tensor, int, list[str]]] = []
        self.norm_shapes: dict[str, torch.Size] = {}
        self.norm_rules: dict[str, dict[str, str]] = {}
        self.owners: dict[int, list[str]] = {}
        self.decoder, self.head = getattr(model, "base_model", model), output_head(model)
        for name, module in self.modules.items():
            for parameter in own_parameters(module).values():
                self.owners.setdefault(id(parameter), []).append(name)

    def hooks(self) -> Iterator[RemovableHandle]:
        for name, module in self.modules.items():
            # Last before forward and first after it, so that the trace follows what other hooks do to the tensors.
            yield module.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True)
            yield module.register_forward_hook(partial(self.leave, name), with_kwargs=True, prepend=True)

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = tensors_of((args, kwargs))
        self.trace.expose(tensors)
        self.trace.path.append(name)
        self.trace.expose(tensors)
        self.executed.add(name)
        if name in self.transposed:
            self.read(name, *tensors)
            if module is self.head:
                self.trace.pin_read(tensors, HIDDEN_STATES, LEAVE)
        elif name in self.norms:
            # Its statistics mix all channels, so no scale passes through it.
            self.trace.pin_read(tensors, name, "a norm of another layer's output")
        else:
            return
        self.trace.opaque_parameters = set(map(id, own_parameters(module).values()))

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.trace.opaque_parameters = None
        if isinstance(output, torch.Tensor):
            # A norm makes one tensor of one tensor of the same shape.
            shapes = [tensor.shape for tensor in tensors_of((args, kwargs))]
            is_norm = name in self.norms and shapes == [output.shape] and output.shape[-1] == self.norms[name]
            if is_norm:
                self.norm_shapes[name] = output.shape
            if is_norm or name in self.transposed:
                self.trace.emit(name, output)
        tensors = tensors_of(output)
        self.trace.expose(tensors)
        self.trace.path.pop()
        self.trace.expose(tensors)
        if module is self.decoder:
            self.trace.pin_read(tensors, HIDDEN_STATES, LEAVE)

    def read(self, name: str, x: torch.Tensor, *others: torch.Tensor) -> None:
        """Record the labels of the input channels of linear layer `name`: those of x [..., in_features]."""
        self.trace.pin_read(others, name, "an argument beside the input")
        rows = self.trace.ids(x).reshape(-1, x.shape[-1])
        columns = rows[0]
        if not torch.equal(rows, columns.expand_as(rows)):
            self.trace.pin(rows, name, "its input channels come from different places at different positions")
            columns = torch.zeros_like(columns)
        columns = columns.cpu()
        if name not in self.input_labels:
            self.names_of_readers(x).append(name)
        first_columns = self.input_labels.setdefault(name, columns)
        different = torch.stack([first_columns, columns])[:, first_columns != columns]
        self.trace.pin(different, name, "it runs more than once on different inputs")

    def names_of_readers(self, x: torch.Tensor) -> list[str]:
        """The linear layers that read x so far: the same memory in the same layout, not changed since."""
        for seen, version, names in self.shared_inputs:
            same_memory = seen.data_ptr() == x.data_ptr() and seen.shape == x.shape and seen.stride() == x.stride()
            if same_memory and seen.dtype == x.dtype and version == x._version == seen._version:
                return names
        self.shared_inputs.append((x, x._version, []))
        return self.shared_inputs[-1][2]

    def pin_modules(self) -> None:
        """Pin what only the whole trace shows: shared parameters, modules that did not run, norms without a rule."""
        ledger, parameters_read = self.trace.ledger, self.trace.parameters_read
        for name in (*self.transposed, *self.norms):
            reason = self.foreign_use(name)
            if reason is not None and name in ledger.sources:
                ledger.pin_source(name, name, reason)
            if reason is not None and name in self.input_labels:
                ledger.pin(self.input_labels[name], name, reason)
        for name, module in self.modules.items():
            parameters = {id(parameter) for parameter in own_parameters(module).values()}
            owners = {name, *(owner for parameter in parameters for owner in self.owners[parameter])}
            if not parameters or owners & self.executed or parameters & parameters_read.keys():
                continue
            ancestor = name
            while ancestor not in self.executed:
                ancestor = ancestor.rpartition(".")[0]
            reason = f"it did not run on the sample, and {ancestor or 'the model'} could hand it this tensor"
            for source in sorted(self.trace.scopes[ancestor]):
                ledger.pin_source(source, name, reason)
        for name, shape in self.norm_shapes.items():
            rules = norm_rules(self.modules[name], shape)
            if rules is None:
                reason = "its parameters are not proved to scale its output channel by channel"
                ledger.pin_source(name, name, reason)
            self.norm_rules[name] = rules or {}

    def foreign_use(self, name: str) -> str | None:
        """Why linear layer or norm `name` can scale neither rows nor columns: something else uses its parameters."""
        for parameter in own_parameters(self.modules[name]).values():
            others = [owner for owner in self.owners[id(parameter)] if owner != name]
            if others:
                return f"its parameter is shared with {others[0]}"
            if id(parameter) in self.trace.parameters_read:
                return f"its parameter is read by {self.trace.parameters_read[id(parameter)]}"
        return None

    def readers(self) -> dict[str, list[Reader]]:
        """Source -> the linear layers that read channels of it that are not pinned, in the order in which they ran."""
        ledger = self.trace.ledger
        readers: dict[str, list[Reader]] = {source: [] for source in ledger.sources}
        for name, columns in self.input_labels.items():
            for source, _ in ledger.channels(columns):
                channels = columns % DEGREE - source.first
                foldable = (channels >= 0) & (channels < source.channels)
                foldable &= ~source.pinned[channels.clamp(0, source.channels - 1)]
                if foldable.any():
                    channel_of = torch.where(foldable, channels, -1)
                    power = torch.where(foldable, columns // DEGREE + 1, 1)
                    reader = Reader(name, channel_of, power, self.transposed[name])
                    readers[source.name].append(reader)
        return readers

    def graph(self) -> Graph:
        groups, refusals = [], []
        for name, readers in self.readers().items():
            source = self.trace.ledger.sources[name]
            refusals += [Refusal(name, *key, count, source.channels) for key, count in source.reasons.items()]
            foldable = torch.zeros(source.channels, dtype=torch.bool)
            for reader in readers:
                foldable[reader.channel_of[reader.channel_of >= 0]] = True
            if readers:
                kind = "linear" if name in self.transposed else "norm"
                rules = self.norm_rules.get(name, {})
                groups.append(Group(name, kind, rules, source.channels, foldable, tuple(readers)))
            elif not source.pinned.all():
                unpinned = int((~source.pinned).sum())
                refusals.append(Refusal(name, "no linear layer", "nothing reads it", unpinned, source.channels))
        linears = []
        for name, columns in self.input_labels.items():
            weight, transposed = own_parameters(self.modules[name])["weight"], self.transposed[name]
            out_features, in_features = weight.shape[::-1] if transposed else weight.shape
            linears.append(Linear(name, in_features, out_features, transposed, len(columns)))
        shared = tuple(tuple(names) for _, _, names in self.shared_inputs)
        return Graph(tuple(groups), tuple(refusals), tuple(linears), shared)
