"""A tiny Llama checkpoint with every feature of the format, written without the calibration pipeline."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Override, Weights

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY = 128, 4, 2, 64, 256, 2, 320

ACTIVATIONS = {
    "token": InputActivations("token", dynamic=True),
    "tensor": InputActivations("tensor", dynamic=True),
    "static": InputActivations("tensor", dynamic=False),
}

SCHEMES = [(weights, activations) for weights in ("channel", "tensor") for activations in ACTIVATIONS]

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The quantised layers, with [out, in]. Smoothing often cannot be folded away from o_proj and down_proj.
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

# Layer -> group of layers with one input and, in vLLM, one multiplication: a group has one input_scale and one factor.
INPUT_OF = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "gate_proj": "mlp", "up_proj": "mlp"}


def config(weights: str, activations: str) -> CheckpointConfig:
    """Block 0 has two smoothed layers; block 1 has an ignored, an overridden and three smoothed layers."""
    # The override differs from all other layers, so that an override without effect is visible.
    override = ACTIVATIONS["static" if activations == "token" else "token"]
    block = "model.layers.1."
    return CheckpointConfig(
        weights=Weights(weights),
        input_activations=ACTIVATIONS[activations],
        overrides={block + "mlp.down_proj": Override(override)},
        smoothed=frozenset(
            ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
            + [f"{block}self_attn.{letter}_proj" for letter in "qkv"]
        ),
        ignore=frozenset([block + "self_attn.o_proj", "lm_head"]),
    )


def tensors(quantization: CheckpointConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights whose activations have outlier channels, quantised as `quantization` says."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    values = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    shared: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = 1 + random(HIDDEN, scale=0.1)
            weight[[7, 77]] = 12.0
            values[f"{prefix}.{norm}.weight"] = weight
        for linear, (rows, columns) in LINEARS.items():
            name = f"{prefix}.{linear}"
            weight = random(rows, columns, scale=columns**-0.5)
            # Weights of outlier channels are small, as in trained models, so that the softmax does not saturate.
            weight[:, [7, 77]] *= 0.1
            if linear.startswith("self_attn"):
                values[f"{name}.bias"] = random(rows, scale=0.1)
            scheme = quantization.scheme(name)
            if scheme is None:
                values[f"{name}.weight"] = weight
                continue
            short = linear.rpartition(".")[2]
            group = f"{prefix}.{INPUT_OF.get(short, short)}"
            if name in quantization.smoothed:
                if f"{group}.factor" not in shared:
                    shared[f"{group}.factor"] = torch.rand(columns, generator=generator) * 3 + 0.5
                values[f"{name}.smoothing_factor"] = shared[f"{group}.factor"].clone()
                weight = weight * shared[f"{group}.factor"]
            values[f"{name}.weight"], values[f"{name}.weight_scale"] = int8.quantize_weight(
                weight, scheme.weights.strategy
            )
            if not scheme.input_activations.dynamic:
                if f"{group}.scale" not in shared:
                    # 127 steps reach 6.3 to 12.7, so that ordinary values fit and outliers test clipping.
                    shared[f"{group}.scale"] = torch.rand(1, generator=generator) * 0.05 + 0.05
                values[f"{name}.input_scale"] = shared[f"{group}.scale"].clone()
    values["model.norm.weight"] = 1 + random(HIDDEN, scale=0.1)
    values["lm_head.weight"] = random(VOCABULARY, HIDDEN, scale=0.2)
    return values


def write(
    folder: Path, quantization: CheckpointConfig | None, values: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    """Write a checkpoint folder; quantization None leaves `quantization_config` out."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = {} if quantization is None else {"quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps({**MODEL_CONFIG, **extra}, indent=2))
    names = sorted(values)
    files = (
        [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        if shards > 1
        else ["model.safetensors"]
    )
    for i, file in enumerate(files):
        save_file({n: values[n].contiguous() for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {n: files[i] for i in range(shards) for n in names[i::shards]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def checkpoint(folder: Path, weights: str, activations: str, **changes: object) -> Path:
    """A whole checkpoint of one scheme; `changes` replace fields of its CheckpointConfig."""
    quantization = dataclasses.replace(config(weights, activations), **changes)
    return write(folder, quantization, tensors(quantization), shards=2)


def from_model(folder: Path, model: PreTrainedModel, weights: str, activations: str) -> Path:
    """`model` with every linear layer except the output head quantised without smoothing; static scales are 0.05."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    quantization = CheckpointConfig(
        weights=Weights(weights), input_activations=ACTIVATIONS[activations], ignore=frozenset(["lm_head"])
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    values = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del values["lm_head.weight"]
    for name, module in layers.items():
        conv = isinstance(module, Conv1D)
        weight = module.weight.data.t() if conv else module.weight.data
        integers, values[f"{name}.weight_scale"] = int8.quantize_weight(weight, weights)
        values[f"{name}.weight"] = integers.t() if conv else integers
        if activations == "static":
            values[f"{name}.input_scale"] = torch.tensor([0.05])
    save_file({n: t.contiguous() for n, t in values.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": quantization.to_dict()}))
    return folder
