"""The checkpoint format: names, dtypes, shapes and the strict reading of `quantization_config`.

A quantised linear layer `P` is stored as
    P.weight            int8     [out, in]
    P.weight_scale      float32  [out, 1] ("channel") or [1] ("tensor");  real = int * scale
    P.input_scale       float32  [1], only if input activations are static
    P.smoothing_factor  float32  [in], only if smoothing could not be folded away: the layer computes
                                 (x / smoothing_factor) @ weight^T
    P.bias              as in the source model
and with 4-bit weights, instead of P.weight:
    P.weight_packed     int32    [out, in / 8], eight integers in a word (int4.py)
    P.weight_scale      float32  [out, in / group_size] ("group"), of either sign
All other tensors keep their names, dtypes and shapes. TRANSFORMS_FILE has the factors that were folded into weights:
    P.input_factor      float32  [in]: columns of P were multiplied by it, because its input arrives divided
    P.output_factor     float32  [out]: rows and bias of P (or the parameters of a norm) were divided by it
and what rotated them (calibration/checkpoint/transforms.py).
docs/checkpoint_format.md describes the format in words.

The calibration host and the serving host share this file, so it needs only torch, safetensors and the standard library.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import torch

from . import int4
from .errors import SmoothQuantError

QUANT_METHOD = "smoothquant"
# In a folder of its own, because several of vLLM's loaders read every safetensors file beside config.json as weights.
TRANSFORMS_FILE = "transforms/smoothing.safetensors"
FORMAT_VERSION = 2
OLDEST_VERSION = 1  # has no `transforms`; adapters of the source model do not fit such a checkpoint, if it is smoothed

# `transformers_weights` in config.json: the weight file that transformers loads. Deliberately not a file name, because
# transformers then refuses to load and shows this text. Otherwise it casts the weights to float and drops the scales.
TRANSFORMERS_WEIGHTS = "INT8 for vLLM; transformers needs `import calibration.from_pretrained` (vllm-smoothquant) first"

# A layer of a routed expert, in checkpoint files.
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
# The layer that vLLM's attention (MLA) multiplies into other matrices; it reads the weight as floating point.
ABSORBED = "kv_b_proj"
# The matrix that rotates hidden states, in `transforms.rotation`.
STREAM = "stream"
# In a LoRA adapter that was made for a checkpoint, its key QUANT_METHOD is {"smoothing": Transforms.smoothing}.
ADAPTER_CONFIG = "adapter_config.json"

# model_type of models whose output head vLLM computes with the embeddings, whatever config.json says.
TIED_IN_VLLM = frozenset({"cohere", "cohere2"})

# model_type -> name of the layer whose rows vLLM's weight loader reorders.
REORDERED = {"bloom": "query_key_value"}

_FIX = "fix config.json, or calibrate the model again"
_T = TypeVar("_T")


def _read(cls: type[_T], value: Any, where: str, optional: tuple[str, ...] = ()) -> _T:
    """The dataclass `cls` from a JSON object. The metadata of each field holds the function that reads its value.

    Strict: an unknown key and a missing one that is not `optional` are a SmoothQuantError.
    """
    if not isinstance(value, Mapping):
        raise SmoothQuantError(where, "an object", repr(value), _FIX)
    readers = {f.name: f.metadata["read"] for f in fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in readers:
            fix = "remove it, or upgrade vllm-smoothquant if a newer version wrote this checkpoint"
            raise SmoothQuantError(f"{where}.{key}", f"one of {', '.join(readers)}", "an unknown key", fix)
    for key in sorted(readers.keys() - value.keys() - set(optional)):
        raise SmoothQuantError(f"{where}.{key}", "a value", "nothing", _FIX)
    return cls(**{key: read(value[key], f"{where}.{key}") for key, read in readers.items() if key in value})


def _choice(value: Any, where: str, allowed: tuple[Any, ...]) -> Any:
    # The types are compared too, because `True == 1` in Python.
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise SmoothQuantError(where, " or ".join(map(repr, allowed)), repr(value), _FIX)
    return value


def _names(value: Any, where: str) -> frozenset[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise SmoothQuantError(where, "a list of module names", repr(value), _FIX)
    return frozenset(value)


def _sha256(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise SmoothQuantError(where, "a sha256 in hexadecimal", repr(value)[:80], _FIX)
    return value


def _one_of(*allowed: Any) -> dict[str, Any]:
    return {"read": partial(_choice, allowed=allowed)}


# num_bits is the first key of the JSON object, but not the first argument of the constructor: hence kw_only.
@dataclass(frozen=True)
class Weights:
    """How weights are rounded: to 8 bits with one scale per output channel, or one per tensor (the paper); to 4 bits
    with one for each `group_size` inputs of a channel.
    """

    num_bits: int = field(default=8, kw_only=True, metadata=_one_of(8, 4))
    strategy: str = field(default="channel", metadata=_one_of("channel", "tensor", "group"))
    group_size: int | None = field(default=None, metadata=_one_of(*int4.GROUP_SIZES))

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "Weights":
        weights = _read(cls, value, where, optional=("group_size",))
        grouped = weights.strategy == "group"
        if grouped != (weights.num_bits == 4) or grouped != (weights.group_size is not None):
            expected = "8 bits with strategy channel or tensor, or 4 bits with strategy group and a group_size"
            raise SmoothQuantError(where, expected, repr(value), _FIX)
        return weights

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class InputActivations:
    """How activations are rounded: per_token dynamic (O1), per_tensor dynamic (O2) or per_tensor static (O3).

    num_bits 16: they are not rounded, which only 4-bit weights allow.
    """

    num_bits: int = field(default=8, kw_only=True, metadata=_one_of(8, 16))
    strategy: str = field(default="token", metadata=_one_of("token", "tensor"))
    dynamic: bool = field(default=True, metadata=_one_of(True, False))

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "InputActivations":
        activations = _read(cls, value, where)
        if activations.strategy == "token" and not activations.dynamic:
            fix = "static scales are per tensor: use strategy 'tensor'"
            raise SmoothQuantError(f"{where}.dynamic", "true with strategy 'token'", "false", fix)
        if not activations.rounded and activations != InputActivations(num_bits=16):
            expected = "strategy 'token', dynamic, with activations of 16 bits"
            raise SmoothQuantError(where, expected, repr(value), _FIX)
        return activations

    @property
    def rounded(self) -> bool:
        return self.num_bits < 16

    @property
    def dynamic_per_token(self) -> bool:
        return self.dynamic and self.strategy == "token"


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantised."""

    weights: Weights = field(default_factory=Weights)
    input_activations: InputActivations = field(default_factory=InputActivations)

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of every tensor that a layer of this scheme must have in the checkpoint."""
        if self.weights.group_size is not None:
            packed = (torch.int32, (out_features, in_features // int4.IN_WORD))
            scale = (torch.float32, (out_features, in_features // self.weights.group_size))
            return {"weight_packed": packed, "weight_scale": scale}
        scale_shape = (out_features, 1) if self.weights.strategy == "channel" else (1,)
        input_scale = {} if self.input_activations.dynamic else {"input_scale": (torch.float32, (1,))}
        weight = (torch.int8, (out_features, in_features))
        return {"weight": weight, "weight_scale": (torch.float32, scale_shape), **input_scale}


@dataclass(frozen=True)
class Override:
    """What a layer has instead of the configuration's own. weights: None if they are rounded like the others."""

    input_activations: InputActivations = field(metadata={"read": InputActivations.from_dict})
    weights: Weights | None = field(default=None, metadata={"read": Weights.from_dict})

    def to_dict(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": self.weights.to_dict()}
        return {"input_activations": asdict(self.input_activations)} | weights


def _overrides(value: Any, where: str) -> dict[str, Override]:
    if not isinstance(value, Mapping):
        raise SmoothQuantError(where, "an object", repr(value), _FIX)
    return {name: _read(Override, entry, f"{where}.{name}", optional=("weights",)) for name, entry in value.items()}


@dataclass(frozen=True)
class Transforms:
    """What was folded into the weights. smoothing: sha256 of TRANSFORMS_FILE, which has every folded factor.

    rotation: the matrices in it; STREAM among them means that the hidden states are rotated.
    """

    smoothing: str = field(metadata={"read": _sha256})
    rotation: frozenset[str] = field(default=frozenset(), metadata={"read": _names})

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "Transforms":
        return _read(cls, value, where, optional=("rotation",))

    def to_dict(self) -> dict[str, Any]:
        return {"smoothing": self.smoothing, **({"rotation": sorted(self.rotation)} if self.rotation else {})}


@dataclass(frozen=True)
class CheckpointConfig:
    """`quantization_config` in config.json. Names are module names as the checkpoint's tensors spell them.

    ignore: linear layers in floating point. overrides: layers that are rounded in another way than `weights` and
    `input_activations` say. smoothed: layers that have a `smoothing_factor`. transforms: None if nothing was folded.
    experts: how the activations of routed experts are rounded: per token, or not at all beside 4-bit weights; None if
    the experts are in floating point. expert_weights: their weights if these have 4 bits.
    """

    weights: Weights = field(default_factory=Weights, metadata={"read": Weights.from_dict})
    input_activations: InputActivations = field(
        default_factory=InputActivations, metadata={"read": InputActivations.from_dict}
    )
    overrides: Mapping[str, Override] = field(default_factory=dict, metadata={"read": _overrides})
    smoothed: frozenset[str] = field(default=frozenset(), metadata={"read": _names})
    ignore: frozenset[str] = field(default=frozenset(), metadata={"read": _names})
    transforms: Transforms | None = field(default=None, metadata={"read": Transforms.from_dict})
    experts: InputActivations | None = field(default=None, metadata={"read": InputActivations.from_dict})
    expert_weights: Weights | None = field(default=None, metadata={"read": Weights.from_dict})

    @classmethod
    def from_dict(cls, value: Any, where: str = "quantization_config") -> "CheckpointConfig":
        """Strict: an unknown key, a newer format_version or a value out of range is a SmoothQuantError."""
        if isinstance(value, Mapping):
            # These come before the other keys, whose names differ in another method and in a newer format.
            _choice(value.get("quant_method"), f"{where}.quant_method", (QUANT_METHOD,))
            at, version = f"{where}.format_version", value.get("format_version")
            if type(version) is int and version > FORMAT_VERSION:
                raise SmoothQuantError(at, f"at most {FORMAT_VERSION}", str(version), "upgrade vllm-smoothquant")
            _choice(version, at, tuple(range(OLDEST_VERSION, FORMAT_VERSION + 1)))
            value = {key: entry for key, entry in value.items() if key not in ("quant_method", "format_version")}
        config = _read(cls, value, where, optional=("overrides", "smoothed", "transforms", "experts", "expert_weights"))
        for name in sorted(config.ignore & (config.smoothed | set(config.overrides))):
            raise SmoothQuantError(f"{where}.ignore", f"{name} either ignored or quantised", "both", _FIX)
        for name in ("", *sorted(config.overrides)):
            scheme = config.scheme(name) or Scheme()
            activations = scheme.input_activations
            if (scheme.weights.num_bits == 8 and not activations.rounded) or (
                scheme.weights.num_bits == 4 and not activations.dynamic_per_token
            ):
                at = f"{where}.overrides.{name}" if name else where
                expected = "activations with a dynamic scale per token, or of 16 bits with 4-bit weights"
                raise SmoothQuantError(at, expected, f"{scheme}", _FIX)
        config._check_experts(value, where)
        return config

    def _check_experts(self, value: Any, where: str) -> None:
        if self.expert_weights is not None and (self.experts is None or self.expert_weights.num_bits != 4):
            expected = "4-bit weights, beside `experts`"
            raise SmoothQuantError(f"{where}.expert_weights", expected, repr(self.expert_weights), _FIX)
        allowed = [None, InputActivations()] + [InputActivations(num_bits=16)] * (self.expert_weights is not None)
        if self.experts not in allowed:
            expected = "dynamic per_token activations, or of 16 bits with 4-bit weights"
            fix = "calibrate the model again: no kernel for experts has other activations"
            raise SmoothQuantError(f"{where}.experts", expected, repr(value["experts"]), fix)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of from_dict, in a fixed order: equal configurations give equal bytes."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weights": self.weights.to_dict(),
            "input_activations": asdict(self.input_activations),
            "overrides": {name: self.overrides[name].to_dict() for name in sorted(self.overrides)},
            "smoothed": sorted(self.smoothed),
            "ignore": sorted(self.ignore),
            **({} if self.transforms is None else {"transforms": self.transforms.to_dict()}),
            **({} if self.experts is None else {"experts": asdict(self.experts)}),
            **({} if self.expert_weights is None else {"expert_weights": self.expert_weights.to_dict()}),
        }

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the linear layer `name`; None if it stays in floating point."""
        if name in self.ignore:
            return None
        if EXPERT.search(name):
            return self.expert_scheme
        override = self.overrides.get(name, Override(self.input_activations))
        return Scheme(override.weights or self.weights, override.input_activations)

    @property
    def expert_scheme(self) -> Scheme | None:
        """The scheme of all routed experts; None if they stay in floating point."""
        if self.experts is None:
            return None
        return Scheme(self.expert_weights or (self.weights if self.weights.num_bits == 8 else Weights()), self.experts)
