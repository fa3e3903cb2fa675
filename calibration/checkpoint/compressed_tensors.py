"""Reading a compressed-tensors checkpoint as one of ours, or refusing it with the reason.

The tensors show which layers are int8. config.json must agree, and must ask for nothing that our format does not have.

Source: compressed-tensors 0.17, quantization/quant_config.py, quant_scheme.py and quant_args.py.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import (
    EXPERT,
    TRANSFORMS_FILE,
    CheckpointConfig,
    Override,
    Scheme,
    Transforms,
    Weights,
)
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import (
    MANIFEST,
    PACKED,
    Headers,
    header_faults,
    quantised_layers,
    read_headers,
    read_json,
    read_tensors,
    size_faults,
)
from vllm_smoothquant.format.int4 import IN_WORD

from ..inputs.model import empty_model, sha256, spell_as
from ..options import ACTIVATIONS
from ..running.modules import LINEAR_TYPES, own_parameters
from ..running.products import stored_experts
from . import export
from .compressed_groups import KINDS, SHAPE, STOCK, Group, patterns, read_groups, scheme_of
from .verify import hash_faults, link_faults


@dataclass(frozen=True)
class Translation:
    """What a compressed-tensors checkpoint is in our format.

    headers: of its tensors. in_float: names, in the model and in files, of the layers in floating point.
    """

    config: CheckpointConfig
    headers: Headers
    in_float: list[str]


def translate(folder: Path, config: dict[str, Any]) -> Translation:
    """Read config.json (`config`) and the headers of `folder`; no tensor is read.

    Errors (SmoothQuantError): damage, a contradiction between the two, or what our format cannot express.
    """
    _check_files(folder)
    quantization = config["quantization_config"]
    strategy, groups = read_groups(quantization)
    given = read_headers(folder)
    ignore = patterns(quantization.get("ignore") or [], "quantization_config.ignore")
    read = {name: _our_header(name, given, strategy) for name in given}
    headers = {name: header for name, header in read.items() if header is not None}
    for fault in size_faults(config, headers):
        raise fault
    schemes = {name: _stored_scheme(name, headers, strategy) for name in quantised_layers(headers)}
    if not schemes:
        expected, fix = "integers as weights", "give an int-quantized or pack-quantized checkpoint"
        raise SmoothQuantError(str(folder), expected, "none", fix)
    model = empty_model(folder)
    spell_as(model, headers)
    in_float = _float_layers(model, schemes)
    experts = {name for name in schemes if EXPERT.search(name)}
    kinds = [scheme for name, scheme in schemes.items() if name not in experts] or list(schemes.values())
    most = max(sorted(set(kinds), key=str), key=kinds.count)
    overrides = {
        name: Override(scheme.input_activations, None if scheme.weights == most.weights else scheme.weights)
        for name, scheme in schemes.items()
        if scheme != most and name not in experts
    }
    if len(expert_kinds := {schemes[name] for name in experts}) > 1:
        expected = "one scheme for all experts, because vLLM computes those of a block at once"
        raise SmoothQuantError(str(folder), expected, f"{len(expert_kinds)} schemes", STOCK)
    expert = next(iter(expert_kinds), None)
    four_bits = expert is not None and expert.weights.num_bits == 4
    # Only our own checkpoints have this file; the other format does not name it, and keeps it beside the weights.
    factors = folder / TRANSFORMS_FILE
    transforms = Transforms(sha256(factors)) if factors.is_file() else None
    ours = CheckpointConfig(
        most.weights, most.input_activations, overrides, ignore=frozenset(in_float), transforms=transforms,
        experts=(expert.input_activations if four_bits else ACTIVATIONS["token"]) if expert else None,
        expert_weights=expert.weights if expert and four_bits else None,
    )  # fmt: skip
    for fault in header_faults(ours, headers):
        raise fault
    _check_layers(model, schemes, headers, groups, ignore)
    return Translation(ours, headers, in_float)


def our_tensors(folder: Path, headers: Headers) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `folder` as `headers` of `translate` has them. SmoothQuantError: a zero point that is not zero."""
    for name, tensor in read_tensors(folder):
        if name.endswith(f".{SHAPE}"):
            continue
        if name in headers:
            scale = name.rpartition(".")[2] in ("weight_scale", "input_scale")
            yield name, tensor.float().reshape(headers[name][1]) if scale else tensor
        elif tensor.any():
            raise SmoothQuantError(name, "zeros: symmetric integers", "others", STOCK)


def their_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of our checkpoint `folder`, and the shape of each packed weight."""
    for name, tensor in read_tensors(folder):
        yield name, tensor
        if name.endswith(f".{PACKED}"):
            shape = torch.tensor([tensor.shape[0], tensor.shape[1] * IN_WORD])
            yield name.removesuffix(PACKED) + SHAPE, shape


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """(name, module, its names in files) of each matrix of `model` that vLLM may build as a linear layer."""
    for name, module in model.named_modules():
        weight = own_parameters(module).get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            keys = export.file_names(model, f"{name}.weight")
            yield name, module, [key.removesuffix(".weight") for key in keys]


def _check_files(folder: Path) -> None:
    for fault in link_faults(folder):
        raise fault
    if (folder / MANIFEST).exists():
        for fault in hash_faults(folder, read_json(folder / MANIFEST)):
            fix = f"copy it again, or remove {MANIFEST} if the change is meant"
            raise SmoothQuantError(fault.where, fault.expected, fault.got, fix)


def _stored_scheme(name: str, headers: Headers, strategy: str) -> Scheme:
    """By the tensors of a quantised layer. Dynamic scales are per token, because read_groups refuses others."""
    if f"{name}.{PACKED}" in headers:
        inputs = headers[f"{name}.{PACKED}"][1][-1] * IN_WORD
        groups = (headers.get(f"{name}.weight_scale", ("", ()))[1] or (1,))[-1]
        return Scheme(Weights("group", inputs // max(groups, 1), num_bits=4), ACTIVATIONS["none"])
    return Scheme(Weights(strategy), ACTIVATIONS["static" if f"{name}.input_scale" in headers else "token"])


def _check_layers(
    model: PreTrainedModel, schemes: dict[str, Scheme], headers: Headers, groups: list[Group], ignore: list[str]
) -> None:
    """SmoothQuantError if tensors (`schemes`: of quantised layers) and configuration disagree."""

    def described(scheme: Scheme | None) -> str:
        if scheme is None:
            return "floating point"
        kind = next(kind for kind, activations in ACTIVATIONS.items() if activations == scheme.input_activations)
        size = scheme.weights.group_size
        weights = "int8 weights" if size is None else f"4-bit weights in groups of {size}"
        return f"{weights} with {KINDS[kind]} activations"

    def check(file: str, expected: Scheme | None) -> None:
        got, stored = schemes.get(file), ("weight", PACKED)
        if any(f"{file}.{suffix}" in headers for suffix in stored) and got != expected:
            raise SmoothQuantError(file, f"{described(expected)}, by config.json", described(got), STOCK)

    linears = set[str]()
    for name, module, files in matrices(model):
        if not isinstance(module, LINEAR_TYPES):
            continue
        linears.update(files)
        for file in files:
            if isinstance(module, Conv1D) and file in schemes:
                raise SmoothQuantError(f"{file}.weight", "a Linear weight, [out, in]", "a Conv1D weight", STOCK)
            check(file, scheme_of([file, name], groups, ignore))
    experts = stored_experts(model)
    for file in sorted(experts):
        check(file, scheme_of([file], groups, ignore))
    for file in sorted(schemes.keys() - linears - experts):
        raise SmoothQuantError(f"{file}.weight", "floating point: the weight of no linear layer", "integers", STOCK)


def _our_header(name: str, headers: Headers, strategy: str) -> tuple[str, tuple[int, ...]] | None:
    """The header in our format, which has float32 scales of one shape. None: what it does not have."""
    (owner, _, suffix), (dtype, shape) = name.rpartition("."), headers[name]
    if suffix in ("weight_zero_point", "input_zero_point", SHAPE):
        return None
    if suffix not in ("weight_scale", "input_scale") or dtype not in ("F32", "F16", "BF16"):
        return dtype, shape
    if f"{owner}.{PACKED}" in headers and suffix == "weight_scale":
        return "F32", shape
    return "F32", (prod(shape), 1) if (suffix, strategy) == ("weight_scale", "channel") else (prod(shape),)


def _float_layers(model: PreTrainedModel, int8: Collection[str]) -> list[str]:
    """Names, in `model` and in files, of the matrices that are not among the `int8` layers."""
    names = set[str]()
    for name, _, files in matrices(model):
        in_float = set(files).difference(int8)
        names |= in_float | ({name} if len(in_float) == len(files) else set())
    return sorted(names)
