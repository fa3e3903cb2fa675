"""The routed experts of a block inside vLLM.

    h = act(q(x) @ gate_e^T) * (q(x) @ up_e^T)        y = sum over the chosen experts e of weight_e * q(h) @ down_e^T

Parameters on each rank, loaded from one matrix and its scales per expert (format/config.py):
    w13_weight        int8     [experts, 2 * inner, hidden]     the rows of gate, then those of up
    w2_weight         int8     [experts, hidden, inner]
    w13_weight_scale  float32  [experts, 2 * inner, 1]          or [experts, 2], one for each matrix
    w2_weight_scale   float32  [experts, hidden, 1]             or [experts]
    w13_bias, w2_bias          in the model's dtype, where the architecture has them
Real = int * scale. Activations have a dynamic scale for each token: no kernel for experts has another one.

On CUDA, on CPUs with AMX and on Arm the kernel is vLLM's choice. On x86 without AMX vLLM has none, and our own product
(kernels/int8_experts.cpp) serves.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle import int8 as oracle
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ..format.errors import SmoothQuantError
from ..kernels.base import frozen, logger
from ..kernels.cpu import why_not_experts
from ..kernels.ops import int8_experts
from .loading import ExpertLoading

# What int8_experts.cpp computes, by its number there.
ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


class SmoothQuantExpertsMethod(FusedMoEMethodBase):
    """The method of one block's experts.

    prefix: vLLM's name of the block. per_channel: weight_scale has one row for each row of the weight. when_built:
    called once the model is built, before the experts are used.
    """

    def __init__(self, prefix: str, per_channel: bool, layer: RoutedExperts, when_built: Callable[[], None]) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.per_channel, self.when_built = prefix, per_channel, when_built
        self.loading = ExpertLoading(prefix, "weight")
        self.ours = why_not_ours(layer) is None
        if not self.ours:
            try:
                self.int8_backend, self.experts_cls = oracle.select_int8_moe_backend(config=self.moe)
            except (NotImplementedError, ValueError) as error:
                got = f"{why_not_ours(layer)}; vLLM: {error}"
                fix = "calibrate the model again with --ignore '*.experts.*'"
                raise SmoothQuantError(prefix, "a kernel for INT8 experts", got, fix) from error
        logger.debug("%s: %s", prefix, "int8_experts" if self.ours else self.experts_cls.__name__)

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        rows, inner = 2 * intermediate_size_per_partition, intermediate_size_per_partition
        loader = extra_weight_attrs["weight_loader"]

        def register(name: str, data: torch.Tensor, **attributes: Any) -> None:
            parameter = frozen(data)
            layer.register_parameter(name, parameter)
            set_weight_attrs(
                parameter, {**extra_weight_attrs, "weight_loader": self.loading.checked(name, loader), **attributes}
            )

        def scales(*shape: int) -> torch.Tensor:
            return torch.full(shape, float("nan"), dtype=torch.float32)  # so that an unfilled scale is seen

        register("w13_weight", torch.empty(num_experts, rows, hidden_size, dtype=torch.int8))
        register("w2_weight", torch.empty(num_experts, hidden_size, inner, dtype=torch.int8))
        granularity = FusedMoeWeightScaleSupported.CHANNEL if self.per_channel else FusedMoeWeightScaleSupported.TENSOR
        shapes = ((num_experts, rows, 1), (num_experts, hidden_size, 1))
        if not self.per_channel:
            shapes = ((num_experts, 2), (num_experts,))  # type: ignore[assignment]
        for name, shape in zip(("w13_weight_scale", "w2_weight_scale"), shapes, strict=True):
            register(name, scales(*shape), quant_method=granularity.value)
        if self.moe.has_bias:
            register("w13_bias", torch.zeros(num_experts, rows, dtype=params_dtype))
            register("w2_bias", torch.zeros(num_experts, hidden_size, dtype=params_dtype))
        layer.w13_input_scale = layer.w2_input_scale = None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self.when_built()
        self.loading.check_complete(layer)
        if not self.per_channel:  # every kernel takes one scale for each row
            for name, matrices in (("w13", 2), ("w2", 1)):
                rows = getattr(layer, f"{name}_weight").shape[1] // matrices
                scale = getattr(layer, f"{name}_weight_scale").data.reshape(-1, matrices)
                setattr(layer, f"{name}_weight_scale", frozen(scale.repeat_interleave(rows, dim=1)[..., None]))
        if self.ours:
            for name in ("w13", "w2"):
                weight = getattr(layer, f"{name}_weight").data.contiguous()
                setattr(layer, f"{name}_weight", frozen(weight))
                sums = [expert.sum(1, dtype=torch.int32) for expert in weight]
                layer.register_parameter(f"{name}_weight_sum", frozen(torch.stack(sums)))
                layer.register_parameter(
                    f"{name}_scale", frozen(getattr(layer, f"{name}_weight_scale").data.flatten(1))
                )
                if self.moe.has_bias:
                    setattr(layer, f"{name}_bias", frozen(getattr(layer, f"{name}_bias").data.float()))
            return
        layer.w13_weight, layer.w2_weight = map(
            frozen,
            oracle.convert_to_int8_moe_kernel_format(
                int8_backend=self.int8_backend, w13=layer.w13_weight, w2=layer.w2_weight, layer=layer,
                w13_scale=layer.w13_weight_scale,
            ),
        )  # fmt: skip
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = oracle.make_int8_moe_kernel(
            int8_backend=self.int8_backend, moe_quant_config=self.moe_quant_config, moe_config=self.moe,
            experts_cls=self.experts_cls, routing_tables=layer._expert_routing_tables(),
        )  # fmt: skip
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        if self.ours:
            return None
        return oracle.make_int8_moe_quant_config(
            int8_backend=self.int8_backend, w1_scale=layer.w13_weight_scale, w2_scale=layer.w2_weight_scale,
            w1_bias=getattr(layer, "w13_bias", None), w2_bias=getattr(layer, "w2_bias", None),
            per_act_token_quant=True, layer=layer,
        )  # fmt: skip

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        shared_experts: Any, shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        if not self.ours:
            assert self.moe_kernel is not None
            return self.moe_kernel.apply(
                x, layer.w13_weight, layer.w2_weight, topk_weights=topk_weights, topk_ids=topk_ids,
                activation=layer.activation, global_num_experts=layer.global_num_experts, expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input, shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )  # fmt: skip
        x, chosen, weights = routed(layer, x, topk_ids, topk_weights)
        return int8_experts(
            x, layer.w13_weight, layer.w13_scale, layer.w13_weight_sum, getattr(layer, "w13_bias", None),
            layer.w2_weight, layer.w2_scale, layer.w2_weight_sum, getattr(layer, "w2_bias", None),
            chosen, weights, ACTIVATIONS.index(layer.activation),
        )  # fmt: skip


def routed(
    layer: RoutedExperts, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, int32 experts of this rank, float32 weights) as our products take them; negative: an expert of another."""
    chosen = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
    if layer.apply_router_weight_on_input:  # of the one expert that a token has
        x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
    return x, chosen.to(torch.int32), topk_weights.to(torch.float32)


def why_not_ours(layer: RoutedExperts) -> str | None:
    """The reason why our own product does not serve these experts; None if it does."""
    if not current_platform.is_cpu():
        return "our own product for experts is for CPUs"
    if layer.activation not in ACTIVATIONS:
        return f"our own product for experts has no {layer.activation.value}"
    return why_not_experts()
