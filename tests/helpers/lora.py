"""LoRA adapters in PEFT's format, random, and a model with an adapter merged into it, by LoRA's equation."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

RANK = 8


def save_adapter(folder: Path, model: nn.Module, scale: float = 0.05, seed: int = 0, **config: Any) -> Path:
    """A random adapter of every linear layer of `model` but its head, as PEFT would save it."""
    generator, tensors, targets = torch.Generator().manual_seed(seed), dict[str, torch.Tensor](), set[str]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or name == "lm_head":
            continue
        out_features, in_features = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        prefix = f"base_model.model.{name}.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(RANK, in_features, generator=generator) * scale
        tensors[f"{prefix}B.weight"] = torch.randn(out_features, RANK, generator=generator) * scale
        targets.add(name.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    common = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "task_type": "CAUSAL_LM"}
    text = json.dumps(common | {"target_modules": sorted(targets)} | config)
    (folder / "adapter_config.json").write_text(text)
    return folder


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with W += scaling * B A for each layer of the adapter in `folder`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                module = model.get_submodule(name)
                delta = scaling * tensors[key.replace("lora_A", "lora_B")] @ a
                module.weight += (delta.t() if isinstance(module, Conv1D) else delta).to(module.weight.dtype)
    return model
