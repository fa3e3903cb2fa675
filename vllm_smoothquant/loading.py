"""Weight loaders that refuse tensors which do not belong to the layer.

vLLM does not notice a missing tensor of a quantised model, and it casts any dtype that it finds. Therefore each weight
loader is wrapped: dtype, shape and values are checked when a tensor is loaded, and completeness after loading.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.parameter import PerTensorScaleParameter

from .bloom import RepeatingMapper, collapse
from .format.errors import SmoothQuantError

# A torch.nn.Module. torch types its attributes as "tensor or module", which is of no use here.
Layer = Any

# How these layers of vLLM slice a tensor for a rank is known; a subclass may slice differently.
_KNOWN_LAYERS = (
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
)
_QKV = {"q": 0, "k": 1, "v": 2}

# One value for the whole input of a fused layer, although each of its shards has a tensor.
_SHARED = ("input_scale", "smoothing_factor")


@dataclass
class CheckedLoading:
    """The loaders of one layer.

    prefix: vLLM's name of the layer. names: the checkpoint's names of its shards. tensors: all names in the
    checkpoint's
    files, or None if they were not readable when the engine was configured. input_size, output_size: over all ranks;
    widths: rows of each shard on this rank. per_channel: weight_scale has one row for each row of the weight.
    """

    prefix: str
    names: list[str]
    tensors: frozenset[str] | None
    repeating: RepeatingMapper | None
    per_channel: bool
    input_size: int
    output_size: int
    widths: list[int]
    loaded: dict[str, dict[Any, torch.Tensor | None]] = field(default_factory=dict)

    def checked(self, layer: Layer, tensor: str, loader: Callable[..., None]) -> Callable[..., None]:
        """`loader` of the parameter `tensor`, with checks before it; it records which shards were loaded."""
        shards, layer_ref = self.loaded.setdefault(tensor, {}), weakref.ref(layer)  # weak: vLLM keeps loaders for ever

        def load(param: Parameter, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            # vLLM passes the shard by position, by either of two names, or not at all (fused in the checkpoint).
            shard = args[0] if args else kwargs.get("loaded_shard_id", kwargs.get("shard_id"))
            value = collapse(value, self.repeating)
            self._check_value(layer_ref(), tensor, shard, value)
            loader(param, value, *args, **kwargs)
            if shard is None and isinstance(param, PerTensorScaleParameter):
                param.data.fill_(value.item())  # one scale for all shards: older versions of vLLM fill only the first
            shards[shard] = value.clone() if tensor in _SHARED else None

        return load

    def check_complete(self, layer: Layer) -> None:
        """Check that every tensor of every shard was loaded, and that both sides have a bias or neither has."""
        for tensor in self.loaded:
            self._check_tensor(layer, tensor)
        self._check_bias(layer)
        self.loaded.clear()

    def _name(self, shard: Any) -> str:
        """The checkpoint's name of vLLM's `shard`: "q", 1, a tuple of them, or None for the whole layer."""
        indices = _indices(shard)
        if len(self.names) == 1:
            return self.names[0]
        return self.names[indices[0]] if len(indices) == 1 and indices[0] < len(self.names) else self.prefix

    def _check_value(self, layer: Layer, tensor: str, shard: Any, value: torch.Tensor) -> None:
        where = f"{self._name(shard)}.{tensor}"
        dtype = torch.int8 if tensor == "weight" else torch.float32
        rows = self._rows(layer, shard)
        shapes: Mapping[str, tuple[int | None, ...]] = {
            "weight": (rows, self.input_size),
            "weight_scale": (rows, 1) if self.per_channel else (1,),
            "input_scale": (1,),
            "smoothing_factor": (self.input_size,),
        }
        shape = shapes[tensor]
        fits = len(shape) == value.dim() and all(w in (None, g) for w, g in zip(shape, value.shape, strict=True))
        if value.dtype != dtype or not fits:
            raise SmoothQuantError(
                where,
                f"{dtype} [{', '.join('any' if n is None else str(n) for n in shape)}]",
                f"{value.dtype} {list(value.shape)}",
                "calibrate the model again, or list the layer in `ignore` if it was left in floating point",
            )
        if tensor != "weight":
            _check_positive(where, value)
        for other, previous in self.loaded[tensor].items() if tensor in _SHARED else ():
            if previous is not None and not torch.equal(previous, value):
                raise SmoothQuantError(
                    where,
                    f"the values of {self._name(other)}.{tensor}, because vLLM computes both as {self.prefix}",
                    "different values",
                    "calibrate the model again so that both share them",
                )

    def _rows(self, layer: Layer, shard: Any) -> int | None:
        """Rows of the checkpoint's tensor for `shard`, over all ranks; None if the layer's slicing is not known."""
        if hasattr(layer, "org_vocab_size"):
            return int(layer.org_vocab_size)
        ranks = self.output_size // sum(self.widths)
        if ranks > 1 and type(layer).__name__ not in _KNOWN_LAYERS:
            return None
        rows = [width * ranks for width in self.widths]
        if ranks > 1 and type(layer).__name__ == "QKVParallelLinear":
            rows[1:] = [n // layer.num_kv_head_replicas for n in rows[1:]]
        indices = _indices(shard) if shard is not None else tuple(range(len(rows)))
        return sum(rows[i] for i in indices) if indices and max(indices) < len(rows) else None

    def _check_tensor(self, layer: Layer, tensor: str) -> None:
        param, shards = getattr(layer, tensor), self.loaded[tensor]
        present = {index for shard in shards for index in _indices(shard)}
        # A model may have replaced our loader by its own: then only the NaN of an unfilled scale shows the fault.
        ours = getattr(getattr(param, "weight_loader", None), "__qualname__", "") == _LOADER
        missing = [index for index in range(len(self.widths)) if index not in present]
        if ours and None not in shards and missing:
            raise SmoothQuantError(
                f"{self._name(missing[0])}.{tensor}",
                "a tensor in the checkpoint",
                "none",
                "copy or export the checkpoint again",
            )
        if tensor != "weight":
            # vLLM pads an output head with rows of zeros, scales included; they compute zeros, which is right.
            padding = getattr(layer, "num_org_embeddings_per_partition", None)
            _check_positive(f"{self.prefix}.{tensor}", param.data[:padding])
        elif param.dtype != torch.int8:
            raise SmoothQuantError(f"{self.prefix}.{tensor}", "int8", str(param.dtype), "calibrate the model again")

    def _check_bias(self, layer: Layer) -> None:
        """vLLM skips a bias that its layer lacks, and leaves a bias that the checkpoint lacks uninitialised."""
        tensors = self.tensors
        if tensors is None or not all(f"{name}.weight" in tensors for name in self.names):
            return
        has_bias = getattr(layer, "bias", None) is not None
        for name in self.names:
            if (f"{name}.bias" in tensors) != has_bias:
                raise SmoothQuantError(
                    f"{name}.bias",
                    "a tensor in the checkpoint" if has_bias else "none, because vLLM's layer adds no bias",
                    "none" if has_bias else "one",
                    "check that config.json belongs to this checkpoint and that vLLM has this architecture",
                )


_LOADER = f"{CheckedLoading.checked.__qualname__}.<locals>.load"


def _indices(shard: Any) -> tuple[int, ...]:
    """Positions in a fused layer of what vLLM calls `shard`; empty if it is none that we know."""
    shards = shard if isinstance(shard, tuple) else (shard,)
    indices: list[Any] = [_QKV.get(s, s) if isinstance(s, str) else s for s in shards]
    return tuple(indices) if all(isinstance(i, int) for i in indices) else ()


def _check_positive(where: str, value: torch.Tensor) -> None:
    good = torch.isfinite(value) & (value > 0)
    if not bool(good.all()):
        bad = value[~good].flatten()
        raise SmoothQuantError(
            where,
            "finite values above zero",
            f"{bad[0].item()} and {bad.numel() - 1} more such" if bad.numel() > 1 else f"{bad[0].item()}",
            "calibrate the model again",
        )
