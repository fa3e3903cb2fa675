"""transformers' own `from_pretrained` on our checkpoints: importing this module registers the quantiser "smoothquant".

    import calibration.from_pretrained
    model = AutoModelForCausalLM.from_pretrained(OUT)

The model computes y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias (int8.linear_reference, int4.linear_reference) on the
integers as stored. It is for inspection and comparison, not for serving. Without this import transformers refuses the
checkpoint (TRANSFORMERS_WEIGHTS in vllm_smoothquant/format/config.py).
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import EXPERT, QUANT_METHOD, CheckpointConfig, Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import (
    PACKED,
    SCALES,
    bad_scales,
    header_faults,
    quantised_layers,
    read_headers,
    read_tensors,
)

from .checkpoint.architecture import architecture_faults
from .checkpoint.export import file_names
from .running.modules import LINEAR_TYPES, own_parameters, weight_shape
from .running.products import ProductLinear, make_linear


@register_quantization_config(QUANT_METHOD)
class SmoothQuantHfConfig(QuantizationConfigMixin):
    """`quantization_config` in the form that transformers passes around."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.quant_method = QUANT_METHOD
        self.config = config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **_: Any) -> "SmoothQuantHfConfig":
        return cls(CheckpointConfig.from_dict(config_dict))

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()


class QuantizedLinear(nn.Module):
    """A quantised layer with the checkpoint's tensors as stored: int8 weight [out, in], or [in, out] of a Conv1D, or
    weight_packed int32 [out, in / 8].
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Module, scheme: Scheme, smoothed: bool) -> None:
        super().__init__()
        self.scheme, self.transposed = scheme, isinstance(linear, Conv1D)
        out_features, in_features = weight_shape(linear)
        self.register_buffer("input_scale", None)
        for suffix, (dtype, shape) in scheme.tensors(out_features, in_features).items():
            stored_shape = shape[::-1] if self.transposed and suffix == "weight" else shape
            self.register_buffer(suffix, torch.empty(stored_shape, dtype=dtype))
        self.register_buffer("smoothing_factor", torch.empty(in_features, dtype=torch.float32) if smoothed else None)
        self.register_parameter("bias", own_parameters(linear).get("bias"))

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # `model.to(float16)` must move the scales but leave their dtype.
        scales = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and name in SCALES}
        super()._apply(fn, recurse)
        for name, tensor in scales.items():
            self._buffers[name] = tensor.to(fn(torch.empty(0, device=tensor.device)).device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activations = self.scheme.input_activations
        optional = {"smoothing_factor": self.smoothing_factor, "bias": self.bias}
        if self.scheme.weights.num_bits == 4:
            integers = int4.unpack(self.get_buffer(PACKED))
            return int4.linear_reference(x, integers, self.weight_scale, per_token=activations.rounded, **optional)
        weight = self.get_buffer("weight")
        return int8.linear_reference(
            x, weight.t() if self.transposed else weight, self.weight_scale, strategy=activations.strategy,
            input_scale_static=self.input_scale, **optional,
        )  # fmt: skip


@register_quantizer(QUANT_METHOD)
class SmoothQuantQuantizer(HfQuantizer):
    """Errors (SmoothQuantError): files that do not fit the format and the architecture, scales that are not valid."""

    quantization_config: SmoothQuantHfConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            fix = "run `smoothquant calibrate MODEL -o OUT`, then load OUT"
            raise SmoothQuantError("quantization_config", "a quantised checkpoint", "a floating-point model", fix)

    def update_tp_plan(self, config: Any) -> Any:
        config.transformers_weights = None  # TRANSFORMERS_WEIGHTS, which makes transformers refuse the files
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            got, fix = "a state_dict", "give the checkpoint's folder"
            raise SmoothQuantError(type(model).__name__, "checkpoint files", got, fix)
        # Links are not followed, because the files in the hub's cache are links. An index may name any path.
        paths = [Path(os.path.abspath(file)) for file in checkpoint_files]
        folder, source = paths[0].parent, model.config.name_or_path  # a folder or a hub id
        for path in paths:
            if path.parent != folder or (os.path.isdir(source) and not path.is_relative_to(os.path.abspath(source))):
                fix = "correct the index, or copy the file"
                raise SmoothQuantError(str(path), "a file in this folder", "one outside", fix)
        config, headers = self.quantization_config.config, read_headers(folder)
        for fault in (*header_faults(config, headers), *architecture_faults(model, headers)):
            raise fault
        modules = {
            key.removesuffix(".weight"): name
            for name, module in model.named_modules()
            if isinstance(module, LINEAR_TYPES)
            for key in file_names(model, f"{name}.weight")
        }
        self.folder, self.experts = folder, {name for name in quantised_layers(headers) if EXPERT.search(name)}
        # transformers stacks the integers of experts in one parameter, but knows neither packed ones nor scales, which
        # are read afterwards.
        if self.experts:
            patterns = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*patterns, r"(^|\.)experts\..*_(scale|packed)$"}
        if self.experts and config.expert_weights is not None:
            patterns = model._keys_to_ignore_on_load_missing or ()
            stacks = (name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name)
            model._keys_to_ignore_on_load_missing = {*patterns, *(f"^{re.escape(name)}$" for name in stacks)}
        for name in quantised_layers(headers):
            if name in self.experts:
                continue
            module, scheme = modules.get(name), config.scheme(name)
            if module is None or scheme is None:
                raise SmoothQuantError(name, "a linear layer of that name in the model", "none", "use vLLM")
            linear = model.get_submodule(module)
            model.set_submodule(module, QuantizedLinear(linear, scheme, name in config.smoothed))
        in_float32 = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
        self.dtypes = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if not any(re.search(pattern, name) for pattern in in_float32)
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            # transformers leaves a renamed tensor of a quantised model in the file's dtype.
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        if self.experts:
            self._load_experts(model)
        for name, tensor in model.named_buffers():
            owner, _, suffix = name.rpartition(".")
            if suffix not in SCALES:
                continue
            four_bits = suffix == "weight_scale" and hasattr(model.get_submodule(owner), PACKED)
            bad, expected = bad_scales(tensor, signed=four_bits)
            if bad.any():
                raise SmoothQuantError(name, expected, "others", "calibrate the model again")

    def _load_experts(self, model: PreTrainedModel) -> None:
        """Replace the stacked parameters by one layer for each matrix of the files."""
        make_linear(model)
        layers = {m.file_name: name for name, m in model.named_modules() if isinstance(m, ProductLinear)}
        tensors = {name: tensor for name, tensor in read_tensors(self.folder) if EXPERT.search(name)}
        for file_name in sorted(self.experts):
            scheme, name = self.quantization_config.config.scheme(file_name), layers.get(file_name)
            if scheme is None or name is None:
                raise SmoothQuantError(file_name, "an expert of that name in the model", "none", "use vLLM")
            product = model.get_submodule(name)
            layer = QuantizedLinear(product, scheme, False)
            for suffix in scheme.tensors(*weight_shape(product)):
                getattr(layer, suffix).copy_(tensors[f"{file_name}.{suffix}"])
            model.set_submodule(name, layer.to(model.device))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False  # users copy the folder instead, because its manifest belongs to it

    @property
    def is_trainable(self) -> bool:
        return False
