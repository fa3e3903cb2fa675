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

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

QUANT_METHOD = "smoothquant"
FORMAT_VERSION = 1
MANIFEST = "smoothquant.json"
# `transformers_weights` in config.json: the file that transformers shall read. Without it, transformers casts the
# integers to floating point, drops the scales and warns. This is no file's name, so that it refuses, and quotes it.
TRANSFORMERS_WEIGHTS = "INT8 for vLLM; transformers needs `import calibration.from_pretrained` (vllm-smoothquant) first"


class SmoothQuantError(ValueError):
    """One fault, said in one line: where it is, what was expected, what was found, what to do next."""

    def __init__(self, where: str, *, expected: str, got: str, do: str) -> None:
        self.where, self.expected, self.got, self.do = map(_shown, (where, expected, got, do))
        super().__init__(f"{self.where}: expected {self.expected}, got {self.got}; {self.do}")

    def __reduce__(self) -> tuple[Any, ...]:
        # vLLM's workers pickle their exceptions for the parent; by default __init__ would get the message alone.
        return _rebuild, (type(self), self.where, self.expected, self.got, self.do)


def _rebuild(cls: type[SmoothQuantError], where: str, expected: str, got: str, do: str) -> SmoothQuantError:
    return cls(where, expected=expected, got=got, do=do)


def _shown(text: str) -> str:
    """`text` fit for a terminal and one line, whatever a checkpoint has in its names: no control character, no end."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _strict(value: Any, where: str, known: Mapping[str, Any], required: frozenset[str]) -> dict[str, Any]:
    """`value` as a dict whose keys are all `known` and include `required`; anything else is an error."""
    if not isinstance(value, Mapping):
        raise SmoothQuantError(where, expected="an object", got=repr(value), do="recalibrate or mend config.json")
    for key in value:
        if key not in known:
            raise SmoothQuantError(
                f"{where}.{key}",
                expected=f"one of {', '.join(known)}",
                got="an unknown key",
                do="remove it, or upgrade vllm-smoothquant if a newer one wrote this checkpoint",
            )
    for key in sorted(required):
        if key not in value:
            raise SmoothQuantError(f"{where}.{key}", expected="a value", got="nothing", do="recalibrate the model")
    return dict(value)


def _choice(value: Any, where: str, allowed: tuple[Any, ...]) -> Any:
    # `True == 1` in Python; the type must agree too.
    if not any(value == a and type(value) is type(a) for a in allowed):
        options = " or ".join(map(repr, allowed))
        raise SmoothQuantError(where, expected=options, got=repr(value), do="recalibrate or mend config.json")
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
                expected="true with strategy 'token'",
                got="false",
                do="static scales are per tensor: use strategy 'tensor'",
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
class QuantizationConfig:
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
    def from_dict(cls, value: Any, where: str = "quantization_config") -> "QuantizationConfig":
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
                    f"{where}.format_version",
                    expected=f"at most {FORMAT_VERSION}",
                    got=str(version),
                    do="upgrade vllm-smoothquant",
                )
            _choice(version, f"{where}.format_version", (FORMAT_VERSION,))
        v = _strict(value, where, keys, frozenset(required))
        overrides = v.get("overrides", {})
        if not isinstance(overrides, Mapping):
            raise SmoothQuantError(
                f"{where}.overrides", expected="an object", got=repr(overrides), do="mend config.json"
            )
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
                f"{where}.ignore",
                expected=f"{name} either ignored or quantised",
                got="both",
                do="recalibrate the model",
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
        raise SmoothQuantError(where, expected="a list of module names", got=repr(value), do="mend config.json")
    return frozenset(value)


Headers = dict[str, tuple[str, tuple[int, ...]]]
_SUFFIXES = ("weight", "weight_scale", "input_scale", "smoothing_factor", "bias")
_SAFETENSORS_NAME = {torch.int8: "I8", torch.float32: "F32"}


def read_headers(folder: str | Path) -> Headers:
    """Tensor name -> (safetensors' name of the dtype, shape) of every tensor in `folder`; reads no tensor.

    Raises SmoothQuantError where a file cannot be read, a name comes twice, or the index and the files disagree.
    """
    folder = Path(folder)
    found: Headers = {}
    home: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _read_header(path).items():
            if name in home:
                raise SmoothQuantError(
                    str(path),
                    expected=f"{name} in one file",
                    got=f"a second copy, after {home[name]}",
                    do="remove the file that does not belong to this checkpoint",
                )
            found[name], home[name] = entry, path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for name, file_name in _weight_map(index).items():
            if home.pop(name, None) != file_name:
                raise SmoothQuantError(
                    str(index), expected=f"{name} in {file_name}", got="nothing there", do="copy the missing file"
                )
        for name, file_name in home.items():
            raise SmoothQuantError(
                str(index),
                expected=f"an entry for {name}",
                got=f"it only in {file_name}",
                do="export the checkpoint again",
            )
    return found


def _read_header(path: Path) -> Headers:
    """The header of one file, as the library says that will read the tensors: it checks offsets and sizes."""
    if not path.is_file():
        raise _damaged(path, "a safetensors file", ValueError("neither a file nor a link to one"))
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, "a safetensors file", error) from error


def read_tensors(folder: str | Path, suffix: str | tuple[str, ...] = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor), one at a time, of each whose name ends with `suffix`. `read_headers` has found no fault here."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(suffix):
                    yield name, file.get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise _damaged(index, "an object with a weight_map of file names", ValueError(repr(weight_map)[:80]))
    return weight_map


MAX_JSON_BYTES = 64 * 2**20  # the largest index we know of has 15 MB


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; SmoothQuantError where there is none, or where it says one thing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError(f"a key twice, among {', '.join(sorted(value))}")
        return value

    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"no file, or one of more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes(), object_pairs_hook=once)
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "a JSON object", error) from error
    return value


def _damaged(path: Path, expected: str, error: BaseException) -> SmoothQuantError:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return SmoothQuantError(str(path), expected=expected, got=got, do="copy or export the checkpoint again")


def header_faults(config: "QuantizationConfig", tensors: Headers) -> Iterator[SmoothQuantError]:
    """Everything `tensors` alone shows to be wrong under `config`: missing, superfluous or misshapen tensors.

    Whether a linear layer was left out altogether needs the model, and whether a scale is finite needs its value.
    """

    def fault(tensor: str, expected: str, got: str) -> SmoothQuantError:
        return SmoothQuantError(tensor, expected=expected, got=got, do="export the checkpoint again")

    quantised = {name.removesuffix(".weight") for name, (dtype, _) in tensors.items() if dtype == "I8"}
    for name in sorted((config.smoothed | set(config.overrides)) - quantised):
        yield fault(
            f"{name}.weight", "int8, since quantization_config names the layer", _describe(tensors, f"{name}.weight")
        )
    scaled = {
        name.removesuffix(suffix)
        for suffix in (".weight_scale", ".input_scale", ".smoothing_factor")
        for name in tensors
        if name.endswith(suffix)
    }
    others: dict[str, list[str]] = {}
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if name in quantised and suffix not in _SUFFIXES:
            others.setdefault(name, []).append(tensor)
    for name in sorted(quantised | scaled):
        scheme = config.scheme(name)
        if scheme is None:
            yield fault(f"{name}.weight", "floating point, since quantization_config ignores it", "a quantised layer")
            continue
        dtype, shape = tensors.get(f"{name}.weight", ("", ()))
        if dtype != "I8" or len(shape) != 2:
            yield fault(f"{name}.weight", "int8 [out, in]", _describe(tensors, f"{name}.weight"))
            continue
        rows, columns = shape
        # GPT-2's Conv1D keeps [in, out], which shows in whatever has one entry for each of either.
        shapes = [tensors.get(f"{name}.{suffix}", ("", ()))[1] for suffix in ("weight_scale", "smoothing_factor")]
        if shapes[0] == (columns, 1) or (shapes[0] == (1,) and shapes[1] == (rows,)):
            rows, columns = columns, rows
        specs = scheme.tensors(rows, columns)
        if name in config.smoothed:
            specs["smoothing_factor"] = (torch.float32, (columns,))
        for tensor in others.get(name, ()):
            yield fault(tensor, "nothing: no tensor of this format", _describe(tensors, tensor))
        for suffix in ("weight_scale", "input_scale", "smoothing_factor"):
            tensor = f"{name}.{suffix}"
            if suffix not in specs:
                if tensor in tensors:
                    yield fault(tensor, "nothing, by quantization_config", _describe(tensors, tensor))
                continue
            dtype_wanted, shape_wanted = specs[suffix]
            if tensors.get(tensor) != (_SAFETENSORS_NAME[dtype_wanted], shape_wanted):
                wanted = _describe({tensor: (_SAFETENSORS_NAME[dtype_wanted], shape_wanted)}, tensor)
                yield fault(tensor, wanted, _describe(tensors, tensor))


def size_faults(config: Mapping[str, Any], tensors: Headers) -> Iterator[SmoothQuantError]:
    """Numbers of layers, heads, experts in config.json beyond what `tensors` can be: a library would try to build them.

    Every layer has a tensor of its own, and everything else that is counted is a tensor or part of a dimension. Counts
    are told by their names, as transformers' configurations choose them; positions are often counted without a tensor.
    """
    most = max((n for _, shape in tensors.values() for n in shape), default=0)
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from size_faults(value, tensors)
        elif type(value) is int and _COUNT.search(key) and not _NO_COUNT.search(key):
            bound = len(tensors) if "layer" in key else max(most, len(tensors))
            if value > bound:
                yield SmoothQuantError(
                    f"config.json: {key}",
                    expected=f"at most {bound}, by the checkpoint's tensors",
                    got=str(value),
                    do="check that config.json belongs to this checkpoint",
                )


_COUNT = re.compile(r"(^|_)(num|n)_|layers$")
_NO_COUNT = re.compile(r"position|ctx|^max_")


def _describe(tensors: Headers, name: str) -> str:
    if name not in tensors:
        return "no such tensor"
    dtype, shape = tensors[name]
    return f"{dtype} {list(shape)}"
