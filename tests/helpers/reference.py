"""The plain reading of a checkpoint: transformers' model, each quantised layer replaced by int8.linear_reference.

    y = (q(x / f) @ q_w^T) * s_x * s_w^T + bias         exact integers, float64 scaling, rounded to x's dtype once

What the plugin serves is compared with this, so it shares the format and the rounding rule with it and nothing else:
tensors come straight from the safetensors files, and vLLM is not imported. Slow; for tests, verification and debugging.

GPT-2's Conv1D keeps the hub's layout: its int8 weight is [in, out] in the file, because vLLM's loader transposes every
c_attn/c_proj/c_fc weight it meets; its weight_scale is [out, 1] all the same.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import header_faults, read_headers, read_tensors

QUANTISED_TENSORS = ("weight", "weight_scale", "input_scale", "smoothing_factor")


class ReferenceLinear(nn.Module):
    """One quantised layer: tensors as in the checkpoint, but weight always [out, in]; bias in the model's dtype."""

    def __init__(self, tensors: dict[str, torch.Tensor], strategy: str, bias: torch.Tensor | None) -> None:
        super().__init__()
        # Not buffers: `model.to(dtype)` must leave float32 scales alone.
        self.tensors, self.strategy, self.bias = tensors, strategy, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
    """The model in `checkpoint_dir`, on CPU in eval mode; `dtype` is that of everything not quantised.

    Raises SmoothQuantError where a tensor is missing, superfluous or misshapen, or the folder is no such checkpoint.
    """
    folder = Path(checkpoint_dir)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    said = getattr(config, "quantization_config", None)
    if said is None:
        raise SmoothQuantError(
            str(folder),
            "a SmoothQuant checkpoint",
            "a model without quantization_config",
            f"run `smoothquant calibrate {folder} -o OUT` first",
        )
    quantization = CheckpointConfig.from_dict(said)
    # transformers must not look for a quantiser of that name, nor for its files: it is handed the tensors.
    del config.quantization_config
    config.transformers_weights = None

    headers = read_headers(folder)
    if not headers:
        raise SmoothQuantError(
            str(folder), "safetensors files", "none", "check the path, or export the checkpoint again"
        )
    for fault in header_faults(quantization, headers):
        raise fault
    tensors = dict(read_tensors(folder))
    layers = sorted(n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == torch.int8)
    taken = {
        layer: {s: tensors.pop(f"{layer}.{s}") for s in QUANTISED_TENSORS if f"{layer}.{s}" in tensors}
        for layer in layers
    }
    for layer in layers:
        # Something of that shape for transformers to load, taking no memory; replaced below.
        tensors[f"{layer}.weight"] = torch.zeros(()).expand(taken[layer]["weight"].shape)
    model = _float_model(folder, config, tensors, dtype)
    modules = dict(model.named_modules())
    for layer in layers:
        scheme = quantization.scheme(layer)
        assert scheme is not None  # header_faults
        _replace(model, layer, modules.get(layer), taken[layer], scheme.input_activations.strategy)
    return model.eval()


def _float_model(folder: Path, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model filled with `tensors`, by transformers' own loading.

    Its loading knows about tied weights and names that differ between hub and modules; what is still amiss afterwards
    is an error here, where transformers would warn and go on with random numbers.
    """
    # The class by name: AutoModelForCausalLM takes no state_dict.
    architecture = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise SmoothQuantError(
            f"{folder}/config.json", "an architecture of transformers", architecture, "mend config.json"
        )
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
            raise SmoothQuantError(
                f"{folder}: {names[0]}",
                f"a tensor {what}",
                "none" + (f", and so for {len(names) - 1} more" if len(names) > 1 else ""),
                "check that config.json and the safetensors files belong together, or export them again",
            )
    return model


def _replace(
    model: nn.Module, name: str, module: nn.Module | None, tensors: dict[str, torch.Tensor], strategy: str
) -> None:
    if isinstance(module, Conv1D):
        tensors["weight"] = tensors["weight"].t().contiguous()
        shape = (module.weight.shape[1], module.weight.shape[0])
    elif isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    else:
        raise SmoothQuantError(name, "a linear layer of that name in the model", type(module).__name__, "report it")
    if tuple(tensors["weight"].shape) != shape:
        raise SmoothQuantError(
            f"{name}.weight",
            f"{list(shape)}",
            f"{list(tensors['weight'].shape)}",
            "check that config.json and the safetensors files belong together",
        )
    bias = None if module.bias is None else module.bias.data
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, ReferenceLinear(tensors, strategy, bias))
