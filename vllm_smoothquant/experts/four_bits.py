"""Routed experts with 4-bit weights inside vLLM.

    h = act(x @ gate_e^T) * (x @ up_e^T)        y = sum over the chosen experts e of weight_e * h @ down_e^T

x and h are rounded to 8 bits, with a scale for each token, if the scheme says so.

Parameters on each rank, loaded from one packed matrix and its scales per expert (format/config.py):
    w13_weight_packed  int32  [experts, 2 * inner, hidden / 8]    the rows of gate, then those of up
    w2_weight_packed   int32  [experts, hidden, inner / 8]
    w13_weight_scale, w2_weight_scale  [experts, rows, groups]    one for each group of inputs
    w13_bias, w2_bias                  in the model's dtype, where the architecture has them

On CUDA the method is vLLM's own, for checkpoints of compressed-tensors, which have the same tensors (Marlin and
others). On x86 without AMX our product for 4-bit weights (kernels/four_bits.py) multiplies one expert after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.utils import set_weight_attrs

from ..format import int4
from ..format.config import Scheme
from ..format.errors import SmoothQuantError
from ..format.files import PACKED
from ..kernels.base import frozen, logger
from ..kernels.four_bits import for_product
from ..kernels.ops import int4_experts
from .int8 import ACTIVATIONS, routed, why_not_ours
from .loading import ExpertLoading


def four_bit_experts(
    prefix: str, scheme: Scheme, layer: RoutedExperts, when_built: Callable[[], None]
) -> FusedMoEMethodBase:
    """The method of one block's experts. prefix: vLLM's name of it. when_built: called once the model is built.

    Errors (SmoothQuantError): no kernel serves them here.
    """
    reason = why_not_ours(layer)
    if reason is None:
        logger.debug("%s: int4, expert by expert", prefix)
        return OurFourBitExperts(prefix, scheme, layer, when_built)
    try:
        # Here, because it exists for the platforms where our product does not run.
        from .vllm_four_bits import VllmFourBitExperts

        return VllmFourBitExperts(prefix, scheme, layer, when_built)
    except (ImportError, NotImplementedError, ValueError, AssertionError) as error:
        fix = "calibrate the model again with --ignore '*.experts.*'"
        got = f"{reason}; vLLM: {error}"
        raise SmoothQuantError(prefix, "a kernel for 4-bit experts", got, fix) from error


class OurFourBitExperts(FusedMoEMethodBase):
    """Our product, one expert after the other."""

    def __init__(self, prefix: str, scheme: Scheme, layer: RoutedExperts, when_built: Callable[[], None]) -> None:
        super().__init__(layer.moe_config)
        assert scheme.weights.group_size is not None
        self.prefix, self.group_size, self.activations = prefix, scheme.weights.group_size, scheme.input_activations
        self.loading, self.when_built = ExpertLoading(prefix, PACKED), when_built

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        inner, loader = intermediate_size_per_partition, extra_weight_attrs["weight_loader"]
        if inner % self.group_size:
            expected = f"inputs of each rank's experts in groups of {self.group_size}, which have one scale"
            fix = "serve on fewer ranks or with expert parallelism, or calibrate with a smaller --group-size"
            raise SmoothQuantError(self.prefix, expected, f"{inner} inputs", fix)
        attributes = {"quant_method": FusedMoeWeightScaleSupported.GROUP.value, "is_transposed": False}

        def register(name: str, data: torch.Tensor) -> None:
            parameter = frozen(data)
            layer.register_parameter(name, parameter)
            checked = {"weight_loader": self.loading.checked(name, loader)}
            set_weight_attrs(parameter, extra_weight_attrs | attributes | checked)

        for name, rows, inputs in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            packed = torch.empty(num_experts, rows, inputs // int4.IN_WORD, dtype=torch.int32)
            register(f"{name}_{PACKED}", packed)
            scale = torch.full((num_experts, rows, inputs // self.group_size), float("nan"), dtype=torch.float32)
            register(f"{name}_weight_scale", scale)
            if self.moe.has_bias:
                register(f"{name}_bias", torch.zeros(num_experts, rows, dtype=params_dtype))

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self.when_built()
        self.loading.check_complete(layer)
        for name in ("w13", "w2"):
            packed, scale = (getattr(layer, f"{name}_{part}").data for part in (PACKED, "weight_scale"))
            weights, scales = zip(*map(for_product, packed, scale), strict=True)
            setattr(layer, f"{name}_{PACKED}", frozen(torch.stack(weights)))
            setattr(layer, f"{name}_weight_scale", frozen(torch.stack(scales)))

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        shared_experts: Any, shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """x [tokens, hidden], topk_weights and topk_ids [tokens, choices]: [tokens, hidden] in x's dtype."""
        x, chosen, weights = routed(layer, x, topk_ids, topk_weights)
        return int4_experts(
            x, layer.w13_weight_packed, layer.w13_weight_scale, getattr(layer, "w13_bias", None),
            layer.w2_weight_packed, layer.w2_weight_scale, getattr(layer, "w2_bias", None),
            chosen, weights, ACTIVATIONS.index(layer.activation),
            self.activations.rounded,
        )  # fmt: skip
