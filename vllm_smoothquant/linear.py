"""The quantised linear layer inside vLLM.

    y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias         f only where smoothing could not be folded away

Parameters on each tensor-parallel rank, all filled from the checkpoint (checkpoint.py):
    weight            int8     [out, in]           split like any weight of the layer
    weight_scale      float32  [out, 1]            split with `out`; or one per fused shard, the same on every rank
    input_scale       float32  one per fused shard, static activations only; the same on every rank
    smoothing_factor  float32  [in]                split with `in`
Real = int * scale; activations are divided by f.

vLLM does not notice when a quantised model's tensor is missing and casts whatever dtype it finds. So every loader is
watched: dtype, shape and values are checked on the way in, and after loading nothing may be missing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)

from .checkpoint import Scheme, SmoothQuantError
from .kernels import request_here, select_kernel
from .repack import collapse

if TYPE_CHECKING:
    from .config import SmoothQuantConfig

# What a rank's slice of a shard must have been cut from is known for vLLM's own layers; subclasses may cut otherwise.
_KNOWN_LAYERS = (
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
)
_QKV = {"q": 0, "k": 1, "v": 2}
# A torch.nn.Module; torch types its attributes as "tensor or module", which no line here could use.
Layer = Any
# One value for the whole input of a fused layer, however many tensors say it.
_SHARED = ("input_scale", "smoothing_factor")


@register_weight_loader_v2_supported_method
class SmoothQuantLinearMethod(LinearMethodBase):
    """One layer's method. names: the checkpoint's names of its shards; smoothed: whether it has a smoothing_factor."""

    def __init__(
        self, config: "SmoothQuantConfig", prefix: str, names: list[str], scheme: Scheme, smoothed: bool
    ) -> None:
        self.config, self.prefix, self.names, self.scheme, self.smoothed = config, prefix, names, scheme, smoothed
        self.loaded: dict[str, dict[Any, torch.Tensor | None]] = {}

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader = extra_weight_attrs["weight_loader"]
        shards = len(output_partition_sizes)
        out_features = sum(output_partition_sizes)
        layer.logical_widths = output_partition_sizes
        self.input_size, self.output_size = input_size, output_size
        self.input_size_per_partition = input_size_per_partition
        self.widths = output_partition_sizes

        def scales(*shape: int) -> torch.Tensor:
            # NaN: one that no loader fills cannot pass for a scale. vLLM's default dtype is the model's here.
            return torch.full(shape, float("nan"), dtype=torch.float32)

        def watched(tensor: str) -> Callable[..., None]:
            return self._watched(layer, tensor, loader)

        weight = torch.empty(out_features, input_size_per_partition, dtype=torch.int8)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=watched("weight"))
        )
        self.per_channel = self.scheme.weights.strategy == "channel"
        weight_loader = watched("weight_scale")
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(data=scales(out_features, 1), output_dim=0, weight_loader=weight_loader)
            if self.per_channel
            else PerTensorScaleParameter(data=scales(shards), weight_loader=weight_loader),
        )
        static = not self.scheme.input_activations.dynamic
        layer.register_parameter(
            "input_scale",
            PerTensorScaleParameter(data=scales(shards), weight_loader=watched("input_scale")) if static else None,
        )
        if self.smoothed:
            layer.register_parameter(
                "smoothing_factor",
                RowvLLMParameter(
                    data=scales(input_size_per_partition), input_dim=0, weight_loader=watched("smoothing_factor")
                ),
            )
        # Zero points, which symmetric activations have not; vLLM's kernels look for them.
        layer.register_parameter("input_zero_point", None)
        layer.register_parameter("azp_adj", None)

        channelwise = self.per_channel or shards > 1
        self.kernel = select_kernel(
            request_here(self.prefix, self.scheme, channelwise, params_dtype, out_features, input_size_per_partition)
        )

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.config.check_all_names_met()
        for tensor in self.loaded:
            self._check_complete(layer, tensor)
        self._check_bias(layer)

        weight_scale = layer.weight_scale.data
        if not self.per_channel and len(self.widths) > 1:
            # One scale per shard becomes one per channel, which every GEMM knows.
            weight_scale = weight_scale.repeat_interleave(torch.tensor(self.widths, device=weight_scale.device))
            weight_scale = weight_scale.reshape(-1, 1)
        layer.weight_scale = Parameter(weight_scale, requires_grad=False)
        if layer.input_scale is not None:
            layer.input_scale = Parameter(layer.input_scale.data[:1].clone(), requires_grad=False)
        if self.smoothed:
            # Multiplying is cheaper than dividing; the reciprocal is off by half a unit in the last place of float32.
            layer.inverse_smoothing_factor = Parameter(layer.smoothing_factor.data.reciprocal(), requires_grad=False)
            del layer.smoothing_factor
        self.kernel.prepare(layer)
        self.loaded.clear()

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] in the model's dtype, bias [out] or None: y [..., out] in x's dtype."""
        if self.smoothed and not self.kernel.smooths:
            # The product is a float32 one, rounded to x's dtype once.
            x = (x * layer.inverse_smoothing_factor).to(x.dtype)
        y = self.kernel.apply(layer, x.reshape(-1, x.shape[-1]), bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        raise SmoothQuantError(
            self.prefix,
            expected="an output head of its own, since quantization_config does not ignore it",
            got="one tied to the embeddings",
            do=f"add {self.prefix!r} to `ignore` in config.json, or calibrate the model again",
        )

    # --- loading ---------------------------------------------------------------------------------------------------

    def _watched(self, layer: Layer, tensor: str, loader: Callable[..., None]) -> Callable[..., None]:
        """`loader` for the parameter `tensor`, refusing what does not belong there and noting which shard came."""
        seen = self.loaded.setdefault(tensor, {})

        def load(param: Parameter, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            # vLLM passes the shard by position, by either of two names, or not at all (fused in the checkpoint).
            shard = args[0] if args else kwargs.get("loaded_shard_id", kwargs.get("shard_id"))
            value = collapse(value, self.config.repeating)
            self._check_value(layer, tensor, shard, value, seen)
            loader(param, value, *args, **kwargs)
            if shard is None and isinstance(param, PerTensorScaleParameter):
                param.data.fill_(value.item())  # one scale for all shards, where old versions fill the first only
            seen[shard] = value.clone() if tensor in _SHARED else None

        return load

    def _name(self, shard: Any) -> str:
        """The checkpoint's name of `shard`, as vLLM gives it: "q", 1, a tuple of them, or None for the whole layer."""
        picked = _indices(shard)
        if len(self.names) == 1:
            return self.names[0]
        return self.names[picked[0]] if len(picked) == 1 and picked[0] < len(self.names) else self.prefix

    def _check_value(
        self, layer: Layer, tensor: str, shard: Any, value: torch.Tensor, seen: dict[Any, torch.Tensor | None]
    ) -> None:
        where = f"{self._name(shard)}.{tensor}"
        dtype = torch.int8 if tensor == "weight" else torch.float32
        rows = self._rows(layer, shard)
        shape: tuple[int | None, ...] = {
            "weight": (rows, self.input_size),
            "weight_scale": (rows, 1) if self.per_channel else (1,),
            "input_scale": (1,),
            "smoothing_factor": (self.input_size,),
        }[tensor]
        fits = len(shape) == value.dim() and all(w in (None, g) for w, g in zip(shape, value.shape, strict=True))
        if value.dtype != dtype or not fits:
            raise SmoothQuantError(
                where,
                expected=f"{dtype} [{', '.join('any' if n is None else str(n) for n in shape)}]",
                got=f"{value.dtype} {list(value.shape)}",
                do="calibrate the model again, or list the layer in `ignore` if it was left in floating point",
            )
        if tensor != "weight":
            _check_positive(where, value)
        for other, before in seen.items() if tensor in _SHARED else ():
            if before is not None and not torch.equal(before, value):
                raise SmoothQuantError(
                    where,
                    expected=f"the values of {self._name(other)}.{tensor}: vLLM computes both as {self.prefix}",
                    got="others",
                    do="calibrate the model again so that both share them",
                )

    def _rows(self, layer: Layer, shard: Any) -> int | None:
        """Rows of the checkpoint's tensor for `shard`, over all ranks; None where this layer's rule is not known."""
        if hasattr(layer, "org_vocab_size"):
            return int(layer.org_vocab_size)
        ranks = self.output_size // sum(self.widths)
        if ranks > 1 and type(layer).__name__ not in _KNOWN_LAYERS:
            return None
        rows = [width * ranks for width in self.widths]
        if ranks > 1 and type(layer).__name__ == "QKVParallelLinear":
            rows[1:] = [n // layer.num_kv_head_replicas for n in rows[1:]]
        picked = _indices(shard) if shard is not None else tuple(range(len(rows)))
        return sum(rows[i] for i in picked) if picked and max(picked) < len(rows) else None

    def _check_complete(self, layer: Layer, tensor: str) -> None:
        param, seen = getattr(layer, tensor), self.loaded[tensor]
        came = {index for shard in seen for index in _indices(shard)}
        # A model may have put a loader of its own in the place of ours: then only the NaN of a scale can tell.
        watching = getattr(getattr(param, "weight_loader", None), "__qualname__", "") == _WATCHER
        missing = [index for index in range(len(self.widths)) if index not in came]
        if watching and None not in seen and missing:
            raise SmoothQuantError(
                f"{self._name(missing[0])}.{tensor}",
                expected="a tensor in the checkpoint",
                got="none",
                do="copy or export the checkpoint again",
            )
        if tensor != "weight":
            # vLLM pads an output head with rows of zeros, scales included: they compute zeros, as they should.
            padding = getattr(layer, "num_org_embeddings_per_partition", None)
            _check_positive(f"{self.prefix}.{tensor}", param.data[:padding])
        elif param.dtype != torch.int8:
            raise SmoothQuantError(
                f"{self.prefix}.{tensor}", expected="int8", got=str(param.dtype), do="calibrate the model again"
            )

    def _check_bias(self, layer: Layer) -> None:
        """vLLM skips a bias its layer does not have, and leaves one the checkpoint does not have uninitialised."""
        tensors = self.config.tensors
        if tensors is None or not all(f"{name}.weight" in tensors for name in self.names):
            return
        has = getattr(layer, "bias", None) is not None
        for name in self.names:
            if (f"{name}.bias" in tensors) != has:
                raise SmoothQuantError(
                    f"{name}.bias",
                    expected="a tensor in the checkpoint" if has else "none: vLLM's layer adds no bias",
                    got="none" if has else "one",
                    do="check that config.json belongs to this checkpoint and its architecture to vLLM",
                )


_WATCHER = f"{SmoothQuantLinearMethod._watched.__qualname__}.<locals>.load"


def _indices(shard: Any) -> tuple[int, ...]:
    """Positions within a fused layer of what vLLM calls `shard`; empty where it is none we know."""
    found: list[Any] = [
        _QKV.get(s, s) if isinstance(s, str) else s for s in (shard if isinstance(shard, tuple) else (shard,))
    ]
    return tuple(found) if all(isinstance(s, int) for s in found) else ()


def _check_positive(where: str, value: torch.Tensor) -> None:
    good = torch.isfinite(value) & (value > 0)
    if not bool(good.all()):
        bad = value[~good].flatten()
        raise SmoothQuantError(
            where,
            expected="finite values above zero",
            got=f"{bad[0].item()} and {bad.numel() - 1} more such" if bad.numel() > 1 else f"{bad[0].item()}",
            do="calibrate the model again",
        )
