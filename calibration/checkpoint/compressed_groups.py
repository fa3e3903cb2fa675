"""The `quantization_config` of compressed-tensors: which scheme each layer has by it, or why our format has none such.

Source: compressed-tensors 0.17, quantization/quant_config.py, quant_scheme.py and quant_args.py.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm_smoothquant.format.config import Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.int4 import GROUP_SIZES

from ..options import ACTIVATIONS

# compressed-tensors' formats that store `weight` as int8, or `weight_packed` as int32; the last one is of both.
PACK, MIXED = "pack-quantized", "mixed-precision"
FORMATS = ("int-quantized", "naive-quantized", PACK, MIXED)
FORMAT_OF_BITS = {8: "int-quantized", 4: PACK}
# The ACTIVATIONS that both formats can express.
KINDS = {"static": "static per_tensor", "token": "dynamic per_token", "none": "no rounded"}
SHAPE = "weight_shape"
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
class Group:
    """One of `config_groups`. targets: names, classes or `re:` patterns."""

    targets: list[str]
    scheme: Scheme


def arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' arguments of symmetric 8-bit integers."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def scheme_arguments(scheme: Scheme) -> dict[str, Any]:
    """compressed-tensors' `weights` and `input_activations`."""
    weights, activations = scheme.weights, scheme.input_activations
    theirs = arguments(weights.strategy, False) | {"num_bits": weights.num_bits}
    if weights.group_size is not None:
        theirs["group_size"] = weights.group_size
    rounded = arguments(activations.strategy, activations.dynamic) if activations.rounded else None
    return {"weights": theirs, "input_activations": rounded}


def read_groups(quantization: dict[str, Any]) -> tuple[str, list[Group]]:
    """(strategy of 8-bit weights, the groups). SmoothQuantError: our format cannot express it."""
    where = "quantization_config"
    _check_keys(quantization, KEYS, where)
    top = quantization.get("format")
    _check_format(top, where)
    where += ".config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SmoothQuantError(where, "groups", repr(groups), "correct config.json")
    found = list[Group]()
    for key, group in groups.items():
        at = f"{where}.{key}"
        if not isinstance(group, dict):
            raise SmoothQuantError(at, "targets, weights and input_activations", repr(group), STOCK)
        _check_keys(group, GROUP_KEYS, at)
        scheme = _group_scheme(group, at)
        own = group.get("format") is not None
        _check_format(group["format"] if own else top, at if own else "quantization_config", scheme)
        found.append(Group(patterns(group.get("targets"), f"{at}.targets"), scheme))
    strategies = {group.scheme.weights.strategy for group in found} - {"group"}
    if len(strategies) > 1:
        raise SmoothQuantError(where, "one strategy for all 8-bit weights", "tensor and channel", STOCK)
    return strategies.pop() if strategies else "channel", found


def _group_scheme(group: dict[str, Any], where: str) -> Scheme:
    weights = group.get("weights")
    if isinstance(weights, dict) and weights.get("num_bits") == 4:
        return _four_bit_scheme(group, weights, where)
    strategy = _strategy(group, "weights", where, ("channel", False), ("tensor", False))
    activations = _strategy(group, "input_activations", where, ("tensor", False), ("token", True))
    return Scheme(Weights(strategy), ACTIVATIONS["token" if activations == "token" else "static"])


def _four_bit_scheme(group: dict[str, Any], weights: dict[str, Any], where: str) -> Scheme:
    _check_keys(weights, ARGUMENT_KEYS, f"{where}.weights")
    size = weights.get("group_size")
    scheme = Scheme(Weights("group", size, num_bits=4), ACTIVATIONS["none"])
    expected = scheme_arguments(scheme)["weights"]
    read = {name: default if weights.get(name) is None else weights[name] for name, default in expected.items()}
    if size not in GROUP_SIZES or read != expected or weights.get("actorder") not in ORDERS:
        sizes = ", ".join(map(str, GROUP_SIZES))
        wanted = f"symmetric 4-bit integers in groups of {sizes} in the order of the file"
        raise SmoothQuantError(f"{where}.weights", wanted, json.dumps(weights)[:200], STOCK)
    if group.get("input_activations"):
        got = json.dumps(group["input_activations"])[:200]
        raise SmoothQuantError(f"{where}.input_activations", "none beside 4-bit weights", got, STOCK)
    return scheme


def _check_keys(values: dict[str, Any], known: Collection[str], where: str) -> None:
    """SmoothQuantError if `values` has a value, other than an empty one, beside the `known` keys."""
    for key, value in values.items():
        dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if key not in known and value and not dense:
            raise SmoothQuantError(f"{where}.{key}", "none", json.dumps(value)[:200], STOCK)


def _check_format(value: Any, where: str, scheme: Scheme | None = None) -> None:
    """SmoothQuantError if `value` is none of FORMATS, or stores weights in another way than those of `scheme`."""
    bits = None if scheme is None else scheme.weights.num_bits
    allowed = FORMATS if bits is None else (PACK,) if bits == 4 else FORMATS[:2]
    if value not in allowed:
        raise SmoothQuantError(f"{where}.format", " or ".join(allowed), repr(value), STOCK)


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


def patterns(value: Any, where: str) -> list[str]:
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


def scheme_of(names: Collection[str], groups: list[Group], ignore: list[str]) -> Scheme | None:
    """The scheme of the linear layer with these `names`, by the configuration; None: in floating point.

    compressed-tensors looks for a layer's name first, and for its class second.
    """
    if _matches(names, ignore):
        return None
    found = [group.scheme for values in (names, ["Linear"]) for group in groups if _matches(values, group.targets)]
    return found[0] if found else None
