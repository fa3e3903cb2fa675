"""Weight loaders that refuse tensors which do not belong to the layer.

vLLM does not notice a missing tensor of a quantised model, and it casts any dtype. Therefore each weight loader is
wrapped to check dtype, shape and values, and after loading every tensor of every shard must have been loaded.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.parameter import PerTensorScaleParameter

from .bloom import RepeatingMapper, collapse
from .format.config import Scheme, Weights
from .format.errors import SmoothQuantError
from .format.files import PACKED, bad_scales

# A torch.nn.Module. torch types its attributes as "tensor or module", which is of no use here.
Layer = Any

# Layers of vLLM whose rows are split over ranks in a known way; a subclass may split them in another way.
_SPLIT_BY_ROWS = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear")
_QKV = {"q": 0, "k": 1, "v": 2}
# One value for the whole input of a fused layer, although each of its shards has a tensor.
_SHARED = ("input_scale", "smoothing_factor")
_FIX = "calibrate the model again"


class WholeScale(PerTensorScaleParameter):
    """A scale that each rank has whole.

    A mixer of vLLM gives all tensors of its input layer a loader that cuts rows; a single value has none to cut.
    """

    def _set_loader(self, loader: Callable[..., None]) -> None:
        if not _cuts_rows(loader):
            self._weight_loader = loader

    weight_loader = property(lambda self: self._weight_loader, _set_loader)


@dataclass
class CheckedLoading:
    """The loaders of one layer.

    prefix: vLLM's name of the layer. names: the checkpoint's names of its shards. tensors: all names in its files, or
    None if the files were not readable when the engine was configured. repeating: see bloom.py. weights: how they are
    rounded.

    dummy: vLLM loads no files (--load-format dummy) and fills parameters with random numbers.

    create_weights sets input_size and output_size (over all ranks) and widths (rows of each shard on this rank).
    """

    prefix: str
    names: list[str]
    tensors: frozenset[str] | None
    repeating: RepeatingMapper | None
    weights: Weights
    input_size: int = 0
    output_size: int = 0
    widths: list[int] = field(default_factory=list)
    dummy: bool = False
    # tensor -> shard -> value to compare
    loaded: dict[str, dict[Any, torch.Tensor | None]] = field(default_factory=dict)

    @property
    def per_row(self) -> bool:
        """Whether weight_scale has a row for each row of the weight."""
        return self.weights.strategy != "tensor"

    def checked(self, layer: Layer, tensor: str, loader: Callable[..., None]) -> Callable[..., None]:
        """`loader` of the parameter `tensor`, with checks before it; it records which shards were loaded."""
        shards = self.loaded.setdefault(tensor, {})
        # Weak references, because vLLM keeps the loaders for a reload, and the layer would never be freed.
        layer_ref = weakref.ref(layer)
        loader_ref: Any = weakref.WeakMethod(loader) if isinstance(loader, MethodType) else lambda: loader

        def load(param: Parameter, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            # vLLM passes the shard by position, by either of two names, or not at all (fused in the checkpoint).
            shard = args[0] if args else kwargs.get("loaded_shard_id", kwargs.get("shard_id"))
            value = collapse(value, self.repeating)
            owner: Layer = layer_ref()
            load_part: Any = loader_ref()
            # Rows of packed weights are cut as those of their scales, for which a mixer has its own loader.
            scale_loader: Any = getattr(owner.weight_scale, "weight_loader", None)
            cuts_rows = tensor == PACKED and _cuts_rows(scale_loader)
            self._check_value(owner, tensor, shard, value, any_rows=cuts_rows)
            (scale_loader if cuts_rows else load_part)(param, value, *args, **kwargs)
            if shard is None and isinstance(param, PerTensorScaleParameter):
                param.data.fill_(value.item())  # one scale for all shards: older versions of vLLM fill only the first
            shards[shard] = value.clone() if tensor in _SHARED else None

        return load

    def check_complete(self, layer: Layer) -> None:
        """Check that every tensor of every shard was loaded, and that both sides have a bias or neither has."""
        if self.dummy:
            fill(layer, self.loaded)
            return
        for tensor in self.loaded:
            self._check_tensor(layer, tensor)
        self._check_bias(layer)
        for shards in self.loaded.values():
            shards.clear()  # the loaders use these dictionaries again if vLLM reloads the weights

    def _name(self, shard: Any) -> str:
        """The checkpoint's name of vLLM's `shard`: "q", 1, a tuple of them, or None for the whole layer."""
        indices = _indices(shard)
        if len(self.names) == 1:
            return self.names[0]
        return self.names[indices[0]] if len(indices) == 1 and indices[0] < len(self.names) else self.prefix

    def _check_value(
        self, layer: Layer, tensor: str, shard: Any, value: torch.Tensor, *, any_rows: bool = False
    ) -> None:
        where = f"{self._name(shard)}.{tensor}"
        rows = None if any_rows else self._rows(layer, shard)
        specs = Scheme(self.weights).tensors(rows or 0, self.input_size)
        scale = (torch.float32, (1,))
        dtype, sizes = (specs | {"input_scale": scale, "smoothing_factor": (torch.float32, (self.input_size,))})[tensor]
        by_row = tensor in ("weight", PACKED) or (tensor == "weight_scale" and self.per_row)
        shape: tuple[int | None, ...] = (rows, *sizes[1:]) if by_row else sizes
        fits = len(shape) == value.dim() and all(n in (None, size) for n, size in zip(shape, value.shape, strict=True))
        if value.dtype != dtype or not fits:
            expected = f"{dtype} [{', '.join('any' if n is None else str(n) for n in shape)}]"
            fix = "calibrate the model again, or list the layer in `ignore` if it was left in floating point"
            raise SmoothQuantError(where, expected, f"{value.dtype} {list(value.shape)}", fix)
        if value.is_floating_point():
            self._check_scales(where, tensor, value)
        for other, previous in self.loaded[tensor].items():
            if previous is not None and not torch.equal(previous, value):
                expected = f"the values of {self._name(other)}.{tensor}, because vLLM computes both as {self.prefix}"
                raise SmoothQuantError(where, expected, "different values", f"{_FIX} so that both share them")

    def _rows(self, layer: Layer, shard: Any) -> int | None:
        """Rows of the checkpoint's tensor for `shard`, over all ranks; None if the layer's slicing is not known."""
        if hasattr(layer, "org_vocab_size"):
            return int(layer.org_vocab_size)
        ranks, kind = self.output_size // sum(self.widths), type(layer).__name__
        if ranks > 1 and kind not in _SPLIT_BY_ROWS:
            return None
        rows = [width * ranks for width in self.widths]
        if ranks > 1 and kind == "QKVParallelLinear":
            rows[1:] = [n // layer.num_kv_head_replicas for n in rows[1:]]
        indices = _indices(shard) if shard is not None else tuple(range(len(rows)))
        return sum(rows[i] for i in indices) if indices and max(indices) < len(rows) else None

    def _check_tensor(self, layer: Layer, tensor: str) -> None:
        param, shards = getattr(layer, tensor), self.loaded[tensor]
        present = {index for shard in shards for index in _indices(shard)}
        missing = [index for index in range(len(self.widths)) if index not in present]
        # A model may have replaced our loader by its own: then only the NaN of an unfilled scale shows the fault.
        ours = getattr(getattr(param, "weight_loader", None), "__qualname__", "") == _LOADER
        if ours and None not in shards and missing:
            fix = "copy or export the checkpoint again"
            raise SmoothQuantError(f"{self._name(missing[0])}.{tensor}", "a tensor in the checkpoint", "none", fix)
        if tensor not in ("weight", PACKED):
            # vLLM pads an output head with rows of zeros, scales included; they compute zeros, which is right.
            padding = getattr(layer, "num_org_embeddings_per_partition", None)
            self._check_scales(f"{self.prefix}.{tensor}", tensor, param.data[:padding])
        elif param.dtype not in (torch.int8, torch.int32):
            raise SmoothQuantError(f"{self.prefix}.{tensor}", "integers", str(param.dtype), _FIX)

    def _check_scales(self, where: str, tensor: str, value: torch.Tensor) -> None:
        bad, expected = bad_scales(value, signed=self.weights.num_bits == 4 and tensor == "weight_scale")
        if bad.any():
            first, *others = value[bad].tolist()
            more = f" and {len(others)} more such" if others else ""
            raise SmoothQuantError(where, expected, f"{first}{more}", _FIX)

    def _check_bias(self, layer: Layer) -> None:
        """vLLM skips a bias that its layer lacks, and leaves a bias that the checkpoint lacks uninitialised."""
        tensors = self.tensors
        stored = "weight" if self.weights.num_bits == 8 else PACKED
        if tensors is None or not all(f"{name}.{stored}" in tensors for name in self.names):
            return
        has_bias = getattr(layer, "bias", None) is not None
        for name in self.names:
            if (f"{name}.bias" in tensors) != has_bias:
                expected = "a tensor in the checkpoint" if has_bias else "none, because vLLM's layer adds no bias"
                fix = "check that config.json belongs to this checkpoint and that vLLM has this architecture"
                raise SmoothQuantError(f"{name}.bias", expected, "none" if has_bias else "one", fix)


_LOADER = f"{CheckedLoading.checked.__qualname__}.<locals>.load"


def fill(layer: Layer, tensors: Iterable[str]) -> None:
    """Integers and positive scales for a model that is served without weights. vLLM fills floating point only."""
    for tensor in tensors:
        data = getattr(layer, tensor).data
        if not data.is_floating_point():
            data.copy_(torch.arange(data.numel(), device=data.device).reshape(data.shape) % 255 - 127)
        else:
            data.fill_(1e-3)


def _cuts_rows(loader: Any) -> bool:
    """Whether vLLM's Mamba-2 mixer made this loader for its input layer, whose rows it cuts in a way of its own."""
    return getattr(loader, "__qualname__", "").startswith("mamba_v2_sharded_weight_loader")


def _indices(shard: Any) -> tuple[int, ...]:
    """Positions in a fused layer of what vLLM calls `shard`; empty if it is none that we know."""
    shards = shard if isinstance(shard, tuple) else (shard,)
    indices: list[Any] = [_QKV.get(s, s) if isinstance(s, str) else s for s in shards]
    return tuple(indices) if all(isinstance(i, int) for i in indices) else ()
