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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

DEGREE = 1 << 40
aten = torch.ops.aten


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


# --- How operations carry labels ---
#
# A rule gets the trace, the operation and its arguments, and asks the trace for an argument's labels (0 where it has
# none). It returns the labels of the output or outputs, or None for "no labels", and pins through trace.pin.

Rule = Callable[["Trace", Any, tuple, dict], Any]


def _first(apply: Callable) -> Rule:
    """Argument 0 is data, moved without arithmetic; `apply(ids, *rest, **kwargs)` moves its labels alike."""

    def rule(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
        trace.pin_read((args[1:], kwargs), func, "an index or mask is data-dependent")
        return apply(trace.ids(args[0]), *args[1:], **kwargs)

    return rule


def _same(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    return _first(lambda ids, *a, **k: ids)(trace, func, args, kwargs)


def _moved(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    return _first(func)(trace, func, args, kwargs)


def _joined(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    return func([trace.ids(t) for t in args[0]], *args[1:], **kwargs)


def _to_copy(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    dtype = kwargs.get("dtype")
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return trace.pin_read(args, func, "a conversion that is not between floating-point numbers")
    return trace.ids(args[0])


def _where(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    condition, a, b = args
    trace.pin_read(condition, func, "a condition reads it")
    return torch.where(condition, trace.ids(a), trace.ids(b))


def _masked_fill(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    trace.pin_read(args[1:], func, "a mask reads it")
    return trace.ids(args[0]).masked_fill(args[1], 0)


def _clamp(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    bounds = [*args[1:], *kwargs.values()]
    if any(isinstance(b, torch.Tensor) or b not in (None, 0) for b in bounds):
        return trace.pin_read((args, kwargs), func, "a clamp at a constant")
    return trace.ids(args[0])


def _mul(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))
    same = (a != 0) & (a % DEGREE == b % DEGREE)
    # Two scales meet in one product. One has to be 1; the later operand (the `up` of a gated MLP) keeps its own.
    trace.pin(torch.where((b != 0) & ~same, a, 0), func, "a product with another scaled tensor")
    power = a // DEGREE + b // DEGREE + 1
    return torch.where(same, a % DEGREE + power * DEGREE, torch.where(b != 0, b, a))


def _div(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return trace.pin_read((args, kwargs), func, "a rounding division")
    trace.pin_read(args[1], func, "a division by it")
    return torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))[0]


def _pow(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> Any:
    exponent = args[1]
    if isinstance(exponent, torch.Tensor) or exponent not in (1, 2, 3, 4):
        return trace.pin_read(args, func, "a power that does not carry a scale")
    ids = trace.ids(args[0])
    degree = (ids // DEGREE + 1) * int(exponent)
    return torch.where(ids != 0, ids % DEGREE + (degree - 1) * DEGREE, 0)


def _add(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))
    for ids in (a, b):
        trace.pin(torch.where(a != b, ids, 0), func, "a sum with what does not carry the same scale")
    return torch.where(a == b, a, 0)


def _matmul(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> torch.Tensor | None:
    a, b = (trace.ids(t) for t in args[:2])
    carried = []
    for ids, dim, other in ((a, -1, b), (b, -2, a)):
        start = ids.narrow(dim, 0, 1)
        if not trace.labelled(other) and bool((ids == start).all()):
            carried.append(start)
        else:
            trace.pin(ids, func, "a product that sums over its channels")
            carried.append(torch.zeros_like(start))
    # a's labels are [..., rows, 1], b's [..., 1, columns]; at most one of the two carries any.
    return torch.add(*torch.broadcast_tensors(*carried))


def _shape_only(trace: "Trace", func: Any, args: tuple, kwargs: dict) -> None:
    return None


RULES: dict[Any, Rule] = {
    # Data movement: the same operation on the labels.
    **dict.fromkeys(
        (
            aten.diagonal, aten.expand, aten.flip, aten.index, aten.index_select, aten.gather, aten.movedim,
            aten.permute, aten.repeat, aten.roll, aten.select, aten.slice, aten.split, aten.split_with_sizes,
            aten.squeeze, aten.t, aten.transpose, aten.tril, aten.triu, aten.unbind, aten.unfold, aten.unsqueeze,
        ),
        _moved,
    ),
    # Labels may be broadcast where the data is not, so a view of the data may be a copy of the labels.
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), _first(lambda ids, shape: ids.reshape(shape))),
    aten.constant_pad_nd: _first(lambda ids, pad, *value: aten.constant_pad_nd(ids, pad, 0)),
    **dict.fromkeys((aten.cat, aten.stack), _joined),
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    # Elementwise and positively homogeneous: f(x / s) = f(x) / s.
    **dict.fromkeys(
        (aten.abs, aten.alias, aten.clone, aten.detach, aten.leaky_relu, aten.lift_fresh, aten.neg, aten.relu),
        _same,
    ),
    aten._to_copy: _to_copy,
    **dict.fromkeys((aten.clamp, aten.clamp_min, aten.clamp_max), _clamp),
    aten.mul: _mul,
    aten.div: _div,
    aten.pow: _pow,
    **dict.fromkeys((aten.add, aten.sub), _add),
    **dict.fromkeys((aten.mm, aten.bmm), _matmul),
    # Reads the shape, not the values.
    **dict.fromkeys(
        (
            aten.empty_like, aten.full_like, aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones,
            aten.new_zeros, aten.ones_like, aten.rand_like, aten.randn_like, aten.sym_size, aten.sym_stride,
            aten.zeros_like,
        ),
        _shape_only,
    ),
}  # fmt: skip

# Overloads whose name is a rule's but whose arithmetic is another's.
_NOT_BY_NAME = {aten.view.dtype, aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.where.default}


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
