"""vLLM's own method for experts with 4-bit weights: that of compressed-tensors' checkpoints, which have our tensors."""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)

from ..format.config import Scheme
from ..format.files import PACKED
from ..kernels.base import logger
from .loading import ExpertLoading

PARAMETERS = ("w13_weight_packed", "w2_weight_packed", "w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias")


class VllmFourBitExperts(CompressedTensorsWNA16MoEMethod):
    """Arguments: see four_bit_experts. Errors (ValueError and others): vLLM has no kernel."""

    def __init__(self, prefix: str, scheme: Scheme, layer: RoutedExperts, when_built: Callable[[], None]) -> None:
        size = scheme.weights.group_size
        args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=size)
        super().__init__(args, None, layer.moe_config, prefix)
        self.loading, self.when_built = ExpertLoading(prefix, PACKED), when_built
        logger.debug("%s: %s", prefix, self.experts_cls.__name__)
        if scheme.input_activations.rounded and self.input_dtype != torch.int8:
            logger.warning(
                "%s: vLLM's kernel for 4-bit experts does not round activations: they stay in 16 bits, which is more "
                "exact. VLLM_MARLIN_INPUT_DTYPE=int8 makes Marlin round them.",
                prefix,
            )

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for name in PARAMETERS:
            if (parameter := getattr(layer, name, None)) is not None:
                parameter.weight_loader = self.loading.checked(name, parameter.weight_loader)
                if name.endswith("scale"):
                    parameter.data.fill_(float("nan"))  # so that an unfilled scale is seen

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        self.when_built()
        self.loading.check_complete(layer)
        super().process_weights_after_loading(layer)
