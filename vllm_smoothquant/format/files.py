"""Reading checkpoint files: safetensors headers, tensors, JSON, and the faults that headers alone show."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .config import EXPERT, CheckpointConfig
from .errors import SmoothQuantError
from .int4 import IN_WORD

MANIFEST = "smoothquant.json"
MAX_JSON_BYTES = 64 * 2**20  # the largest index file that we know of has 15 MB

Headers = dict[str, tuple[str, tuple[int, ...]]]
SCALES = ("weight_scale", "input_scale", "smoothing_factor")  # what a quantised layer has beside weight and bias
# safetensors' names of dtypes -> bytes.
FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
BYTES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
PACKED = "weight_packed"
_SAFETENSORS_NAME = {torch.int8: "I8", torch.float32: "F32", torch.int32: "I32"}
_FIX = "copy or export the checkpoint again"

# Keys of config.json that count something, and those of them that count positions, which often have no tensor.
_COUNT = re.compile(r"(^|_)(num|n)_|layers$")
_NO_COUNT = re.compile(r"position|ctx|^max_")

# Routed experts in the name of a tensor. Without such a name, one tensor of three dimensions holds all of them.
_EXPERTS = re.compile(r"(?:.*\.)?experts(?=\.)")
# A scale or zero point, and what it belongs to: `weight`, another tensor of the file, or the cached `k`.
_SCALE = re.compile(r"(.+?)_(?:global_)?(?:scale|zero_point)(?:_inv)?")
_SCALED = re.compile(r"(?:.*_)?(?:weight|input)|output|[qkv]")


def bad_scales(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, str]:
    """(bool, which of `values` are no scales; what scales are). signed: the weight_scale of 4-bit weights."""
    good = torch.isfinite(values) & (values != 0 if signed else values > 0)
    return ~good, "finite values other than zero" if signed else "finite values above zero"


def read_headers(folder: str | Path) -> Headers:
    """Tensor name -> (safetensors' name of the dtype, shape) of every tensor in `folder`; reads no tensor.

    SmoothQuantError if a file cannot be read, if two files have the same tensor, or if index and files disagree.
    """
    folder = Path(folder)
    headers: Headers = {}
    file_of: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, header in read_header(path).items():
            if name in file_of:
                fix = "remove the file that does not belong to this checkpoint"
                raise SmoothQuantError(str(path), f"{name} in one file", f"a second copy, after {file_of[name]}", fix)
            headers[name], file_of[name] = header, path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            expected = "an object with a weight_map of file names"
            raise SmoothQuantError(str(index), expected, repr(weight_map)[:80], _FIX)
        for name, file in weight_map.items():
            if file_of.pop(name, None) != file:
                raise SmoothQuantError(str(index), f"{name} in {file}", "nothing there", "copy the missing file")
        for name, file in file_of.items():
            raise SmoothQuantError(str(index), f"an entry for {name}", f"none, but {file} has this tensor", _FIX)
    return headers


def read_header(path: Path) -> Headers:
    """The header of one file, read by the library that will read the tensors, because it checks offsets and sizes."""
    try:
        if not path.is_file():
            raise ValueError("neither a file nor a link to a file")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise SmoothQuantError(str(path), "a safetensors file", error, _FIX) from error


def read_tensors(folder: str | Path, suffix: str | tuple[str, ...] = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of each tensor whose name ends with `suffix`. Call read_headers first, because it checks."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(suffix):
                    yield name, file.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. SmoothQuantError if there is none, or if an object in it has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError(f"a key twice, among {', '.join(sorted(value))}")
        return value

    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"no file, or a file of more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(type(value).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise SmoothQuantError(str(path), "a JSON object", error, _FIX) from error
    return value


def quantised_layers(headers: Headers) -> list[str]:
    """The names of the quantised layers, sorted."""
    stored = {name.rpartition(".")[::2] for name, (dtype, _) in headers.items() if dtype in ("I8", "I32")}
    return sorted({name for name, suffix in stored if suffix in ("weight", PACKED)})


def header_faults(config: CheckpointConfig, tensors: Headers) -> Iterator[SmoothQuantError]:
    """All faults that `tensors` alone shows under `config`: missing tensors, unknown tensors, wrong dtypes and shapes.

    A linear layer that has no tensors at all is a fault that only the model shows; an infinite scale needs its value.
    Scales that do not belong to int8 weights are faults, because some of vLLM's loaders skip them and cast the weights.
    """

    def fault(tensor: str, expected: str, got: str = "") -> SmoothQuantError:
        return SmoothQuantError(tensor, expected, got or _describe(tensors, tensor), "export the checkpoint again")

    integers = {name for name, (dtype, _) in tensors.items() if dtype == "I8"}
    experts = {name: name for name in integers if len(tensors[name][1]) > 2}
    if config.experts is None:
        experts |= {name: match[0] for name in integers if (match := _EXPERTS.match(name))}
    for name in sorted(set(experts.values())):
        expected = "one matrix for each expert" if config.experts else "floating point: config.json has no `experts`"
        yield fault(name, expected, "int8")
    quantised = {name.removesuffix(".weight") for name in integers - experts.keys()}
    quantised |= {name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(f".{PACKED}")}
    for name in sorted(filter(EXPERT.search, config.smoothed)):
        yield fault(f"{name}.smoothing_factor", "none: vLLM computes the experts of a block from one input", "one")
    for name in sorted((config.smoothed | set(config.overrides)) - quantised):
        yield fault(f"{name}.weight", "integers, because quantization_config names the layer")
    scaled = {tensor.removesuffix(f".{s}") for s in SCALES for tensor in tensors if tensor.endswith(f".{s}")}
    scaled -= {name.removesuffix(".weight") for name in experts}
    unknown: dict[str, list[str]] = {}
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if name in quantised and suffix not in (*SCALES, PACKED, "weight", "bias"):
            unknown.setdefault(name, []).append(tensor)
            continue
        owner = match[1] if suffix not in SCALES and (match := _SCALE.fullmatch(tensor)) else ""
        if _SCALED.fullmatch(owner.rpartition(".")[2]) or (owner in tensors and owner not in experts):
            yield fault(tensor, "nothing: no tensor of this format")
    for name in sorted(quantised | scaled):
        scheme = config.scheme(name)
        if scheme is None:
            yield fault(f"{name}.weight", "floating point, because quantization_config ignores it", "a quantised layer")
            continue
        four_bits = scheme.weights.num_bits == 4
        stored, wanted_dtype = (PACKED, "I32") if four_bits else ("weight", "I8")
        dtype, shape = tensors.get(f"{name}.{stored}", ("", ()))
        if dtype != wanted_dtype or len(shape) != 2:
            yield fault(f"{name}.{stored}", "int32 [out, in / 8]" if four_bits else "int8 [out, in]")
            continue
        rows, columns = (shape[0], shape[1] * IN_WORD) if four_bits else shape
        # GPT-2's Conv1D stores [in, out]. Tensors with one element per output or per input channel show the order.
        shapes = [tensors.get(f"{name}.{suffix}", ("", ()))[1] for suffix in ("weight_scale", "smoothing_factor")]
        if not four_bits and (shapes[0] == (columns, 1) or (shapes[0] == (1,) and shapes[1] == (rows,))):
            rows, columns = columns, rows
        if columns % (scheme.weights.group_size or 1):
            yield fault(f"{name}.{stored}", f"inputs in groups of {scheme.weights.group_size}", f"{columns} inputs")
            continue
        specs = scheme.tensors(rows, columns)
        if name in config.smoothed:
            specs["smoothing_factor"] = (torch.float32, (columns,))
        wanted = {f"{name}.{suffix}": (_SAFETENSORS_NAME[dtype], shape) for suffix, (dtype, shape) in specs.items()}
        for tensor in unknown.get(name, ()):
            yield fault(tensor, "nothing: no tensor of this format")
        for tensor in (f"{name}.{suffix}" for suffix in (*SCALES, PACKED, *(["weight"] if four_bits else []))):
            if tensors.get(tensor) != wanted.get(tensor):
                yield fault(
                    tensor, _describe(wanted, tensor) if tensor in wanted else "nothing, by quantization_config"
                )


def size_faults(config: Mapping[str, Any], tensors: Headers) -> Iterator[SmoothQuantError]:
    """Counts in config.json (layers, heads, experts) that exceed `tensors`: a library would try to build that many.

    A layer has at least one tensor of its own. Anything else that is counted is a tensor or a part of a dimension. The
    names of transformers' configuration keys show which of them are counts.
    """
    largest = max((n for _, shape in tensors.values() for n in shape), default=0)
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from size_faults(value, tensors)
        elif type(value) is int and _COUNT.search(key) and not _NO_COUNT.search(key):
            bound = len(tensors) if "layer" in key else max(largest, len(tensors))
            if value > bound:
                expected, fix = f"at most {bound}, by its tensors", "check that config.json belongs to this checkpoint"
                yield SmoothQuantError(f"config.json: {key}", expected, str(value), fix)


def _describe(tensors: Headers, name: str) -> str:
    if name not in tensors:
        return "no such tensor"
    dtype, shape = tensors[name]
    return f"{dtype} {list(shape)}"
