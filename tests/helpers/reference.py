"""The reference for a checkpoint: transformers' model with each quantised layer replaced by int8.linear_reference.

    y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias         exact integers, float64 scaling, rounded to x's dtype once

Tests compare the plugin with this model, so that both share only the format and the rounding rule: tensors are read
directly from the safetensors files, and vLLM is not imported. Slow; for tests and debugging.

GPT-2's Conv1D has the hub's layout: its int8 weight is [in, out] in the file, because vLLM's loader transposes every
c_attn/c_proj/c_fc weight. Its weight_scale is [out, 1] nevertheless.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.checkpoint import export
from calibration.running.modules import LINEAR_TYPES
from calibration.running.products import make_linear
from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import header_faults, quantised_layers, read_headers, read_tensors

QUANTISED_TENSORS = ("weight", "weight_packed", "weight_scale", "input_scale", "smoothing_factor")


class ReferenceLinear(nn.Module):
    """A quantised layer: the checkpoint's tensors, but with the weight always [out, in]; bias in the model's dtype."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], activations: InputActivations, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        # Not buffers, because `model.to(dtype)` must not change float32 scales.
        self.tensors, self.strategy, self.bias = tensors, activations.strategy, bias
        self.rounded = activations.rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "weight_packed" in self.tensors:
            return int4.linear_reference(
                x,
                int4.unpack(self.tensors["weight_packed"]),
                self.tensors["weight_scale"],
                per_token=self.rounded,
                smoothing_factor=self.tensors.get("smoothing_factor"),
                bias=self.bias,
            )
        return int8.linear_reference(
            x,
            self.tensors["weight"],
            self.tensors["weight_scale"],
            strategy=self.strategy,
            input_scale_static=self.tensors.get("input_scale"),
            smoothing_factor=self.tensors.get("smoothing_factor"),
            bias=self.bias,
        )


def load_reference(checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `checkpoint_dir`, on the CPU in eval mode; dtype: of all layers that are not quantised.

    Errors (SmoothQuantError): a missing, extra or misshapen tensor, or a folder that is no checkpoint of ours.
    """
    folder = Path(checkpoint_dir)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(config, "quantization_config"):
        got, fix = "a model without quantization_config", f"run `smoothquant calibrate {folder} -o OUT` first"
        raise SmoothQuantError(str(folder), "a SmoothQuant checkpoint", got, fix)
    quantization = CheckpointConfig.from_dict(config.quantization_config)
    # transformers must look neither for a quantiser of that name nor for its files, because it receives the tensors.
    del config.quantization_config
    config.transformers_weights = None

    headers = read_headers(folder)
    if not headers:
        fix = "check the path, or export the checkpoint again"
        raise SmoothQuantError(str(folder), "safetensors files", "none", fix)
    for fault in header_faults(quantization, headers):
        raise fault
    tensors = dict(read_tensors(folder))
    layers = quantised_layers(headers)
    quantised = {
        layer: {s: tensors.pop(f"{layer}.{s}") for s in QUANTISED_TENSORS if f"{layer}.{s}" in tensors}
        for layer in layers
    }
    for layer in layers:
        # A placeholder of that shape, without memory, for transformers to load; replaced below.
        packed = quantised[layer].get("weight_packed")
        shape = quantised[layer]["weight"].shape if packed is None else (packed.shape[0], 8 * packed.shape[1])
        tensors[f"{layer}.weight"] = torch.zeros(()).expand(shape)
    model = _float_model(folder, config, tensors, dtype)
    make_linear(model)  # experts
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES)}
    modules = {export.hub_module_name(model, name): (name, m) for name, m in linears.items()}
    for layer in layers:
        scheme = quantization.scheme(layer)
        assert scheme is not None  # header_faults
        name, module = modules.get(layer, (layer, None))
        _replace(model, name, module, quantised[layer], scheme.input_activations)
    return model.eval()


def _float_model(folder: Path, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model with `tensors`, loaded by transformers.

    transformers handles tied weights and names that differ between hub and modules. A remaining fault is an error here;
    transformers would only warn, and continue with random numbers.
    """
    # By the name of its class, because AutoModelForCausalLM accepts no state_dict.
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        expected = "an architecture of transformers"
        raise SmoothQuantError(f"{folder}/config.json", expected, architecture, "correct config.json")
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    for what, names in (
        ("in the checkpoint", sorted(report["missing_keys"])),
        ("in the model", sorted(report["unexpected_keys"])),
        ("of the model's shape", sorted(str(key) for key in report["mismatched_keys"])),
    ):
        if names:
            got = "none" + (f", and the same for {len(names) - 1} more" if len(names) > 1 else "")
            fix = "check that config.json and the safetensors files belong together, or export them again"
            raise SmoothQuantError(f"{folder}: {names[0]}", f"a tensor {what}", got, fix)
    return model


def _replace(
    model: nn.Module, name: str, module: nn.Module | None, tensors: dict[str, torch.Tensor],
    activations: InputActivations,
) -> None:  # fmt: skip
    if isinstance(module, Conv1D):
        tensors["weight"] = tensors["weight"].t().contiguous()
        shape = (module.weight.shape[1], module.weight.shape[0])
    elif isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    else:
        raise SmoothQuantError(name, "a linear layer of that name in the model", type(module).__name__, "report it")
    if "weight" in tensors and tuple(tensors["weight"].shape) != shape:
        fix = "check that config.json and the safetensors files belong together"
        raise SmoothQuantError(f"{name}.weight", f"{list(shape)}", f"{list(tensors['weight'].shape)}", fix)
    bias = None if module.bias is None else module.bias.data
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, ReferenceLinear(tensors, activations, bias))
