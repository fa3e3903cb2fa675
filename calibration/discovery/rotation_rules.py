"""How each operation carries vectors that may be rotated: every row x of a tensor replaced by x Q.

The labels are those of trace.py: they say which channel of which source each element is. An operation carries a
rotation if it computes the same for x Q as for x, with Q after it. That holds for

    data movement                x Q is moved as x is
    a sum of two vectors         if both are rotated by the same Q: the trace joins their sources
    a product with a number      and with one number for each row; the channels that share rows are a block
    weights A times vectors x    the rows of A X are sums of rows of X; the channels of a row of X are a block

and for nothing else: ReLU carries a scale, but no rotation. An operation without a rule pins all that it reads.
"""

from typing import Any, Protocol

import torch

from .rules import Rule, aten, data_movement, join, to_copy


class VectorStore(Protocol):
    """What a rule needs of rotations.VectorTrace."""

    def ids(self, value: Any) -> torch.Tensor: ...
    def pin(self, ids: torch.Tensor, reader: Any, reason: str) -> None: ...
    def pin_read(self, tree: Any, reader: Any, reason: str) -> None: ...
    def joined(self, a: torch.Tensor, b: torch.Tensor, reader: Any) -> torch.Tensor | None: ...
    def share_rows(self, ids: torch.Tensor) -> None: ...


def _add(trace: VectorStore, func: Any, args: tuple, kwargs: dict) -> Any:
    a, b = torch.broadcast_tensors(trace.ids(args[0]), trace.ids(args[1]))
    if not isinstance(args[1], torch.Tensor) and args[1] == 0:
        return a
    return trace.joined(a, b, func)


def _scale(trace: VectorStore, func: Any, args: tuple, kwargs: dict) -> Any:
    """x * a, a * x, x / a: a is a number, or has one for each row of x."""
    a, b = (trace.ids(t) for t in args[:2])
    labels, factor = (a, args[1]) if a.any() else (b, args[0])
    inexact = kwargs.get("rounding_mode") is not None or (func.overloadpacket is aten.div and b.any())
    if inexact or (a.any() and b.any()):
        return trace.pin_read((args, kwargs), func, "a product with another vector")
    carried = torch.broadcast_to(labels, torch.broadcast_shapes(a.shape, b.shape))
    if isinstance(factor, torch.Tensor) and factor.numel() != 1:
        if factor.shape[-1] != 1:
            return trace.pin_read(args, func, "a product with another factor for each channel")
        trace.share_rows(carried)
    return carried


def _masked(trace: VectorStore, func: Any, args: tuple, kwargs: dict) -> Any:
    """where(mask, x, y), masked_fill(x, mask, number): whole rows are replaced."""
    mask = args[0] if func.overloadpacket is aten.where else args[1]
    if mask.shape[-1:] != (1,) or trace.ids(mask).any():
        return trace.pin_read((args, kwargs), func, "a mask that may differ from channel to channel")
    if func.overloadpacket is aten.where:
        return torch.where(mask, trace.ids(args[1]), trace.ids(args[2]))
    return trace.ids(args[0]).masked_fill(mask, 0)


def _matmul(trace: VectorStore, func: Any, args: tuple, kwargs: dict) -> Any:
    a, b = (trace.ids(t) for t in args[:2])
    rows = b.narrow(-2, 0, 1)
    if a.any() or not bool((b == rows).all()):
        return trace.pin_read(args[:2], func, "a product that sums over its channels")
    trace.share_rows(rows)
    return rows


ROTATION_RULES: dict[Any, Rule] = {
    **dict.fromkeys((
        aten.expand, aten.index, aten.index_select, aten.movedim, aten.permute, aten.repeat, aten.select, aten.slice,
        aten.split, aten.split_with_sizes, aten.squeeze, aten.t, aten.transpose, aten.unbind, aten.unsqueeze,
    ), data_movement()),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), data_movement(torch.reshape)),
    **dict.fromkeys((aten.cat, aten.stack), join),
    **dict.fromkeys((
        aten.alias, aten.clone, aten.detach, aten.lift_fresh, aten.neg,
    ), data_movement(lambda ids, *args, **kwargs: ids)),
    aten._to_copy: to_copy,
    **dict.fromkeys((aten.where, aten.masked_fill), _masked),
    **dict.fromkeys((aten.add, aten.sub), _add),
    **dict.fromkeys((aten.mul, aten.div), _scale),
    **dict.fromkeys((aten.mm, aten.bmm), _matmul),
    **dict.fromkeys((
        aten.empty_like, aten.full_like, aten.new_empty, aten.new_empty_strided, aten.new_full, aten.new_ones,
        aten.new_zeros, aten.ones_like, aten.sym_size, aten.sym_stride, aten.zeros_like,
    ), lambda trace, func, args, kwargs: None),
}  # fmt: skip
