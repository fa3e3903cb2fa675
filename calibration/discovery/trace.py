"""Which scale every element of every activation would carry, followed through the operations of one forward pass.

A *source* is a tensor whose channels could be divided by s (a norm's output, a linear layer's output). A *label* names
one of its channels: an integer that travels with each element, in an int64 tensor shaped like the activation.

    0                         the element carries no scale
    first + channel           dividing that channel of the source by s divides the element by s
    ... + (d - 1) * DEGREE    ... divides it by s ** d (squares, for squared-ReLU networks)

An operation either carries labels to its output by the rule in the table below, or it *pins* them: the channel must
keep scale 1, and the ledger records who pinned it. An operation that the table does not name pins all it reads, so that
what we do not know can only cost a fold, never change the function. Nothing here knows of layers, heads, architectures.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .rules import _NOT_BY_NAME, DEGREE, RULES, aten


class Labels(NamedTuple):
    """ids: int64, shaped like the activation. sources: every source that may occur in ids (never too few)."""

    ids: torch.Tensor
    sources: frozenset[str]


@dataclass
class Source:
    """One source: `first` is the label of its channel 0; pinned [channels] bool; why: (reader, reason) -> channels."""

    name: str
    first: int
    channels: int
    pinned: torch.Tensor
    why: dict[tuple[str, str], int] = field(default_factory=dict)


class Ledger:
    """All sources of a trace, in the order in which they first ran."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self._next = 1

    def source(self, name: str, channels: int) -> Source:
        """The source `name`; a module that runs twice is one source."""
        if name not in self.sources:
            self.sources[name] = Source(name, self._next, channels, torch.zeros(channels, dtype=torch.bool))
            self._next += channels
        return self.sources[name]

    def pin(self, ids: torch.Tensor, reader: str, reason: str) -> None:
        """Give every channel whose label occurs in `ids` scale 1, because `reader` cannot follow another."""
        labels = (_distinct(ids).cpu() % DEGREE).unique()
        sources = list(self.sources.values())
        while len(labels):
            # `first` grows from source to source, so a label belongs to the last source that starts at or before it.
            source = sources[bisect.bisect_right(sources, int(labels[0]), key=lambda s: s.first) - 1]
            count = int((labels < source.first + source.channels).sum())
            channels, labels = labels[:count] - source.first, labels[count:]
            fresh = channels[~source.pinned[channels]]
            if len(fresh):
                source.pinned[fresh] = True
                source.why[reader, reason] = source.why.get((reader, reason), 0) + len(fresh)

    def pin_source(self, name: str, reader: str, reason: str) -> None:
        """Pin every channel of one source."""
        source = self.sources[name]
        self.pin(torch.arange(source.first, source.first + source.channels), reader, reason)


def _distinct(ids: torch.Tensor) -> torch.Tensor:
    """The distinct labels of `ids` but 0. Dimensions of stride 0 (broadcast) repeat and are read once."""
    for dim, stride in enumerate(ids.stride()):
        if stride == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    ids = ids.unique()
    return ids[ids != 0]


class Trace(TorchDispatchMode):
    """Follows labels through every operation run under it. Modules are opaque where the caller says so (see graph.py).

    ledger: what was pinned. scopes: module name -> sources that its own code could see. parameters_read: id of every
    parameter that an operation outside its own opaque module read -> the module that ran the operation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.scopes: dict[str, set[str]] = {}
        self.path: list[str] = [""]
        self.opaque: str | None = None
        self.parameters_read: dict[int, str] = {}
        self._opaque_parameters: frozenset[int] = frozenset()
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._storages: dict[int, tuple[StorageWeakRef, list[torch.Tensor]]] = {}
        self._purge_at = 256
        self._by_pointer: dict[int, int] = {}
        for parameter in model.parameters():
            self._by_pointer[id(parameter)] = id(parameter)
            if parameter.device.type != "meta" and parameter.numel():
                self._by_pointer[-parameter.data_ptr()] = id(parameter)

    # --- what modules tell us ---

    def enter_opaque(self, name: str, parameters: Iterable[nn.Parameter]) -> None:
        """Until leave_opaque, operations belong to module `name` and read only its own parameters and input."""
        self.opaque, self._opaque_parameters = name, frozenset(map(id, parameters))

    def leave_opaque(self) -> None:
        self.opaque, self._opaque_parameters = None, frozenset()

    def emit(self, name: str, output: torch.Tensor) -> None:
        """`output` [..., channels] of module `name` is a source: give it labels of its own."""
        source = self.ledger.source(name, output.shape[-1])
        ids = torch.arange(source.first, source.first + source.channels, device=output.device)
        self._store(output, Labels(ids.expand(output.shape), frozenset({name})))

    def seen(self, tree: Any) -> None:
        """The innermost running module holds the tensors in `tree`."""
        for t in tree_leaves(tree):
            if isinstance(t, torch.Tensor):
                self._see(t)

    # --- what rules use ---

    def ids(self, value: Any) -> torch.Tensor:
        """Labels of an argument: zeros (broadcast) for anything that has none, numbers included."""
        if not isinstance(value, torch.Tensor):
            return torch.zeros((), dtype=torch.int64)
        labels = self._labels.get(value)
        return (
            labels.ids
            if labels is not None
            else torch.zeros((), dtype=torch.int64, device=value.device).expand(value.shape)
        )

    def labelled(self, ids: torch.Tensor) -> bool:
        """Whether any element of `ids` carries a scale."""
        return bool((ids != 0).any())

    def pin(self, ids: torch.Tensor, reader: Any, reason: str) -> None:
        """Pin the labels in `ids`; `reader` is an operation, or the name of a module."""
        if self.labelled(ids):
            where = self.path[-1] or "the model"
            named = reader if isinstance(reader, str) else f"{where} ({reader.overloadpacket})"
            self.ledger.pin(ids, named, reason)

    def pin_read(self, tree: Any, reader: Any, reason: str) -> None:
        """Pin everything that the tensors in `tree` carry."""
        for t in tree_leaves(tree):
            if isinstance(t, torch.Tensor):
                labels = self._labels.get(t)
                if labels is not None:
                    self.pin(labels.ids, reader, reason)

    # --- the mode ---

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        # Before running: an operation that works in place would otherwise hide what it read.
        self._note_parameters(tensors)
        if self.opaque is None:
            self._pin_aliases(func, tensors)
        sources = frozenset().union(*(labels.sources for t in tensors if (labels := self._labels.get(t)) is not None))
        if not sources or self.opaque is not None:
            # Inside an opaque module the caller has already accounted for the input.
            return func(*args, **kwargs)
        self.scopes.setdefault(self.path[-1], set()).update(sources)
        if func._schema.is_mutable:
            self._mutate(func, args, kwargs)
            return func(*args, **kwargs)
        rule = None if func in _NOT_BY_NAME else RULES.get(func.overloadpacket)
        if rule is None:
            self.pin_read((args, kwargs), func, "an operation that does not carry a per-channel scale")
            return func(*args, **kwargs)
        carried = rule(self, func, args, kwargs)
        out = func(*args, **kwargs)
        if carried is not None:
            single = isinstance(out, torch.Tensor)
            for tensor, ids in zip([out] if single else out, [carried] if single else carried, strict=True):
                # Labels of a product or sum of one element are broadcast to what the operation returned.
                self._store(tensor, Labels(ids.to(tensor.device).expand(tensor.shape), sources))
        return out

    def _mutate(self, func: Any, args: tuple, kwargs: dict) -> None:
        """In place, an operation whose rule leaves every label as it was (x *= 2) is harmless; any other pins all."""
        name = func.overloadpacket.__name__
        rule = RULES.get(getattr(aten, name[:-1], None)) if name.endswith("_") else None
        if rule is not None:
            after = rule(self, func, args, kwargs)
            if after is not None and torch.equal(after.expand(args[0].shape), self.ids(args[0])):
                return
        self.pin_read((args, kwargs), func, "an operation in place")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    self._pin_storage(t, func, "an operation in place")
        for t in tree_leaves(kwargs.get("out")):
            self._pin_storage(t, func, "an operation in place")

    def _see(self, tensor: torch.Tensor) -> None:
        labels = self._labels.get(tensor)
        if labels is not None:
            self.scopes.setdefault(self.path[-1], set()).update(labels.sources)

    def _store(self, tensor: torch.Tensor, labels: Labels) -> None:
        if not self.labelled(labels.ids):
            # Known to carry nothing, which is not the same as unknown (see _pin_aliases).
            self._labels[tensor] = Labels(labels.ids, frozenset())
            return
        self._labels[tensor] = labels
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            # The weak reference keeps the address from being used again while the entry lives.
            self._storages[storage._cdata] = known = (StorageWeakRef(storage), [])
            if len(self._storages) >= self._purge_at:
                self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
                self._purge_at = 2 * len(self._storages) + 256
        known[1].append(labels.ids)

    def _note_parameters(self, tensors: list[torch.Tensor]) -> None:
        for t in tensors:
            found = self._by_pointer.get(id(t)) or (t.numel() and self._by_pointer.get(-t.data_ptr()))
            if found and found not in self._opaque_parameters:
                self.parameters_read.setdefault(found, self.path[-1] or "the model")

    def _pin_aliases(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """A tensor without labels on the memory of one with labels (x.data, say) was made behind our back."""
        for t in tensors:
            if t not in self._labels:
                self._pin_storage(t, func, "memory read through an alias the trace did not see")

    def _pin_storage(self, tensor: Any, func: Any, reason: str) -> None:
        if isinstance(tensor, torch.Tensor):
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is not None and not known[0].expired():
                for ids in known[1]:
                    self.pin(ids, func, reason)
