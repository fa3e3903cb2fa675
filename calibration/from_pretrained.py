"""transformers' own `from_pretrained` on our checkpoints: importing this module teaches it the quantiser "smoothquant".

    import calibration.from_pretrained
    model = AutoModelForCausalLM.from_pretrained(OUT)

The model computes y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias as reference.py does, on the integers as stored: to look
at and to compare with, not to serve. Without this import transformers refuses the checkpoint (TRANSFORMERS_WEIGHTS in
checkpoint.py).
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

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import QUANT_METHOD, CheckpointConfig, Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import header_faults, read_headers

from .checkpoint.architecture import SCALES, architecture_faults
from .running.modules import LINEAR_TYPES, own_parameters, weight_shape


@register_quantization_config(QUANT_METHOD)
class SmoothQuantHfConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers carries it about."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.quant_method = QUANT_METHOD
        self.config = config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **_: Any) -> "SmoothQuantHfConfig":
        return cls(CheckpointConfig.from_dict(config_dict))

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()


class Int8Linear(nn.Module):
    """One quantised layer with the checkpoint's tensors as they are in the file; a Conv1D's weight is [in, out]."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Module, scheme: Scheme, smoothed: bool) -> None:
        super().__init__()
        self.strategy, self.transposed = scheme.input_activations.strategy, isinstance(linear, Conv1D)
        out_features, in_features = weight_shape(linear)
        self.register_buffer("input_scale", None)
        for suffix, (dtype, shape) in scheme.tensors(out_features, in_features).items():
            turned = shape[::-1] if self.transposed and suffix == "weight" else shape
            self.register_buffer(suffix, torch.empty(turned, dtype=dtype))
        self.register_buffer("smoothing_factor", torch.empty(in_features, dtype=torch.float32) if smoothed else None)
        self.register_parameter("bias", own_parameters(linear).get("bias"))

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        # `model.to(bfloat16)` moves scales, and leaves them in float32.
        scales = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and name in SCALES}
        super()._apply(fn, recurse)
        for name, tensor in scales.items():
            self._buffers[name] = tensor.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int8.linear_reference(
            x,
            self.weight.t() if self.transposed else self.weight,
            self.weight_scale,
            strategy=self.strategy,
            input_scale_static=self.input_scale,
            smoothing_factor=self.smoothing_factor,
            bias=self.bias,
        )


@register_quantizer(QUANT_METHOD)
class SmoothQuantQuantizer(HfQuantizer):
    """Raises SmoothQuantError where the files do not fit format and architecture, or a scale is no scale."""

    quantization_config: SmoothQuantHfConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise SmoothQuantError(
                "quantization_config",
                "a checkpoint that has one",
                "one for a floating-point model",
                "run `smoothquant calibrate MODEL -o OUT`, then load OUT",
            )

    def update_tp_plan(self, config: Any) -> Any:
        config.transformers_weights = None  # the refusal: now there is somebody who reads these files
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise SmoothQuantError(
                type(model).__name__, "checkpoint files", "a state_dict", "give the checkpoint's folder"
            )
        folder = Path(os.path.abspath(checkpoint_files[0])).parent
        # What the index names; in a hub's cache the files are links, so that links are not followed here.
        named = model.config.name_or_path
        for file in checkpoint_files:
            path = Path(os.path.abspath(file))
            if path.parent != folder or (os.path.isdir(named) and not path.is_relative_to(os.path.abspath(named))):
                raise SmoothQuantError(
                    str(path), "a file in this folder", "one outside", "mend the index, or copy the file"
                )
        config, headers = self.quantization_config.config, read_headers(folder)
        for fault in (*header_faults(config, headers), *architecture_faults(model, headers)):
            raise fault
        modules = dict(model.named_modules())
        for name in [tensor.removesuffix(".weight") for tensor, (kind, _) in headers.items() if kind == "I8"]:
            owner, _, last = name.rpartition(".")
            linear, scheme = modules.get(name), config.scheme(name)
            if not isinstance(linear, LINEAR_TYPES) or scheme is None:
                raise SmoothQuantError(
                    name, "a linear layer of that name in the model", type(linear).__name__, "use vLLM"
                )
            setattr(model.get_submodule(owner), last, Int8Linear(linear, scheme, name in config.smoothed))
        float32 = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
        self.dtypes = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if not any(re.search(pattern, name) for pattern in float32)
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            # Of a quantised model transformers leaves a renamed tensor in the file's dtype.
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        for name, tensor in model.named_buffers():
            if name.endswith(SCALES) and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise SmoothQuantError(name, "finite values above zero", "others", "calibrate the model again")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False  # copy the folder: its manifest belongs to it

    @property
    def is_trainable(self) -> bool:
        return False
