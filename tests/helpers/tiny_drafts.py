"""Tiny models with a draft that reads their hidden states: an MTP layer in the model's files, or an EAGLE model.

    save_mtp("glm4-moe", folder)    the model and its draft in one folder, as published
    save_eagle(target, folder)      a draft for the model in `target`

The next token is almost a function of the last one, because the blocks add little to the embedding, and the draft
computes that function: nearly every guess is right. A draft whose weights were loaded wrongly guesses at random.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import tiny_architectures, tiny_checkpoints

QUIET, LOUD = 0.05, 10.0  # the factors of what blocks add to the hidden states, and of the embeddings
# Architecture of the zoo -> the names of its draft in the files; {n} is the number of the model's blocks. "block": the
# decoder block; "mix": [out, 2 in], for the embedding and the hidden state; "ones": norms that change nothing; "last":
# the norm before the head. zero_centred: norms that multiply by 1 + weight.
MTP: dict[str, dict[str, Any]] = {
    "glm4-moe": {
        "block": "model.layers.{n}.", "mix": "model.layers.{n}.eh_proj", "last": "model.layers.{n}.shared_head.norm",
        "ones": ["model.layers.{n}.enorm", "model.layers.{n}.hnorm"],
    },
    "deepseek-v3": {
        "block": "model.layers.{n}.", "mix": "model.layers.{n}.eh_proj", "last": "model.layers.{n}.shared_head.norm",
        "ones": ["model.layers.{n}.enorm", "model.layers.{n}.hnorm"],
    },
    "ernie4.5-moe": {
        "block": "model.mtp_block.0.", "mix": "model.mtp_linear_proj.0", "last": "model.mtp_emb_norm.0",
        "ones": ["model.mtp_hidden_norm.0"],
    },
    "qwen3-next": {
        "block": "mtp.layers.0.", "mix": "mtp.fc", "last": "mtp.norm", "zero_centred": True,
        "ones": ["mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding"],
    },
    "qwen3.5": {
        "block": "mtp.layers.0.", "mix": "mtp.fc", "last": "mtp.norm", "zero_centred": True,
        "ones": ["mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding"],
    },
}  # fmt: skip


ERNIE = (
    "Ernie4_5_MoeConfig",
    {
        "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    },
)  # fmt: skip


def config_of(name: str, blocks: int) -> Any:
    entry = ERNIE if name == "ernie4.5-moe" else tiny_architectures.ZOO[name]
    config = copy.deepcopy(tiny_architectures.tiny_config(*entry))
    config.num_hidden_layers = blocks
    for key in ("layer_types", "mlp_layer_types"):
        if (types := getattr(config, key, None)) is not None:
            setattr(config, key, [*types, "full_attention" if key == "layer_types" else types[-1]][:blocks])
    return config


def quieten(model: torch.nn.Module) -> None:
    """Make what the blocks add to the hidden states small beside the embeddings."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(LOUD)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "out_proj")):
                parameter.mul_(QUIET)


def save_mtp(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model `name` with an MTP layer, which is the last block of a model that is one block deeper."""
    blocks, names = 2, MTP[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, blocks + 1)).eval()
    tiny_architectures.add_outliers(model, torch.Generator().manual_seed(0))
    quieten(model)
    model.to(dtype).save_pretrained(folder)
    tiny_checkpoints.tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = f"model.layers.{blocks}."
    draft = {names["block"] + key.removeprefix(last): tensors.pop(key) for key in list(tensors) if last in key}
    hidden = model.config.hidden_size
    centre = 0.0 if names.get("zero_centred") else 1.0
    draft |= {f"{norm}.weight": torch.full((hidden,), centre) for norm in names["ones"]}
    draft[f"{names['last']}.weight"] = tensors["model.norm.weight"].clone()
    draft[f"{names['mix']}.weight"] = torch.eye(hidden, 2 * hidden)
    tensors |= {key.format(n=blocks): value.to(dtype) for key, value in draft.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = config_of(name, blocks)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written |= {key: value for key, value in config.to_dict().items() if key in ("num_hidden_layers", "layer_types")}
    path.write_text(json.dumps(written | {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}))
    return folder


def eagle_config(target: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=target.vocab_size, hidden_size=target.hidden_size, intermediate_size=target.intermediate_size,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
        max_position_embeddings=target.max_position_embeddings, tie_word_embeddings=False,
    )  # fmt: skip


def save_eagle_weights(folder: Path, config: transformers.LlamaConfig, block: dict[str, Tensor], mix: Tensor) -> Path:
    """Write an EAGLE draft in the files' form. block: the tensors of a Llama block without its first norm."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layers.0.{key}": value.contiguous() for key, value in block.items()} | {"fc.weight": mix.contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["EagleLlamaForCausalLM"]}))
    return folder


def save_eagle(target: Path, folder: Path) -> Path:
    """A draft for the model in `target`, whose embeddings and head vLLM gives it."""
    config = eagle_config(transformers.AutoConfig.from_pretrained(target))
    model = transformers.LlamaForCausalLM(config)
    quieten(model)
    block = {key: value for key, value in model.model.layers[0].state_dict().items() if "input_layernorm" not in key}
    norm = load_file(target / "model.safetensors")["model.norm.weight"].float()
    mix = torch.cat([torch.diag(norm), torch.zeros(len(norm), len(norm))], dim=1)
    return save_eagle_weights(folder, config, block, mix)
