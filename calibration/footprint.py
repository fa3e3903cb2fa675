"""What a model would become under each scheme, and its size, from config.json and the headers of its safetensors.

No tensor is read, and no weight takes memory: the model is built on the meta device (inputs/model.py). A short pass,
which `calibrate` makes, cannot run there. Two things that it sees are taken from the model's structure instead: towers
are what is outside the module that owns the input embeddings, and experts are the stacked parameters that files split.
Layers that --ignore, fallbacks or a rotation would change are not considered.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from vllm_smoothquant.format.config import EXPERT, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import BYTES, FLOATS, Headers, read_header
from vllm_smoothquant.format.int4 import GROUP_SIZES

from .checkpoint.export import hub_module_name, hub_names
from .discovery.linears import choose_linears
from .inputs.model import check_source, empty_model, position_limit, spell_as
from .inputs.unread import weight_files
from .options import ACTIVATIONS
from .rounding.groups import EIGHT_BITS, group_size, schemes_of
from .running.modules import LINEAR_TYPES, output_head, own_parameters, weight_shape
from .running.products import stored_experts

FOUR_BITS = Scheme(Weights("group", GROUP_SIZES[0], num_bits=4), ACTIVATIONS["none"])
CONTEXT = 32_768  # tokens whose cache is counted, or as many as the model takes


@dataclass(frozen=True)
class Layer:
    """A layer that would be INT8. name: of its weight in files, without ".weight". shape: (out, in)."""

    name: str
    shape: tuple[int, int]
    four_bits: Scheme


def footprint(name: str) -> dict[str, Any]:
    """The kinds of the model `name` (a folder or a hub id), what would become integers, and sizes in bytes.

    Errors (SmoothQuantError): those of `calibrate` for a model that it would not load; no safetensors; a layer of
    config.json that the files lack.
    """
    config = check_source(name)
    model, headers = empty_model(name), _headers(name)
    spell_as(model, headers)
    headers = {key: header for key, header in headers.items() if key not in _tied_names(model)}
    layers = list(_layers(name, model, headers))
    rest = sum(_bytes(headers.values())) - sum(_bytes(headers[f"{layer.name}.weight"] for layer in layers))
    return {
        "kinds": _kinds(config, model, layers),
        "layers": len(layers),
        "linear_parameters": sum(prod(layer.shape) for layer in layers),
        "parameters": sum(prod(shape) for dtype, shape in headers.values() if dtype in FLOATS),
        "weight_bytes": {
            "stored": sum(_bytes(headers.values())),
            "bf16": sum(2 * prod(shape) if dtype in FLOATS else BYTES[dtype] * prod(shape)
                        for dtype, shape in headers.values()),
            "int8": rest + sum(_scheme_bytes(layer.shape, EIGHT_BITS) for layer in layers),
            "int4": rest + sum(_scheme_bytes(layer.shape, layer.four_bits) for layer in layers),
        },
        "cache": _cache(config),
    }  # fmt: skip


def _headers(name: str) -> Headers:
    """The headers of the weight files of `name`, as transformers chooses them. Of a hub id no tensor is downloaded."""
    headers: Headers = {}
    if Path(name).is_dir():
        for file in sorted(set(weight_files(Path(name)).values())):
            if file.endswith(".safetensors"):
                headers |= read_header(Path(name, file))
    else:
        try:
            files = get_safetensors_metadata(name).files_metadata.values()
        except (OSError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
            fix = "check the name and the network, or download the model and give its folder"
            raise SmoothQuantError(name, "a model with safetensors", error, fix) from error
        headers = {key: (t.dtype, tuple(t.shape)) for file in files for key, t in file.tensors.items()}
    if not headers:
        raise SmoothQuantError(name, "a model with safetensors", "none", "convert its weights to safetensors")
    if unknown := next((key for key, (dtype, _) in headers.items() if dtype not in BYTES), None):
        expected, fix = " or ".join(FLOATS), "use the floating-point model"
        raise SmoothQuantError(f"{name}: {unknown}", expected, headers[unknown][0], fix)
    return headers


def _bytes(headers: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[int]:
    return (BYTES[dtype] * prod(shape) for dtype, shape in headers)


def _scheme_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    return sum(dtype.itemsize * prod(size) for dtype, size in scheme.tensors(*shape).values())


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names in files of the tensors that are tied to others: a checkpoint stores them once."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return set(hub_names(model, {key: torch.empty(16, 16) for key in tied}))


def _text_part(model: PreTrainedModel) -> str:
    """What the names of the language part's modules begin with. Outside it are towers, projectors and heads.

    It is the least part around the input embeddings with linear layers; a module may hold embeddings of several kinds.
    """
    embeddings, modules = model.get_input_embeddings(), dict(model.named_modules())
    part = next((name for name, module in modules.items() if embeddings in module._modules.values()), "")
    linears = [name for name, module in modules.items() if isinstance(module, LINEAR_TYPES)]
    while part and not any(name.startswith(f"{part}.") for name in linears):
        part = part.rpartition(".")[0]
    return f"{part}." if part else ""


def _layers(name: str, model: PreTrainedModel, headers: Headers) -> Iterator[Layer]:
    def stored(layer: str, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        shape = headers.get(f"{layer}.weight", ("", ()))[1]
        if len(shape) != 2 or (expected is not None and shape != expected):
            wanted = "a matrix" if expected is None else f"shape {list(expected)}, by config.json"
            got = str(list(shape)) if shape else "no such tensor"
            raise SmoothQuantError(f"{name}: {layer}.weight", wanted, got, "use complete files of this model")
        return shape

    part = _text_part(model)
    linears = [linear for linear in choose_linears(model, frozenset())[0] if linear.startswith(part)]
    for linear, (four_bits, _) in schemes_of(model, linears, FOUR_BITS).items():
        module, file_name = model.get_submodule(linear), hub_module_name(model, linear)
        stored(file_name, tuple(module.get_parameter("weight").shape))
        yield Layer(file_name, weight_shape(module), four_bits)
    shapes = {expert: stored(expert, None) for expert in sorted(stored_experts(model))}
    size = group_size({columns for _, columns in shapes.values()}, GROUP_SIZES[0])
    for expert, (rows, columns) in shapes.items():
        weights = EIGHT_BITS.weights if size is None else Weights("group", size, num_bits=4)
        yield Layer(expert, (rows, columns), Scheme(weights))


def _kinds(config: PreTrainedConfig, model: PreTrainedModel, layers: list[Layer]) -> list[str]:
    """Keys of advice.table.MODELS."""
    part, head = _text_part(model), output_head(model)
    inside = [module for name, module in model.named_modules() if name.startswith(part)]
    outside = [module for name, module in model.named_modules() if not name.startswith(part)]
    stacks = (p for m in inside if not isinstance(m, nn.Conv1d) for p in own_parameters(m).values() if p.dim() == 3)
    kinds = []
    if any(EXPERT.search(layer.name) for layer in layers):
        kinds.append("experts")
    elif any(len(stack) > 1 for stack in stacks):
        kinds.append("stacked experts")
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _cache_layers(config)):
        kinds.append("hybrid")
    if any(isinstance(module, nn.Linear) and module is not head for module in outside):
        kinds.append("towers")
    return kinds or ["dense"]


def _cache_layers(config: PreTrainedConfig) -> list[Any]:
    """What transformers would cache for each decoder layer: all tokens, a window of them, or a recurrent state."""
    return DynamicCache(config=config.get_text_config()).layers


def _cache(config: PreTrainedConfig) -> dict[str, int | None]:
    """tokens, and the bytes of their keys and values in 16 bits; None: config.json does not say it in a known way.

    Recurrent states are not counted: they do not grow with the context.
    """
    text = config.get_text_config()
    limit = position_limit(text)
    tokens = CONTEXT if limit is None else min(CONTEXT, limit[1])
    width, attention = (
        _cached_values(text),
        [layer for layer in _cache_layers(config) if isinstance(layer, DynamicLayer)],
    )
    if attention and width is None:
        return {"tokens": tokens, "bytes": None}
    kept = sum(min(tokens, getattr(layer, "sliding_window", None) or tokens) for layer in attention)
    return {"tokens": tokens, "bytes": 2 * (width or 0) * kept}


def _cached_values(text: PreTrainedConfig) -> int | None:
    """Numbers that an attention layer caches for one token, by the configuration of the language part."""
    if getattr(text, "kv_lora_rank", None) is not None:  # vLLM caches one latent vector for all heads
        return int(text.kv_lora_rank + text.qk_rope_head_dim)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    shared = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        shared = 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * shared * size if isinstance(shared, int) and isinstance(size, int) else None
