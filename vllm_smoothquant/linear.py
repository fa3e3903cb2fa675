"""The quantised linear layer inside vLLM.

    y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias         f only if smoothing could not be folded away

Parameters on each tensor-parallel rank, all loaded from the checkpoint (format/config.py):
    weight            int8     [out, in]           split like any weight of the layer
    weight_scale      float32  [out, 1]            split with `out`; or one per fused shard, the same on every rank
    input_scale       float32  one per fused shard, static activations only; the same on every rank
    smoothing_factor  float32  [in]                split with `in`
With 4-bit weights, instead of weight and weight_scale:
    weight_packed     int32    [out, in / 8]       split like the weight
    weight_scale      dtype of the model [out, groups]   split with both
Real = int * scale; activations are divided by f.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from .format import int4
from .format.config import Scheme
from .format.errors import SmoothQuantError
from .format.files import PACKED
from .kernels.base import frozen, request_here
from .kernels.select import select_kernel
from .loading import CheckedLoading, Layer, WholeScale


@register_weight_loader_v2_supported_method
class SmoothQuantLinearMethod(LinearMethodBase):
    """The method of one layer.

    smoothed: the layer has a smoothing_factor. when_built: called once the model is built, before this layer is used.
    """

    def __init__(self, loading: CheckedLoading, scheme: Scheme, smoothed: bool, when_built: Callable[[], None]) -> None:
        self.loading, self.scheme, self.smoothed, self.when_built = loading, scheme, smoothed, when_built

    def create_weights(
        self, layer: Layer, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        loading = self.loading
        loading.input_size, loading.output_size, loading.widths = input_size, output_size, output_partition_sizes
        layer.logical_widths = output_partition_sizes
        shards, out_features = len(output_partition_sizes), sum(output_partition_sizes)

        def scales(*shape: int) -> torch.Tensor:
            # NaN, so that check_complete sees an unfilled scale. vLLM's default dtype is the model's here.
            return torch.full(shape, float("nan"), dtype=torch.float32)

        def loader(tensor: str) -> Callable[..., None]:
            return loading.checked(layer, tensor, extra_weight_attrs["weight_loader"])

        # WEIGHT, WEIGHT SCALE
        group_size = self.scheme.weights.group_size
        if group_size is None:
            weight = torch.empty(out_features, input_size_per_partition, dtype=torch.int8)
            layer.register_parameter(
                "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader("weight"))
            )
            scale = (
                ChannelQuantScaleParameter(
                    data=scales(out_features, 1), output_dim=0, weight_loader=loader("weight_scale")
                )
                if loading.per_row
                else WholeScale(data=scales(shards), weight_loader=loader("weight_scale"))
            )
        else:
            if input_size_per_partition % group_size:
                expected = f"inputs of each rank in groups of {group_size}, which have one scale"
                fix = "serve on fewer ranks, or calibrate with a smaller --group-size"
                raise SmoothQuantError(loading.prefix, expected, f"{input_size_per_partition} inputs", fix)
            packed = torch.empty(out_features, input_size_per_partition // int4.IN_WORD, dtype=torch.int32)
            layer.register_parameter(
                PACKED,
                PackedvLLMParameter(
                    data=packed, input_dim=1, output_dim=0, packed_dim=1, packed_factor=int4.IN_WORD,
                    weight_loader=loader(PACKED),
                ),
            )  # fmt: skip
            data = scales(out_features, input_size_per_partition // group_size).to(params_dtype)
            scale = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader("weight_scale"))
        layer.register_parameter("weight_scale", scale)
        # INPUT SCALE
        static = not self.scheme.input_activations.dynamic
        layer.register_parameter(
            "input_scale",
            WholeScale(data=scales(shards), weight_loader=loader("input_scale")) if static else None,
        )
        # SMOOTHING FACTOR
        if self.smoothed:
            data, load = scales(input_size_per_partition), loader("smoothing_factor")
            layer.register_parameter("smoothing_factor", RowvLLMParameter(data=data, input_dim=0, weight_loader=load))
            # vLLM counts loaded elements when it reloads weights, and each shard loads the whole factor.
            layer.smoothing_factor.weight_loader_numel = shards * input_size_per_partition
        # vLLM's kernels expect these attributes; symmetric activations have no zero point.
        layer.register_parameter("input_zero_point", None)
        layer.register_parameter("azp_adj", None)

        channelwise, sizes = loading.per_row or shards > 1, (out_features, input_size_per_partition, input_size)
        self.kernel = select_kernel(request_here(loading.prefix, self.scheme, channelwise, params_dtype, *sizes))

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.when_built()
        if layer.weight_scale.is_meta:
            return  # vLLM took the memory away from a layer that it does not need: the head of a pooling model
        self.loading.check_complete(layer)
        weight_scale, widths = layer.weight_scale.data, self.loading.widths
        if not self.loading.per_row and len(widths) > 1:
            # One scale per shard becomes one per channel, which every kernel can use.
            repeats = torch.tensor(widths, device=weight_scale.device)
            weight_scale = weight_scale.repeat_interleave(repeats).reshape(-1, 1)
        if self.scheme.weights.group_size is None:  # kernels for 4 bits take vLLM's parameter
            layer.weight_scale = frozen(weight_scale)
        if layer.input_scale is not None:
            layer.input_scale = frozen(layer.input_scale.data[:1].clone())
        if self.smoothed:
            # A multiplication is cheaper than a division; the reciprocal is off by half a unit in the last place.
            layer.inverse_smoothing_factor = frozen(layer.smoothing_factor.data.reciprocal())
            del layer.smoothing_factor
        self.kernel.prepare(layer)

    def apply(self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] in the model's dtype, bias [out] or None: y [..., out] in x's dtype."""
        if self.smoothed and not self.kernel.smooths:
            # The product is computed in float32 and rounded to x's dtype once.
            x = (x * layer.inverse_smoothing_factor).to(x.dtype)
        y = self.kernel.apply(layer, x.reshape(-1, x.shape[-1]), bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        expected = "an output head of its own, because quantization_config does not ignore it"
        fix = f"add {self.loading.prefix!r} to `ignore` in config.json, or calibrate the model again"
        raise SmoothQuantError(self.loading.prefix, expected, "one tied to the embeddings", fix)
