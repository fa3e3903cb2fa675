"""Load a floating-point model, by the class that its config.json names, and its tokenizer, or say why not."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import PACKED

from ..options import PLACEMENTS, DeviceMap, Options, public_name
from ..running.modules import output_head
from ..running.offload import MORE_ROOM, check_devices, complete_map, offload_folder, take_over
from ..running.products import make_linear
from .side_files import model_folder
from .tokenizer import load_tokenizer
from .unread import is_passed_over


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
    architecture = model_class(name, check_source(name))
    path = model_folder(name)
    tokenizer = load_tokenizer(name, path)
    if isinstance(device_map, str):
        check_devices([] if device_map in PLACEMENTS else [device_map])
    else:
        check_devices(device_map.values())
        device_map = complete_map(empty_model(name), device_map)
    with offload_folder() as folder:
        try:
            model, info = architecture.from_pretrained(
                name, dtype="auto", device_map=device_map, offload_folder=folder, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            fix = MORE_ROOM if "No space left" in str(error) else "check the name"
            raise SmoothQuantError(name, f"a model of class {architecture.__name__}", error, fix) from error
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not is_passed_over(model, key)]
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if keys := sorted(map(str, info.get(fault) or ())):
                number, fix = f"{len(keys)} {fault.replace('_', ' ')}", "use a complete checkpoint of this architecture"
                raise SmoothQuantError(f"{name}: {keys[0]}", "every tensor of the files to fit the model", number, fix)
        take_over(model, Path(folder))
    model.eval()
    make_linear(model)
    check_finite(name, model)
    return Source(name, model, tokenizer, weight_hashes(path), sha256(path / "config.json"), path)


def model_class(name: str | Path, config: PreTrainedConfig) -> Any:
    """The class of transformers in `architectures`, which vLLM goes by as well; a causal model if there is none.

    Errors (SmoothQuantError): transformers has no such class, or it is one with an encoder and a decoder.
    """
    if config.is_encoder_decoder:
        got = f"{config.model_type}, an encoder and a decoder"
        raise SmoothQuantError(f"{name}/config.json", "a model of one decoder", got, "use another model")
    if not config.architectures:
        return AutoModelForCausalLM
    where, class_name = f"{name}/config.json: architectures", str(config.architectures[0])
    architecture: Any = getattr(transformers, class_name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        expected, fix = f"a class of transformers {transformers.__version__}", "upgrade transformers, or correct it"
        raise SmoothQuantError(where, expected, class_name, fix)
    if not isinstance(config, architecture.config_class):  # type: ignore[attr-defined]
        expected = f"a class for the model_type {config.model_type}"
        raise SmoothQuantError(where, expected, class_name, "correct config.json")
    if (reads := architecture.main_input_name) != "input_ids":  # type: ignore[attr-defined]
        raise SmoothQuantError(where, "a language model", f"{class_name}, which reads {reads}", "use another model")
    return architecture


def empty_model(name: str | Path) -> PreTrainedModel:
    """The model `name` in floating point on the meta device: it takes no memory, and no code from its folder runs.

    Errors (SmoothQuantError): transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        architecture = model_class(name, config)
        with torch.device("meta"):
            return architecture.from_config(config) if architecture is AutoModelForCausalLM else architecture(config)
    except SmoothQuantError:
        raise
    except Exception as error:  # for a damaged config, transformers may raise any exception
        expected, fix = "a model that transformers can build", "copy or export the checkpoint again"
        raise SmoothQuantError(f"{name}/config.json", expected, error, fix) from error


def spell_as(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Let `model`, whose weights were not loaded, know which spelling its files have: those with the tensors `names`.

    transformers reads files of several releases, and saves a model as it was read.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    for name in names:
        rename_source_key(name.replace(f".{PACKED}", ".weight"), renamings, converters)
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


def check_source(name: str) -> PreTrainedConfig:
    """The configuration; SmoothQuantError: an unknown architecture or a quantised model, before a weight is read."""
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
    return config


def check_head(source: Source, options: Options) -> None:
    """SmoothQuantError: options that go by the next word, for a model without an output head (embeddings, rewards)."""
    for asked, name, fix in (
        (options.alpha in ("grid", "learned"), f"--alpha {options.alpha}", "use --alpha auto"),
        (options.budget_ppl is not None, "--budget-ppl", "leave it out"),
    ):
        if asked and output_head(source.model) is None:
            raise SmoothQuantError(name, "a model with an output head, which has a perplexity", source.name, fix)


def position_limit(config: PreTrainedConfig) -> tuple[str, int] | None:
    """(key, positions) of the least limit in `config`, by any of the names that configs give it; None: no limit.

    -1 in a config means that positions have no limit.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")
    limits = {name: limit for name in names if isinstance(limit := getattr(config, name, None), int) and limit > 0}
    return min(limits.items(), key=lambda item: item[1], default=None)


def check_seq_len(source: Source, seq_len: int) -> None:
    """SmoothQuantError: `seq_len` is more than the positions of the model."""
    limit = position_limit(source.model.config.get_text_config())
    if limit is not None and seq_len > limit[1]:
        expected = f"at most the model's {limit[1]} positions ({limit[0]} in config.json)"
        raise SmoothQuantError("--seq-len", expected, str(seq_len), "reduce it")


def untie_head(name: str, model: PreTrainedModel) -> Callable[[], None]:
    """Give the output head of `model` its own weight, so that it can change and the embeddings stay as they are.

    Returns what takes that back.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise SmoothQuantError("--quantize-lm-head", "a model with an output head", f"none in {name}", "leave it out")
    weight, configs = head.weight, (model.config, model.config.get_text_config())
    ties = [getattr(config, "tie_word_embeddings", None) for config in configs]
    if weight is embeddings.weight:
        head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    for config in configs:
        config.tie_word_embeddings = False

    def undo() -> None:
        head.weight = weight
        for config, tie in zip(configs, ties, strict=True):
            if tie is not None:
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
