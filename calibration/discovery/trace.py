"""Follow, through one forward pass, the scale that every element of every activation would carry.

Labels. A *source* is a tensor whose channels could be divided by s: the output of a norm or of a linear layer. A
*label* names one of its channels. Each activation has an int64 tensor of labels, shaped like the activation:

    0                         the element carries no scale
    first + channel           dividing that channel of the source by s divides the element by s
    ... + (d - 1) * DEGREE    ... divides the element by s ** d (squares, for squared-ReLU networks)

Pins. An operation either carries labels to its output by its rule in rules.py, or it *pins* them: those channels must
keep scale 1, and the ledger records the operation and the reason. An operation without a rule pins all labels that it
reads. An unknown operation can therefore cost a fold, but it cannot change the function. Nothing here depends on names
of layers or architectures.

Aliases. Memory with labels may be read through a tensor without labels (`x.data`), or written in place. The trace
compares the storage of each tensor with the storages that have labels, and pins what such a tensor reads or overwrites.

Example. The first source of a model has 4 channels, so its output x [tokens, 4] has labels 1 2 3 4 in every row.
`x.flip(-1)` moves them: 4 3 2 1. `(x * x).flip(-1)` carries squares: 4 3 2 1, each plus DEGREE. `x.softmax(-1)` has no
rule: it pins 1 to 4, and the source is not folded.
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .rules import DEGREE, NO_RULE, RULES, Rule, aten


class Labels(NamedTuple):
    """ids: int64, shaped like the activation. sources: every source that may occur in ids (never too few)."""

    ids: torch.Tensor
    sources: frozenset[str]


@dataclass
class Source:
    """One source. first: label of its channel 0. pinned: bool [channels]. reasons: (reader, reason) -> channels."""

    name: str
    first: int
    channels: int
    pinned: torch.Tensor
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)


class Ledger:
    """All sources of a trace, in the order in which they first ran."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def source(self, name: str, channels: int) -> Source:
        """The source `name`; a module that runs twice is one source."""
        if name not in self.sources:
            first = 1 + sum(source.channels for source in self.sources.values())
            self.sources[name] = Source(name, first, channels, torch.zeros(channels, dtype=torch.bool))
        return self.sources[name]

    def source_of(self, label: int) -> Source:
        """The source of a label above 0."""
        # `first` grows from source to source, so a label belongs to the last source that starts at or before it.
        sources = list(self.sources.values())
        return sources[bisect.bisect_right(sources, label, key=lambda source: source.first) - 1]

    def channels(self, ids: torch.Tensor) -> Iterator[tuple[Source, torch.Tensor]]:
        """Each source that occurs in the labels `ids`, with the channels that occur: int64, ascending."""
        for dim, stride in enumerate(ids.stride()):
            if stride == 0 and ids.shape[dim] > 1:
                ids = ids.narrow(dim, 0, 1)  # a broadcast dimension repeats its labels
        labels = (ids % DEGREE).unique().cpu()
        labels = labels[labels != 0]
        while len(labels):
            source = self.source_of(int(labels[0]))
            count = int((labels < source.first + source.channels).sum())
            yield source, labels[:count] - source.first
            labels = labels[count:]

    def pin(self, ids: torch.Tensor, reader: str, reason: str) -> None:
        """Give every channel whose label occurs in `ids` scale 1, because `reader` cannot follow another."""
        for source, channels in self.channels(ids):
            unpinned = channels[~source.pinned[channels]]
            if len(unpinned):
                source.pinned[unpinned] = True
                source.reasons[reader, reason] += len(unpinned)

    def pin_source(self, name: str, reader: str, reason: str) -> None:
        """Pin every channel of one source."""
        source = self.sources[name]
        self.pin(torch.arange(source.first, source.first + source.channels), reader, reason)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, a model's output included."""
    leaves = tree_leaves(dict(tree) if isinstance(tree, dict) else tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Trace(TorchDispatchMode):
    """Follows labels through every operation that runs under it. Hooks say which modules are opaque (discover.py).

    ledger: sources and pins. path: names of the running modules, innermost last. scopes: module name -> sources that
    its own code could see. parameters_read: id of every parameter that an operation outside its own opaque module read
    -> the module that ran the operation. opaque_parameters: while an opaque module runs, the ids of its own parameters;
    operations then read only these and the module's input.
    """

    no_rule = "an operation that does not carry a per-channel scale"

    def __init__(self, model: nn.Module, rules: Mapping[Any, Rule] = RULES) -> None:
        super().__init__()
        self.rules = rules
        self.ledger = Ledger()
        self.path: list[str] = [""]
        self.scopes: defaultdict[str, set[str]] = defaultdict(set)
        self.parameters_read: dict[int, str] = {}
        self.opaque_parameters: set[int] | None = None
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._storages: dict[int, tuple[StorageWeakRef, list[torch.Tensor]]] = {}
        self._purge_at = 256
        self._parameters: dict[int, int] = {}  # id, and minus the address, of each parameter -> its id
        for parameter in model.parameters():
            self._parameters[id(parameter)] = id(parameter)
            if parameter.device.type != "meta" and parameter.numel():
                self._parameters[-parameter.data_ptr()] = id(parameter)

    # --- what hooks of modules call ---

    def emit(self, name: str, output: torch.Tensor) -> None:
        """`output` [..., channels] of module `name` is a source: give it labels of its own."""
        source = self.ledger.source(name, output.shape[-1])
        ids = torch.arange(source.first, source.first + source.channels, device=output.device)
        self._store(output, Labels(ids.expand(output.shape), frozenset({name})))

    def expose(self, tensors: Iterable[torch.Tensor]) -> None:
        """The innermost running module holds `tensors`."""
        for tensor in tensors:
            labels = self._labels.get(tensor)
            if labels is not None:
                self.scopes[self.path[-1]].update(labels.sources)

    # --- what rules call ---

    def ids(self, value: Any) -> torch.Tensor:
        """Labels of an argument: zeros (broadcast) for anything that has none, numbers included."""
        if not isinstance(value, torch.Tensor):
            return torch.zeros((), dtype=torch.int64)
        labels = self._labels.get(value)
        if labels is not None:
            return labels.ids
        return torch.zeros((), dtype=torch.int64, device=value.device).expand(value.shape)

    def pin(self, ids: torch.Tensor, reader: Any, reason: str) -> None:
        """Pin the labels in `ids`; `reader` is an operation, or the name of a module."""
        if ids.any():
            module = self.path[-1] or "the model"
            reader = reader if isinstance(reader, str) else f"{module} ({reader.overloadpacket})"
            self.ledger.pin(ids, reader, reason)

    def pin_read(self, tree: Any, reader: Any, reason: str) -> None:
        """Pin all labels of the tensors in `tree`."""
        for tensor in tensors_of(tree):
            if tensor in self._labels:
                self.pin(self.ids(tensor), reader, reason)

    # --- the mode ---

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        # Before the operation runs, because an operation in place would hide what it read.
        self._record_parameters(tensors)
        if self.opaque_parameters is not None:
            return func(*args, **kwargs)  # the caller has already pinned or carried the labels of the module's input
        for tensor in tensors:
            if tensor not in self._labels:
                self._pin_storage(tensor, func, "memory read through an alias the trace did not see")
        sources = frozenset().union(*(self._labels[t].sources for t in tensors if t in self._labels))
        carried = self._carry(func, args, kwargs, sources) if sources else None
        output = func(*args, **kwargs)
        if carried is not None:
            single = isinstance(output, torch.Tensor)
            for tensor, ids in zip([output] if single else output, [carried] if single else carried, strict=True):
                # Labels of a product or sum of one element are broadcast to what the operation returned.
                self._store(tensor, Labels(ids.to(tensor.device).expand(tensor.shape), sources))
        return output

    def _carry(self, func: Any, args: tuple, kwargs: dict, sources: frozenset[str]) -> Any:
        """Labels of the output or outputs by the operation's rule; None for no labels."""
        self.scopes[self.path[-1]].update(sources)
        if func._schema.is_mutable:
            return self._mutate(func, args, kwargs)
        rule = None if func in NO_RULE else self.rules.get(func.overloadpacket)
        if rule is None:
            return self.pin_read((args, kwargs), func, self.no_rule)
        return rule(self, func, args, kwargs)

    def _mutate(self, func: Any, args: tuple, kwargs: dict) -> None:
        """In place, an operation whose rule leaves every label as it was (x *= 2) is harmless; any other pins all."""
        name = func.overloadpacket.__name__
        rule = self.rules.get(getattr(aten, name[:-1], None)) if name.endswith("_") else None
        if rule is not None:
            carried = rule(self, func, args, kwargs)
            if carried is not None and torch.equal(carried.expand(args[0].shape), self.ids(args[0])):
                return
        self.pin_read((args, kwargs), func, "an operation in place")
        arguments = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
        for tensor in tensors_of((written, kwargs.get("out"))):
            self._pin_storage(tensor, func, "an operation in place")

    def _store(self, tensor: torch.Tensor, labels: Labels) -> None:
        if not labels.ids.any():
            # A tensor that carries nothing is not the same as an unknown tensor, which may be an alias.
            self._labels[tensor] = Labels(labels.ids, frozenset())
            return
        self._labels[tensor] = labels
        storage = tensor.untyped_storage()
        entry = self._storages.get(storage._cdata)
        if entry is None or entry[0].expired():
            # The weak reference keeps the address from being used again while the entry lives.
            self._storages[storage._cdata] = entry = (StorageWeakRef(storage), [])
            if len(self._storages) >= self._purge_at:
                self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
                self._purge_at = 2 * len(self._storages) + 256
        entry[1].append(labels.ids)

    def _record_parameters(self, tensors: list[torch.Tensor]) -> None:
        for t in tensors:
            parameter = self._parameters.get(id(t)) or (t.numel() and self._parameters.get(-t.data_ptr()))
            if parameter and parameter not in (self.opaque_parameters or ()):
                self.parameters_read.setdefault(parameter, self.path[-1] or "the model")

    def _pin_storage(self, tensor: torch.Tensor, func: Any, reason: str) -> None:
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        if entry is not None and not entry[0].expired():
            for ids in entry[1]:
                self.pin(ids, func, reason)
