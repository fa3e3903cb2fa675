"""Load a floating-point causal language model and its tokenizer, or raise an error that gives the reason."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

from ..options import PLACEMENTS, DeviceMap, public_name
from ..running.modules import output_head
from ..running.offload import MORE_ROOM, check_devices, complete_map, offload_folder, take_over
from ..running.products import make_linear
from .side_files import model_folder
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Source:
    """The model to calibrate. folder: its files. hashes: weight file -> sha256. config_hash: sha256 of config.json."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hashes: dict[str, str]
    config_hash: str
    folder: Path = Path()

    @property
    def public_name(self) -> str:
        """The name for what is published: a hub id as it is, a folder without its place on this machine."""
        return public_name(self.name)


def load(name: str, device_map: DeviceMap = "auto") -> Source:
    """Load `name` (a folder or a hub id) in its own dtype, placed by accelerate's `device_map` (running/offload.py).

    Errors (SmoothQuantError): not found, already quantised, an architecture that transformers does not know, a device
    map that does not fit the model or the machine, weights that are missing, unused, of another shape or not finite.
    """
    check_source(name)
    path = model_folder(name)
    tokenizer = load_tokenizer(name, path)
    if isinstance(device_map, str):
        check_devices([] if device_map in PLACEMENTS else [device_map])
    else:
        check_devices(device_map.values())
        device_map = complete_map(empty_model(name), device_map)
    with offload_folder() as folder:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", device_map=device_map, offload_folder=folder, output_loading_info=True,
                trust_remote_code=False,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            fix = MORE_ROOM if "No space left" in str(error) else "check the name"
            raise SmoothQuantError(name, "a causal language model", error, fix) from error
        _check_head(name, model, info["missing_keys"])
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if keys := sorted(map(str, info.get(fault) or ())):
                number, fix = f"{len(keys)} {fault.replace('_', ' ')}", "use a complete checkpoint of this architecture"
                raise SmoothQuantError(f"{name}: {keys[0]}", "every tensor of the files to fit the model", number, fix)
        take_over(model, Path(folder))
    model.eval()
    make_linear(model)
    check_finite(name, model)
    return Source(name, model, tokenizer, weight_hashes(path), sha256(path / "config.json"), path)


def _check_head(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """A model without an output head, such as one for embeddings, lacks that one weight and nothing else."""
    head = output_head(model)
    names = {key for key in missing if model.get_submodule(key.rpartition(".")[0]) is head}
    if names and names == set(missing):
        fix = "give a causal language model; models for embeddings and rewards are not supported"
        raise SmoothQuantError(name, f"an output head ({min(names)})", "a model without one", fix)


def empty_model(name: str | Path) -> PreTrainedModel:
    """The model `name` in floating point on the meta device: it takes no memory, and no code from its folder runs.

    Errors (SmoothQuantError): transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # for a damaged config, transformers may raise any exception
        expected, fix = "a causal language model transformers can build", "copy or export the checkpoint again"
        raise SmoothQuantError(f"{name}/config.json", expected, error, fix) from error


def check_source(name: str) -> None:
    """Refuse an unknown architecture or a quantised model from config.json, before any weight is read."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        fix = "check the name and the network, or upgrade transformers"
        if "trust_remote_code" in str(error):
            got = "one with code of its own, which is never run here"
            fix = "use a version of the model, or of transformers, that needs no such code"
            raise SmoothQuantError(name, "an architecture of transformers", got, fix) from error
        raise SmoothQuantError(name, "a model folder or a hub id that transformers knows", error, fix) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = f"one already quantised by {quantization.get('quant_method')!r}"
        raise SmoothQuantError(f"{name}: config.json", "a floating-point model", method, "calibrate the original model")


def check_seq_len(source: Source, seq_len: int) -> None:
    """SmoothQuantError: `seq_len` is more than the positions of the model, by any of the names that configs give them.

    -1 in a config means that positions have no limit.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
    config = source.model.config.get_text_config()
    limits = {name: limit for name in names if isinstance(limit := getattr(config, name, None), int) and limit > 0}
    name = min(limits, key=limits.__getitem__, default=None)
    if name is not None and seq_len > limits[name]:
        expected = f"at most the model's {limits[name]} positions ({name} in config.json)"
        raise SmoothQuantError("--seq-len", expected, str(seq_len), "reduce it")


def untie_head(name: str, model: PreTrainedModel) -> Callable[[], None]:
    """Give the output head of `model` its own weight, so that it can change and the embeddings stay as they are.

    Returns what takes that back.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise SmoothQuantError("--quantize-lm-head", "a model with an output head", f"none in {name}", "leave it out")
    weight, configs = head.weight, (model.config, model.config.get_text_config())
    ties = [config.tie_word_embeddings for config in configs]
    if weight is embeddings.weight:
        head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    for config in configs:
        config.tie_word_embeddings = False

    def undo() -> None:
        head.weight = weight
        for config, tie in zip(configs, ties, strict=True):
            config.tie_word_embeddings = tie

    return undo


def check_finite(name: str, model: torch.nn.Module) -> None:
    for key, tensor in model.state_dict().items():
        # Of the extremes, because isfinite of a whole matrix makes three others of its size.
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise SmoothQuantError(f"{name}: {key}", "finite weights", "NaN or infinity", "use an undamaged checkpoint")


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each weight file, so that the manifest identifies the calibrated bytes."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {f.name: sha256(f) for f in files}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
