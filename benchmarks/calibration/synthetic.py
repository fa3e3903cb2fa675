"""Llama models of any size with random weights, written shard by shard: to measure time and memory, not quality."""

import json
import math
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

SHARD_BYTES = 10**9

# hidden, intermediate, layers, heads, key-value heads, vocabulary of the models with these names. "1.1B" is our own: it
# has 0.92 G parameters and an untied head that is a small part of them.
SIZES = {
    "135M": (576, 1536, 30, 9, 3, 49152),
    "360M": (960, 2560, 32, 15, 5, 49152),
    "1.1B": (2048, 5632, 16, 32, 8, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "3B": (3072, 8192, 28, 24, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
}
UNTIED = ("1.1B", "70B", "405B")


def config(size: str) -> LlamaConfig:
    """The configuration of Llama `size`."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        tie_word_embeddings=size not in UNTIED, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def parameters(size: str) -> tuple[int, int]:
    """(number of all parameters, number of those in matrices of the decoder blocks)."""
    with init_empty_weights():
        model = LlamaForCausalLM(config(size))
    model.tie_weights()
    inside = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return sum(p.numel() for p in model.parameters()), inside


def write(size: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A Hugging Face folder of a random Llama `size` in BF16, created once; one shard at a time is in memory."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        model = LlamaForCausalLM(config(size))
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = filled = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            tensor = torch.empty(parameter.shape).uniform_(0.5, 4, generator=generator).to(torch.bfloat16)
        else:
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
            tensor.normal_(0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            flush()
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder)
    config(size).save_pretrained(folder)  # last: if it exists, the folder is complete
    return folder
