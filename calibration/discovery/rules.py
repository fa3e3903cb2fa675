"""How each operation carries labels from its inputs to its output: one rule for each operation.

To add a rule: check that the operation truly carries a per-channel scale, add it to RULES, and add a toy block to
tests/test_graph.py for each way in which it does not. trace.py explains labels.

A rule gets the trace, the operation and its arguments. It asks the trace for the labels of an argument, which are 0
where the argument has none. It returns the labels of the output or outputs, or None for "no labels". It pins through
`trace.pin`.

Example: labels [[1, 2, 3, 4]] of four channels. `relu` returns them unchanged, because relu(x / s) = relu(x) / s for
s > 0. `x @ w` pins all four, because it sums over the channels. `w @ x` returns them, because no two are mixed.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

DEGREE = 1 << 40
aten = torch.ops.aten


class LabelStore(Protocol):
    """What a rule needs of trace.Trace."""

    def ids(self, value: Any) -> torch.Tensor: ...
    def pin(self, ids: torch.Tensor, reader: Any, reason: str) -> None: ...
    def pin_read(self, tree: Any, reader: Any, reason: str) -> None: ...


# The first argument is a LabelStore, or what else a table of rules needs.
Rule = Callable[[Any, Any, tuple, dict], Any]


def data_movement(move: Callable | None = None) -> Rule:
    """Argument 0 is data, moved without arithmetic; `move` (None: the operation itself) moves its labels alike."""

    def rule(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
        trace.pin_read((args[1:], kwargs), func, "an index or mask is data-dependent")
        return (move or func)(trace.ids(args[0]), *args[1:], **kwargs)

    return rule


def join(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    return func([trace.ids(t) for t in args[0]], *args[1:], **kwargs)


def to_copy(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    dtype = kwargs.get("dtype")
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return trace.pin_read(args, func, "a conversion that is not between floating-point numbers")
    return trace.ids(args[0])


def _where(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    condition, a, b = args
    trace.pin_read(condition, func, "a condition reads it")
    return torch.where(condition, trace.ids(a), trace.ids(b))


def _masked_fill(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    trace.pin_read(args[1:], func, "a mask reads it")
    return trace.ids(args[0]).masked_fill(args[1], 0)


def _clamp(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    bounds = [*args[1:], *kwargs.values()]
    if any(isinstance(b, torch.Tensor) or b not in (None, 0) for b in bounds):
        return trace.pin_read((args, kwargs), func, "a clamp at a constant")
    return trace.ids(args[0])


def _mul(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))
    same = (a != 0) & (a % DEGREE == b % DEGREE)
    # Only one of two scales that meet in a product can stay: that of the later operand (the `up` of a gated MLP).
    trace.pin(torch.where((b != 0) & ~same, a, 0), func, "a product with another scaled tensor")
    power = a // DEGREE + b // DEGREE + 1
    return torch.where(same, a % DEGREE + power * DEGREE, torch.where(b != 0, b, a))


def _div(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return trace.pin_read((args, kwargs), func, "a rounding division")
    trace.pin_read(args[1], func, "a division by it")
    return torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))[0]


def _pow(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> Any:
    exponent = args[1]
    if isinstance(exponent, torch.Tensor) or exponent not in (1, 2, 3, 4):
        return trace.pin_read(args, func, "a power that does not carry a scale")
    ids = trace.ids(args[0])
    degree = (ids // DEGREE + 1) * int(exponent)
    return torch.where(ids != 0, ids % DEGREE + (degree - 1) * DEGREE, 0)


def _add(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))
    trace.pin(torch.stack([a, b])[:, a != b], func, "a sum with what does not carry the same scale")
    return torch.where(a == b, a, 0)


def _matmul(trace: LabelStore, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    a, b = (trace.ids(t) for t in args[:2])
    carried = []
    for ids, dim, factor in ((a, -1, b), (b, -2, a)):
        first = ids.narrow(dim, 0, 1)
        if not factor.any() and bool((ids == first).all()):
            carried.append(first)
        else:
            trace.pin(ids, func, "a product that sums over its channels")
            carried.append(torch.zeros_like(first))
    # a's labels are [..., rows, 1], b's [..., 1, columns]; at most one of the two carries any.
    return torch.add(*torch.broadcast_tensors(*carried))


RULES: dict[Any, Rule] = {
    # Data movement: the same operation on the labels.
    **dict.fromkeys((
        aten.diagonal, aten.expand, aten.flip, aten.index, aten.index_select, aten.gather, aten.movedim,
        aten.permute, aten.repeat, aten.roll, aten.select, aten.slice, aten.split, aten.split_with_sizes,
        aten.squeeze, aten.t, aten.transpose, aten.tril, aten.triu, aten.unbind, aten.unfold, aten.unsqueeze,
    ), data_movement()),
    # Labels may be broadcast where the data is not, so a view of the data may be a copy of the labels.
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), data_movement(torch.reshape)),
    aten.constant_pad_nd: data_movement(lambda ids, pad, *value: aten.constant_pad_nd(ids, pad, 0)),
    **dict.fromkeys((aten.cat, aten.stack), join),
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    # Elementwise and positively homogeneous: f(x / s) = f(x) / s.
    **dict.fromkeys((
        aten.abs, aten.alias, aten.clone, aten.detach, aten.leaky_relu, aten.lift_fresh, aten.neg, aten.relu,
    ), data_movement(lambda ids, *args, **kwargs: ids)),
    aten._to_copy: to_copy,
    **dict.fromkeys((aten.clamp, aten.clamp_min, aten.clamp_max), _clamp),
    aten.mul: _mul,
    aten.div: _div,
    aten.pow: _pow,
    **dict.fromkeys((aten.add, aten.sub), _add),
    **dict.fromkeys((aten.mm, aten.bmm), _matmul),
    # Reads the shape, not the values.
    **dict.fromkeys((
        aten.empty_like, aten.full_like, aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones,
        aten.new_zeros, aten.ones_like, aten.rand_like, aten.randn_like, aten.sym_size, aten.sym_stride,
        aten.zeros_like,
    ), lambda trace, func, args, kwargs: None),
}  # fmt: skip

# Overloads that compute something else than the operation whose name they share.
NO_RULE = {aten.view.dtype, aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.where.default}
