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

from collections.abc import Collection

import torch
from torch import nn

from ..running.modules import own_parameters
from .graph import Graph, Group, Linear, Reader, Refusal
from .probe import norm_rules
from .recorder import Recorder
from .rules import DEGREE
from .trace import Trace

# Samples and tokens of each: discovery needs the shape of the computation, not its statistics.
TRACE_SHAPE = (2, 16)
# What the output head reads also leaves the model, although no forward pass shows that.
HIDDEN_STATES, LEAVE = "the hidden states", "drafts, poolers and reward heads read them, too"


def discover(model: nn.Module, input_ids: torch.Tensor, keep: Collection[str] = ()) -> Graph:
    """Run `model(input_ids=...)` once and find its groups. Nothing of the model is changed.

    input_ids: int64 [batch, tokens]; one or two sequences of 8 to 16 tokens are enough (at least 2 tokens).
    keep: linear layers that stay in floating point (Graph.keeping).
    """
    recorder = _Scales(model)
    recorder.run(input_ids)
    return recorder.graph().keeping(keep)


class _Scales(Recorder):
    """Follows a scale for each channel.

    shared_inputs: each tensor that linear layers read, as long as nothing changes it, and these layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, Trace(model))
        # The tensors are stored, because the memory of a freed tensor is used again.
        self.shared_inputs: list[tuple[torch.Tensor, int, list[str]]] = []
        self.norm_rules: dict[str, dict[str, str]] = {}

    def at_linear(self, name: str, x: torch.Tensor) -> None:
        self.names_of_readers(x).append(name)

    def at_norm(self, name: str, tensors: list[torch.Tensor]) -> None:
        # Its statistics mix all channels, so no scale passes through it.
        self.trace.pin_read(tensors, name, "a norm of another layer's output")

    def at_hidden_states(self, tensors: list[torch.Tensor]) -> None:
        self.trace.pin_read(tensors, HIDDEN_STATES, LEAVE)

    def names_of_readers(self, x: torch.Tensor) -> list[str]:
        """The linear layers that read x so far: the same memory in the same layout, not changed since."""
        for seen, version, names in self.shared_inputs:
            same_memory = seen.data_ptr() == x.data_ptr() and seen.shape == x.shape and seen.stride() == x.stride()
            if same_memory and seen.dtype == x.dtype and version == x._version == seen._version:
                return names
        self.shared_inputs.append((x, x._version, []))
        return self.shared_inputs[-1][2]

    def pin_modules(self) -> None:
        super().pin_modules()
        for name, shape in self.norm_shapes.items():
            rules = norm_rules(self.modules[name], shape)
            if rules is None:
                reason = "its parameters are not proved to scale its output channel by channel"
                self.trace.ledger.pin_source(name, name, reason)
            self.norm_rules[name] = rules or {}

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
