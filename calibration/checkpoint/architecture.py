"""The tensors that an architecture has by config.json, compared with those of the files. Weights take no memory."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import PACKED, SCALES, Headers
from vllm_smoothquant.format.int4 import IN_WORD

from ..inputs.model import spell_as
from ..inputs.unread import is_passed_over
from ..running.modules import LINEAR_TYPES
from . import export

Faults = Iterator[SmoothQuantError]


def fault(
    where: str, expected: str, got: str | BaseException, fix: str = "copy or export the checkpoint again"
) -> SmoothQuantError:
    return SmoothQuantError(where, expected, got, fix)


def architecture_faults(model: PreTrainedModel, headers: Headers) -> Faults:
    """Each name or shape that differs between `headers` and `model`, which is still in floating point.

    A checkpoint may carry tensors that transformers passes over in this architecture.
    """
    spell_as(model, headers)
    # By the configuration, because from_pretrained ties them only after it has read the files.
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    state: dict[str, torch.Tensor] = {}
    for block in export.source_tensors(model):
        state |= export.hub_names(model, {key: tensor for key, tensor in block.items() if key not in tied})
    scales = {f"{name.removesuffix('.weight')}.{suffix}" for name in state for suffix in SCALES}
    packed = {name: f"{name.removesuffix('.weight')}.{PACKED}" for name in state}
    packed = {name: stored for name, stored in packed.items() if stored in headers}
    for name in sorted(state.keys() | (headers.keys() - packed.values())):
        if name in packed:
            (rows, columns), stored = state[name].shape, headers[packed[name]][1]
            if stored != (rows, columns // IN_WORD) or name in headers:
                yield fault(packed[name], f"shape {[rows, columns // IN_WORD]}, and no {name}", str(list(stored)))
        elif name not in headers:
            yield fault(name, "a tensor in the checkpoint", "none")
        elif name not in state:
            if name not in scales and not is_passed_over(model, name):
                yield fault(name, "a tensor of this architecture", "one it does not have")
        elif tuple(state[name].shape) != headers[name][1]:
            yield fault(name, f"shape {list(state[name].shape)}", str(list(headers[name][1])))


def missing_from_ignore(model: PreTrainedModel, headers: Headers, ignore: frozenset[str]) -> Faults:
    """Linear layers in floating point that `ignore` does not name: vLLM would treat them as quantised."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_TYPES) and name not in ignore:
            for key in export.file_names(model, f"{name}.weight"):
                layer = key.removesuffix(".weight")
                quantised = headers.get(key, ("",))[0] == "I8" or f"{layer}.{PACKED}" in headers
                if not quantised and layer not in ignore:
                    where, expected = "quantization_config.ignore", f"{name}, which is in floating point"
                    yield fault(where, expected, "a list without it", "add it, or calibrate the model again")
