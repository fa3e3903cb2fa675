"""Checkpoints as other tools write them: rounded by compressed-tensors' own functions, under its own configuration."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from tests.helpers import tiny_checkpoints

State = dict[str, torch.Tensor]

INPUTS = {
    "token": QuantizationArgs(strategy="token", dynamic=True),
    "static": QuantizationArgs(strategy="tensor", dynamic=False),
}


def save(
    folder: Path,
    model: str = "llama",
    *,
    weights: str = "channel",
    activations: str = "token",
    dtype: torch.dtype = torch.float32,
    layers: str = r".*_proj",
    before: Callable[[State], None] = lambda _: None,
) -> Path:
    """Write `model` of tiny_architectures with int8 weights in the linear layers whose names match `layers`.

    before: changes the weights before they are rounded. Scales have the model's dtype, as llm-compressor writes them.
    """
    tiny_checkpoints.save(model, folder, dtype)
    state = load_file(folder / "model.safetensors")
    before(state)
    arguments = QuantizationArgs(strategy=weights)
    for key in [key for key in state if re.fullmatch(rf"{layers}\.weight", key) and state[key].dim() == 2]:
        name, weight = key.removesuffix(".weight"), state[key]
        rows = weight if weights == "channel" else weight.reshape(1, -1)
        scale, zero = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), arguments)
        if weights == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state[key] = quantize(weight, scale, zero, arguments, dtype=torch.int8)
        state[f"{name}.weight_scale"] = scale
        if activations == "static":
            state[f"{name}.input_scale"] = torch.tensor([2**-5], dtype=dtype)
    write(folder, state)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=INPUTS[activations])
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, format="int-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    configure(folder, lambda config: config.update(quantization_config=quantization.model_dump(mode="json")))
    return folder


def write(folder: Path, state: State) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
