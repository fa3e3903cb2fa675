"""The checkpoint format: names, dtypes, shapes and the strict reading of `quantization_config`.

A quantised linear layer `P` is stored as
    P.weight            int8     [out, in]
    P.weight_scale      float32  [out, 1] ("channel") or [1] ("tensor");  real = int * scale
    P.input_scale       float32  [1], only where input activations are static
    P.smoothing_factor  float32  [in], only where smoothing could not be folded away: the layer computes
                                 (x / smoothing_factor) @ weight^T
    P.bias              as in the source model
Everything that is not a quantised linear layer keeps its name, dtype and shape. docs/checkpoint_format.md says it in
words.

The calibration host writes by this file and the serving host reads by it: torch, safetensors and the standard library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import SmoothQuantError

QUANT_METHOD = "smoothquant"
FORMAT_VERSION = 1

# `transformers_weights` in config.json: the file that transformers shall read. Without it, transformers casts the
# integers to floating point, drops the scales and warns. This is no file's name, so that it refuses, and quotes it.
TRANSFORMERS_WEIGHTS = "INT8 for vLLM; transformers needs `import calibration.from_pretrained` (vllm-smoothquant) first"


def _strict(value: Any, where: str, known: Mapping[str, Any], required: frozenset[str]) -> dict[str, Any]:
    """`value` as a dict whose keys are all `known` and include `required`; anything else is an error."""
    if not isinstance(value, Mapping):
        raise SmoothQuantError(where, "an object", repr(value), "recalibrate or mend config.json")
    for key in value:
        if key not in known:
            raise SmoothQuantError(
                f"{where}.{key}",
                f"one of {', '.join(known)}",
                "an unknown key",
                "remove it, or upgrade vllm-smoothquant if a newer one wrote this checkpoint",
            )
    for key in sorted(required):
        if key not in value:
            raise SmoothQuantError(f"{where}.{key}", "a value", "nothing", "recalibrate the model")
    return dict(value)


def _choice(value: Any, where: str, allowed: tuple[Any, ...]) -> Any:
    # `True == 1` in Python; the type must agree too.
    if not any(value == a and type(value) is type(a) for a in allowed):
        options = " or ".join(map(repr, allowed))
        raise SmoothQuantError(where, options, repr(value), "recalibrate or mend config.json")
    return value


@dataclass(frozen=True)
class Weights:
    """How weights are rounded: one scale per output channel, or one per tensor (the paper)."""

    strategy: str = "channel"
    num_bits: int = 8

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "Weights":
        v = _strict(value, where, {"num_bits": 8, "strategy": None}, frozenset({"num_bits", "strategy"}))
        return cls(
            strategy=_choice(v["strategy"], f"{where}.strategy", ("channel", "tensor")),
            num_bits=_choice(v["num_bits"], f"{where}.num_bits", (8,)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"num_bits": self.num_bits, "strategy": self.strategy}


@dataclass(frozen=True)
class InputActivations:
    """How activations are rounded: per_token dynamic (O1), per_tensor dynamic (O2) or per_tensor static (O3)."""

    strategy: str = "token"
    dynamic: bool = True
    num_bits: int = 8

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "InputActivations":
        keys = {"num_bits": 8, "strategy": None, "dynamic": None}
        v = _strict(value, where, keys, frozenset(keys))
        result = cls(
            strategy=_choice(v["strategy"], f"{where}.strategy", ("token", "tensor")),
            dynamic=_choice(v["dynamic"], f"{where}.dynamic", (True, False)),
            num_bits=_choice(v["num_bits"], f"{where}.num_bits", (8,)),
        )
        if result.strategy == "token" and not result.dynamic:
            raise SmoothQuantError(
                f"{where}.dynamic",
                "true with strategy 'token'",
                "false",
                "static scales are per tensor: use strategy 'tensor'",
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        return {"num_bits": self.num_bits, "strategy": self.strategy, "dynamic": self.dynamic}


@dataclass(frozen=True)
class Scheme:
    """What one linear layer does."""

    weights: Weights = field(default_factory=Weights)
    input_activations: InputActivations = field(default_factory=InputActivations)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of every tensor a layer of this scheme must have in the checkpoint."""
        per_channel = self.weights.strategy == "channel"
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int8, (out_features, in_features)),
            "weight_scale": (torch.float32, (out_features, 1) if per_channel else (1,)),
        }
        if not self.input_activations.dynamic:
            specs["input_scale"] = (torch.float32, (1,))
        return specs


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` in config.json. Names are module names as the checkpoint's tensors spell them.

    ignore: linear layers kept in floating point. overrides: layers whose activations are scaled otherwise than the
    rest. smoothed: layers that carry a `smoothing_factor`.
    """

    weights: Weights = field(default_factory=Weights)
    input_activations: InputActivations = field(default_factory=InputActivations)
    overrides: Mapping[str, InputActivations] = field(default_factory=dict)
    smoothed: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, value: Any, where: str = "quantization_config") -> "CheckpointConfig":
        """Strict: an unknown key, a newer format_version or a value out of range is a SmoothQuantError."""
        optional = ("overrides", "smoothed")
        required = ("weights", "input_activations", "ignore")
        keys = dict.fromkeys(("quant_method", "format_version", *required, *optional))
        if isinstance(value, Mapping):
            # Both come before the keys: another method's or a newer file's keys are rightly unknown to us.
            _choice(value.get("quant_method"), f"{where}.quant_method", (QUANT_METHOD,))
            version = value.get("format_version")
            if type(version) is int and version > FORMAT_VERSION:
                raise SmoothQuantError(
                    f"{where}.format_version", f"at most {FORMAT_VERSION}", str(version), "upgrade vllm-smoothquant"
                )
            _choice(version, f"{where}.format_version", (FORMAT_VERSION,))
        v = _strict(value, where, keys, frozenset(required))
        overrides = v.get("overrides", {})
        if not isinstance(overrides, Mapping):
            raise SmoothQuantError(f"{where}.overrides", "an object", repr(overrides), "mend config.json")
        parsed = {}
        for name, override in overrides.items():
            at = f"{where}.overrides.{name}"
            entry = _strict(override, at, {"input_activations": None}, frozenset({"input_activations"}))
            parsed[name] = InputActivations.from_dict(entry["input_activations"], f"{at}.input_activations")
        config = cls(
            weights=Weights.from_dict(v["weights"], f"{where}.weights"),
            input_activations=InputActivations.from_dict(v["input_activations"], f"{where}.input_activations"),
            overrides=parsed,
            smoothed=_names(v.get("smoothed", []), f"{where}.smoothed"),
            ignore=_names(v["ignore"], f"{where}.ignore"),
        )
        for name in sorted(config.ignore & (config.smoothed | set(parsed))):
            raise SmoothQuantError(
                f"{where}.ignore", f"{name} either ignored or quantised", "both", "recalibrate the model"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The inverse of from_dict, in a fixed order so that the same checkpoint is the same bytes."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weights": self.weights.to_dict(),
            "input_activations": self.input_activations.to_dict(),
            "overrides": {n: {"input_activations": self.overrides[n].to_dict()} for n in sorted(self.overrides)},
            "smoothed": sorted(self.smoothed),
            "ignore": sorted(self.ignore),
        }

    def scheme(self, name: str) -> Scheme | None:
        """What the linear layer `name` does; None where it stays in floating point."""
        if name in self.ignore:
            return None
        return Scheme(self.weights, self.overrides.get(name, self.input_activations))


def _names(value: Any, where: str) -> frozenset[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise SmoothQuantError(where, "a list of module names", repr(value), "mend config.json")
    return frozenset(value)


# model_type -> name of the layer its loader reorders.
REORDERED = {"bloom": "query_key_value"}
