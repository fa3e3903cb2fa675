"""Tiny random models of every architecture under test, with outlier channels where real models have them.

`build(name)` gives a float32 model of two decoder layers, hidden size 128, head size 64 (32 where the architecture ties
it to something else) and 256 tokens, small enough for vLLM's CPU backend to serve. Norm weights and biases get a few
channels that are many times larger than the rest, and every linear bias is random: a fold that omits a bias, a reader
or a `1 +` moves the logits by percents.

A new entry is one line: the config class, and the sizes that differ from the common ones.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 256

HIDDEN = 128

# The usual names of the usual sizes; an entry overrides them. None leaves the config's own default.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Architectures whose heads divide the hidden size.
SPLIT: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}

MULTI_HEAD: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": None, "head_dim": None}

GPT: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 256}

OPT: dict[str, Any] = MULTI_HEAD | {"ffn_dim": 192, "word_embed_proj_dim": HIDDEN}

MOE: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

LOCAL_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip

MLA: dict[str, Any] = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip

GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", OPT),
    "opt-gelu": ("OPTConfig", OPT | {"activation_function": "gelu"}),
    "opt-350m": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "bloom-tied": ("BloomConfig", {"n_layer": 2, "n_head": 2, "tie_word_embeddings": True}),
    "bloom-postln": ("BloomConfig", {"n_layer": 2, "n_head": 2, "apply_residual_connection_post_layernorm": True}),
    "gpt2": ("GPT2Config", GPT),
    "gpt-neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    "gpt-neox": ("GPTNeoXConfig", MULTI_HEAD),
    "gpt-neox-serial": ("GPTNeoXConfig", MULTI_HEAD | {"use_parallel_residual": False}),
    "gpt-j": ("GPTJConfig", GPT | {"rotary_dim": 32}),
    "gpt-bigcode": ("GPTBigCodeConfig", GPT),
    "codegen": ("CodeGenConfig", GPT | {"n_head": 4, "rotary_dim": 16}),
    "llama": ("LlamaConfig", {}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-relu": ("LlamaConfig", {"hidden_act": "relu"}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "ministral": ("MinistralConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "seed-oss": ("SeedOssConfig", {}),
    "helium": ("HeliumConfig", SPLIT | {"head_dim": 64}),
    "ernie4.5": ("Ernie4_5Config", {}),
    "qwen2": ("Qwen2Config", SPLIT),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 64}),
    "gemma2-tied": ("Gemma2Config", {"query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 64}),
    "phi": ("PhiConfig", MULTI_HEAD),
    "phi3": ("Phi3Config", SPLIT),
    "falcon-7b": ("FalconConfig", MULTI_HEAD | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("FalconConfig", {
        "num_attention_heads": 4, "num_kv_heads": 2, "num_key_value_heads": None, "head_dim": None,
        "new_decoder_architecture": True,
    }),
    "falcon-rw": ("FalconConfig", MULTI_HEAD | {
        "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True,
    }),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "stablelm": ("StableLmConfig", SPLIT | {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", SPLIT | {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", SPLIT),
    "olmo": ("OlmoConfig", SPLIT),
    "olmo-clip": ("OlmoConfig", SPLIT | {"clip_qkv": 4.0}),
    "olmo2": ("Olmo2Config", SPLIT),
    "olmo3": ("Olmo3Config", SPLIT),
    "granite": ("GraniteConfig", SPLIT | {"attention_multiplier": 0.125, "residual_multiplier": 0.5}),
    "cohere": ("CohereConfig", SPLIT),
    "cohere-qknorm": ("CohereConfig", SPLIT | {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {}),
    "mpt": ("MptConfig", {"d_model": HIDDEN, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}),
    "nemotron": ("NemotronConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "persimmon": ("PersimmonConfig", MULTI_HEAD),
    "biogpt": ("BioGptConfig", MULTI_HEAD),
    "exaone4": ("Exaone4Config", SPLIT),
    "apertus": ("ApertusConfig", SPLIT),
    "bitnet": ("BitNetConfig", SPLIT),
    "diffllama": ("DiffLlamaConfig", {"head_dim": 32}),
    "mixtral": ("MixtralConfig", LOCAL_MOE),
    "qwen2-moe": ("Qwen2MoeConfig", SPLIT | MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("Qwen3MoeConfig", MOE),
    "glm4-moe": ("Glm4MoeConfig", ROUTED | {"head_dim": 64}),
    "olmoe": ("OlmoeConfig", SPLIT | MOE | {"moe_intermediate_size": None}),
    "granite-moe": ("GraniteMoeConfig", SPLIT | LOCAL_MOE),
    "phimoe": ("PhimoeConfig", SPLIT | LOCAL_MOE),
    "gpt-oss": ("GptOssConfig", LOCAL_MOE),
    "deepseek-v2": ("DeepseekV2Config", MLA | ROUTED),
    "deepseek-v3": ("DeepseekV3Config", MLA | ROUTED | {"topk_method": "noaux_tc"}),
    "bamba": ("BambaConfig", SPLIT | MAMBA | {"attn_layer_indices": [1]}),
    "falcon-h1": ("FalconH1Config", SPLIT | MAMBA | {"mamba_d_ssm": 256}),
    "granite-4-h": ("GraniteMoeHybridConfig", SPLIT | MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 192,
    }),
    "nemotron-h": ("NemotronHConfig", {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 64,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "num_hidden_layers": None,
    }),
    "jamba": ("JambaConfig", SPLIT | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 16,
        "use_mamba_kernels": False,
    }),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 64, "state_size": 16, "n_groups": 1, "chunk_size": 16}),
    "lfm2": ("Lfm2Config", SPLIT | {
        "layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "conv_dim": HIDDEN, "block_dim": HIDDEN,
    }),
    "qwen3-next": ("Qwen3NextConfig", MOE | GATED_DELTA | {"shared_expert_intermediate_size": 64}),
    "qwen3.5": ("Qwen3_5TextConfig", GATED_DELTA),
    "olmo-hybrid": ("OlmoHybridConfig", SPLIT | GATED_DELTA),
}  # fmt: skip


def config(name: str) -> Any:
    """The tiny transformers config of `name` in ZOO."""
    return tiny_config(*ZOO[name])


def tiny_config(kind: str, overrides: dict[str, Any]) -> Any:
    """The tiny config of class `kind` in transformers."""
    config_class = getattr(transformers, kind)
    aliases = config_class.attribute_map
    known = set(inspect.signature(config_class.__init__).parameters) | set(aliases)
    # An entry may use the architecture's own name for a common size.
    sizes = {k: v for k, v in COMMON.items() if k in known and aliases.get(k) not in overrides} | overrides
    return config_class(**{k: v for k, v in sizes.items() if v is not None})


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model `name` with random parameters; the same seed gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(name)).eval()
    add_outliers(model, generator)
    return model.to(dtype)


def add_outliers(model: nn.Module, generator: torch.Generator) -> None:
    """Outliers into norms (in every eighth channel, up to 16 times), random biases into linear layers."""
    with torch.no_grad():
        for owner, parameter, value in _parameters(model):
            if value.dim() != 1 or not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            spike = 2.0 ** (4 * torch.rand(value.shape, generator=generator))
            outlier = torch.where(torch.rand(value.shape, generator=generator) < 1 / 8, spike, 1.0)
            if _is_norm(owner, value):
                scaled = 1 + 0.1 * noise
                value.copy_(scaled * outlier if parameter == "weight" else 0.5 * noise * outlier)
            elif parameter == "bias":
                value.copy_(0.1 * noise)


def tokens(seed: int = 1, batch: int = 2, length: int = 16) -> torch.Tensor:
    """Random input_ids [batch, length]."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in model.modules():
        for parameter, value in owner.named_parameters(recurse=False):
            yield owner, parameter, value


def _is_norm(owner: nn.Module, value: torch.Tensor) -> bool:
    weight = getattr(owner, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.shape == value.shape
