"""Load a floating-point causal language model and its tokenizer, or raise an error that gives the reason."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from vllm_smoothquant.format.errors import SmoothQuantError


@dataclass(frozen=True)
class Source:
    """The model to calibrate. hashes: weight file -> sha256. config_hash: sha256 of config.json."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hashes: dict[str, str]
    config_hash: str


def load(name: str, device_map: str | dict[str, Any] = "auto") -> Source:
    """Load `name` (a folder or a hub id) in its own dtype, placed by accelerate's `device_map`.

    Errors (SmoothQuantError): not found, already quantised, an architecture that transformers does not know, weights
    that are missing, unused, of another shape or not finite.
    """
    check_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map=device_map, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SmoothQuantError(name, "a causal language model with its tokenizer", error, "check the name") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if keys := sorted(map(str, info.get(fault) or ())):
            number, fix = f"{len(keys)} {fault.replace('_', ' ')}", "use a complete checkpoint of this architecture"
            raise SmoothQuantError(f"{name}: {keys[0]}", "every tensor of the files to fit the model", number, fix)
    model.eval()
    check_finite(name, model)
    folder = model_folder(name)
    return Source(name, model, tokenizer, weight_hashes(folder), sha256(folder / "config.json"))


def check_source(name: str) -> None:
    """Refuse an unknown architecture or a quantised model from config.json, before any weight is read."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        fix = "check the name and the network, or upgrade transformers"
        raise SmoothQuantError(name, "a model folder or a hub id that transformers knows", error, fix) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = f"one already quantised by {quantization.get('quant_method')!r}"
        raise SmoothQuantError(f"{name}: config.json", "a floating-point model", method, "calibrate the original model")


def check_seq_len(source: Source, seq_len: int) -> None:
    limit = getattr(source.model.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise SmoothQuantError("--seq-len", f"at most the model's {limit} positions", str(seq_len), "reduce it")


def untie_head(name: str, model: PreTrainedModel) -> None:
    """Give the output head of `model` its own weight, so that it can be rounded and the embeddings stay as they are."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise SmoothQuantError("--quantize-lm-head", "a model with an output head", f"none in {name}", "leave it out")
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def check_finite(name: str, model: torch.nn.Module) -> None:
    for key, tensor in model.state_dict().items():
        # Of the extremes, because isfinite of a whole matrix makes three others of its size.
        if tensor.is_floating_point() and not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
            raise SmoothQuantError(f"{name}: {key}", "finite weights", "NaN or infinity", "use an undamaged checkpoint")


def model_folder(name: str) -> Path:
    """The local folder of the model `name` (a folder or a hub id) that is loaded already."""
    config = cached_file(name, "config.json")
    assert config is not None  # cached_file raises if there is none
    return Path(config).parent


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each weight file, so that the manifest identifies the calibrated bytes."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {f.name: sha256(f) for f in files}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
