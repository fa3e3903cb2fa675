"""Reading a compressed-tensors checkpoint as one of ours, or refusing it with the reason.

The tensors show which layers are int8. config.json must agree, and must ask for nothing that our format does not have.

Source: compressed-tensors 0.17, quantization/quant_config.py, quant_scheme.py and quant_args.py.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_smoothquant.format.config import EXPERT, TRANSFORMS_FILE, CheckpointConfig, Transforms, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import (
    MANIFEST,
    Headers,
    header_faults,
    int8_layers,
    read_headers,
    read_json,
    read_tensors,
    size_faults,
)

from ..inputs.model import empty_model, sha256
from ..options import ACTIVATIONS
from ..running.modules import LINEAR_TYPES, own_parameters
from ..running.products import stored_experts
from . import export
from .verify import hash_faults, link_faults

# compressed-tensors' formats that store `weight` as int8.
FORMATS = ("int-quantized", "naive-quantized")
# The ACTIVATIONS that both formats can express.
KINDS = {"static": "static per_tensor", "token": "dynamic per_token"}
# Keys of its configuration, of a group, and of a group's weights or activations, that are read here or that do not
# change what is computed. Others (kv_cache_scheme, transform_config, output_activations) must be empty.
KEYS = {
    "quant_method", "format", "config_groups", "ignore", "quantization_status", "global_compression_ratio", "version",
    "run_compressed",
}  # fmt: skip
GROUP_KEYS = {"targets", "weights", "input_activations", "format"}
ARGUMENT_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "dynamic", "group_size", "actorder", "observer", "observer_kwargs",
    "scale_dtype", "zp_dtype",
}  # fmt: skip
# `actorder`: the order in which columns are rounded. "group" is left out, because files then hold a permutation.
ORDERS = (None, False, "weight", "static")
STOCK = "serve it with stock vLLM"


@dataclass(frozen=True)
class Translation:
    """What a compressed-tensors checkpoint is in our format.

    headers: of its tensors. in_float: names, in the model and in files, of the layers in floating point.
    """

    config: CheckpointConfig
    headers: Headers
    in_float: list[str]


@dataclass(frozen=True)
class _Group:
    """One of `config_groups`. targets: names, classes or `re:` patterns; kind: of the activations, one of KINDS."""

    targets: list[str]
    kind: str


def translate(folder: Path, config: dict[str, Any]) -> Translation:
    """Read config.json (`config`) and the headers of `folder`; no tensor is read.

    Errors (SmoothQuantError): damage, a contradiction between the two, or what our format cannot express.
    """
    _check_files(folder)
    quantization = config["quantization_config"]
    strategy, groups = _read_groups(quantization)
    ignore = _patterns(quantization.get("ignore") or [], "quantization_config.ignore")
    read = {name: _our_header(name, header, strategy) for name, header in read_headers(folder).items()}
    headers = {name: header for name, header in read.items() if header is not None}
    for fault in size_faults(config, headers):
        raise fault
    # A static scale is a tensor of the file. Dynamic scales are per token, because _read_groups refuses others.
    kinds = {name: "static" if f"{name}.input_scale" in headers else "token" for name in int8_layers(headers)}
    if not kinds:
        raise SmoothQuantError(str(folder), "int8 weights", "none", "give an int-quantized checkpoint")
    model = empty_model(folder)
    in_float = _float_layers(model, kinds)
    most = max(sorted(set(kinds.values())), key=list(kinds.values()).count)
    experts = {name for name in kinds if EXPERT.search(name)}
    overrides = {name: ACTIVATIONS[kind] for name, kind in kinds.items() if kind != most and name not in experts}
    # Only our own checkpoints have this file; the other format does not name it, and keeps it beside the weights.
    factors = folder / TRANSFORMS_FILE
    transforms = Transforms(sha256(factors)) if factors.is_file() else None
    ours = CheckpointConfig(
        Weights(strategy), ACTIVATIONS[most], overrides, ignore=frozenset(in_float), transforms=transforms,
        experts=ACTIVATIONS["token"] if experts else None,
    )  # fmt: skip
    for fault in header_faults(ours, headers):
        raise fault
    _check_layers(model, kinds, headers, groups, ignore)
    return Translation(ours, headers, in_float)


def our_tensors(folder: Path, headers: Headers) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `folder` as `headers` of `translate` has them. SmoothQuantError: a zero point that is not zero."""
    for name, tensor in read_tensors(folder):
        if name in headers:
            scale = name.rpartition(".")[2] in ("weight_scale", "input_scale")
            yield name, tensor.float().reshape(headers[name][1]) if scale else tensor
        elif tensor.any():
            raise SmoothQuantError(name, "zeros: symmetric integers", "others", STOCK)


def arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' arguments of symmetric 8-bit integers."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


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


def _read_groups(quantization: dict[str, Any]) -> tuple[str, list[_Group]]:
    """(strategy of the weights, the groups). SmoothQuantError: our format cannot express it."""
    where = "quantization_config"
    _check_keys(quantization, KEYS, where)
    _check_format(quantization.get("format"), where)
    where += ".config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SmoothQuantError(where, "groups", repr(groups), "correct config.json")
    weights, found = set[str](), list[_Group]()
    for key, group in groups.items():
        at = f"{where}.{key}"
        if not isinstance(group, dict):
            raise SmoothQuantError(at, "targets, weights and input_activations", repr(group), STOCK)
        _check_keys(group, GROUP_KEYS, at)
        if group.get("format") is not None:
            _check_format(group["format"], at)
        weights.add(_strategy(group, "weights", at, ("channel", False), ("tensor", False)))
        strategy = _strategy(group, "input_activations", at, ("tensor", False), ("token", True))
        kind = "token" if strategy == "token" else "static"
        found.append(_Group(_patterns(group.get("targets"), f"{at}.targets"), kind))
    if len(weights) > 1:
        raise SmoothQuantError(where, "one strategy for all weights", "tensor and channel", STOCK)
    return weights.pop(), found


def _check_keys(values: dict[str, Any], known: Collection[str], where: str) -> None:
    """SmoothQuantError if `values` has a value, other than an empty one, beside the `known` keys."""
    for key, value in values.items():
        dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if key not in known and value and not dense:
            raise SmoothQuantError(f"{where}.{key}", "none", json.dumps(value)[:200], STOCK)


def _check_format(value: Any, where: str) -> None:
    if value not in FORMATS:
        raise SmoothQuantError(f"{where}.format", " or ".join(FORMATS), repr(value), STOCK)


def _strategy(group: dict[str, Any], key: str, where: str, *allowed: tuple[str, bool]) -> str:
    """The strategy of group[key], if it is symmetric int8 of one of the `allowed` (strategy, dynamic)."""
    given = group.get(key) or {}
    if not isinstance(given, dict):
        raise SmoothQuantError(f"{where}.{key}", "an object", repr(given)[:200], "correct config.json")
    _check_keys(given, ARGUMENT_KEYS, f"{where}.{key}")
    defaults = arguments("channel" if given.get("group_size") == -1 else "tensor", False)
    read = {name: default if given.get(name) is None else given[name] for name, default in defaults.items()}
    regrouped = given.get("actorder") not in ORDERS or given.get("group_size") not in (None, -1)
    for strategy, dynamic in allowed if given and not regrouped else ():
        if read == arguments(strategy, dynamic):
            return strategy
    kinds = " or ".join(f"{'dynamic' if dynamic else 'static'} per_{strategy}" for strategy, dynamic in allowed)
    got = json.dumps(given)[:200] if given else "nothing"
    raise SmoothQuantError(f"{where}.{key}", f"symmetric 8-bit integers, {kinds}", got, STOCK)


def _patterns(value: Any, where: str) -> list[str]:
    """`value`, if it is a list of names, and of regular expressions after "re:"."""
    try:
        if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
            raise TypeError(repr(value)[:80])
        for pattern in value:
            if pattern.startswith("re:"):
                re.compile(pattern[3:])
    except (TypeError, re.error) as error:
        raise SmoothQuantError(where, "a list of names and re: patterns", error, "correct config.json") from error
    return value


def _matches(names: Collection[str], patterns: list[str]) -> bool:
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns for name in names)


def _kind(names: Collection[str], groups: list[_Group], ignore: list[str]) -> str | None:
    """The kind of activations of the linear layer with these `names`, by the configuration; None: in floating point.

    compressed-tensors looks for a layer's name first, and for its class second.
    """
    if _matches(names, ignore):
        return None
    found = [group.kind for values in (names, ["Linear"]) for group in groups if _matches(values, group.targets)]
    return found[0] if found else None


def _check_layers(
    model: PreTrainedModel, kinds: dict[str, str], headers: Headers, groups: list[_Group], ignore: list[str]
) -> None:
    """SmoothQuantError if tensors (`kinds`: int8 layer -> kind of its activations) and configuration disagree."""

    def described(kind: str | None) -> str:
        return "floating point" if kind is None else f"int8 weights with {KINDS[kind]} activations"

    linears = set[str]()
    for name, module, files in matrices(model):
        if not isinstance(module, LINEAR_TYPES):
            continue
        linears.update(files)
        for file in files:
            if isinstance(module, Conv1D) and file in kinds:
                raise SmoothQuantError(f"{file}.weight", "a Linear weight, [out, in]", "a Conv1D weight", STOCK)
            expected, got = _kind([file, name], groups, ignore), kinds.get(file)
            if f"{file}.weight" in headers and got != expected:
                raise SmoothQuantError(file, f"{described(expected)}, by config.json", described(got), STOCK)
    experts = stored_experts(model)
    for file in sorted(experts):
        expected, got = _kind([file], groups, ignore), kinds.get(file)
        if f"{file}.weight" in headers and got != expected:
            raise SmoothQuantError(file, f"{described(expected)}, by config.json", described(got), STOCK)
    for file in sorted(kinds.keys() - linears - experts):
        raise SmoothQuantError(f"{file}.weight", "floating point: the weight of no linear layer", "int8", STOCK)


def _our_header(name: str, header: tuple[str, tuple[int, ...]], strategy: str) -> tuple[str, tuple[int, ...]] | None:
    """The header in our format, which has float32 scales of one shape. None: a zero point, which it does not have."""
    suffix, (dtype, shape) = name.rpartition(".")[2], header
    if suffix in ("weight_zero_point", "input_zero_point"):
        return None
    if suffix not in ("weight_scale", "input_scale") or dtype not in ("F32", "F16", "BF16"):
        return header
    return "F32", (prod(shape), 1) if (suffix, strategy) == ("weight_scale", "channel") else (prod(shape),)


def _float_layers(model: PreTrainedModel, int8: Collection[str]) -> list[str]:
    """Names, in `model` and in files, of the matrices that are not among the `int8` layers."""
    names = set[str]()
    for name, _, files in matrices(model):
        in_float = set(files).difference(int8)
        names |= in_float | ({name} if len(in_float) == len(files) else set())
    return sorted(names)
