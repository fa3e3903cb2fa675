"""The tensors an architecture has, by config.json, against those of the files. No memory is taken for weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import Headers

from ..running.modules import LINEAR_TYPES
from . import export

SCALES = ("weight_scale", "input_scale", "smoothing_factor")


def build_empty(folder: Path) -> PreTrainedModel:
    """The model of `folder` on the meta device. SmoothQuantError where transformers cannot; no code of it is run."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # Of a damaged config transformers raises anything: its message is the fault reported.
        raise SmoothQuantError(
            f"{folder}/config.json",
            "a causal language model transformers can build",
            error,
            "copy or export the checkpoint again",
        ) from error
    return model


def architecture_faults(model: PreTrainedModel, headers: Headers) -> Iterator[SmoothQuantError]:
    """Every name and shape in `headers` that `model`, still in floating point, does not have, and the reverse."""

    def fault(name: str, expected: str, got: str) -> SmoothQuantError:
        return SmoothQuantError(name, expected, got, "copy or export the checkpoint again")

    model.tie_weights()
    state: dict[str, torch.Tensor] = {}
    for block in export.source_tensors(model):
        state |= export.hub_names(model, block)
    extra = {f"{name.removesuffix('.weight')}.{suffix}" for name in state for suffix in SCALES}
    for name in sorted(state.keys() | headers.keys()):
        if name not in headers:
            yield fault(name, "a tensor in the checkpoint", "none")
        elif name not in state:
            if name not in extra:
                yield fault(name, "a tensor of this architecture", "one it does not have")
        elif tuple(state[name].shape) != headers[name][1]:
            yield fault(name, f"shape {list(state[name].shape)}", str(list(headers[name][1])))


def missing_from_ignore(model: PreTrainedModel, headers: Headers, ignore: frozenset[str]) -> Iterator[SmoothQuantError]:
    """Linear layers in floating point that `ignore` does not name: vLLM would take them for quantised."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_TYPES) and name not in ignore:
            for tensor in export.hub_names(model, {f"{name}.weight": torch.empty(16, 16)}):
                if headers.get(tensor, ("", ()))[0] != "I8" and tensor.removesuffix(".weight") not in ignore:
                    yield SmoothQuantError(
                        "quantization_config.ignore",
                        f"{name}, which is in floating point",
                        "a list without it",
                        "add it, or calibrate the model again",
                    )
